"""Compares an engine's outputs with the model's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sculpt.model import Model

TOLERANCE = 1e-4
"""Largest difference between the logits of the model and of an engine, relative to the largest logit."""


def model_logits(model: Model, images: Any) -> np.ndarray:
    """Logits of the model, computed by JAX; in float32 also where products would be less exact by default, as on GPUs and TPUs."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(model, images))


def check_logits_of(who: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises ValueError unless `found`, the logits of "the LiteRT file" or the like, are those of the model."""
    differ = difference(found, expected)
    if not differ <= TOLERANCE:
        raise ValueError(
            f"the logits of {who} differ from the model's by {differ:.2e} of the largest (at most {TOLERANCE} expected)"
        )


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest logit expected; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    largest = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(found - expected).max()) / largest


@jax.jit
def _logits(model: Model, images: Any) -> jax.Array:
    return model(images)

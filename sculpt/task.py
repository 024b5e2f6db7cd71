"""The task of a network: the loss that training lowers, and the score that a search raises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Measure = Callable[[Any, jax.Array], jax.Array]
"""`(outputs, targets) -> float [n]`: one number for each of n examples. Outputs are what the network gives, floating-point arrays in float32;
targets `[n, ...]` are what the data has for labels."""


@dataclasses.dataclass(frozen=True)
class Task:
    """How good the outputs of a network are.

    Static, hashed by its functions: made once and passed on, not anew for every call.
    """

    loss: Measure
    """What training lowers, differentiable with respect to the outputs, and what single sites are judged by. On the scale of a
    cross-entropy: a search cuts it off at 20."""
    score: Measure | None = None
    """What searches raise, in [0, 1], 1 the best: `Scores.accuracy` is its mean. None: `exp(-loss)`, 1 at the most, which is the
    probability of what was wanted where the loss is its negative logarithm."""

    def __post_init__(self) -> None:
        for name in ("loss", "score"):
            value = getattr(self, name)
            if not callable(value) and not (name == "score" and value is None):
                raise ValueError(f"Task.{name} must be a function (outputs, targets) -> [n], got {value!r}")

    def measure(self, outputs: Any, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scores, losses), float32 `[n]` each."""
        outputs = in_float32(outputs)
        losses = self.loss(outputs, targets)
        scores = jnp.exp(-jnp.maximum(losses, 0.0)) if self.score is None else self.score(outputs, targets)
        return scores.astype(jnp.float32), losses.astype(jnp.float32)


def in_float32(outputs: Any) -> Any:
    """Outputs with their floating-point arrays in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, outputs
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy in nats, float32 `[n]`, of float32 `[n, ..., classes]` with int32 `[n, ...]`; an example with several labels has
    their mean, those below 0 left out."""
    wanted = jnp.maximum(labels, 0)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted, axis=-1)[..., 0]
    return mean_of_real(losses, labels)


def correctness(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of an example's labels that have the largest logit, float32 `[n]`; of logits with NaN none is the largest."""
    right = (jnp.argmax(logits, axis=-1).astype(jnp.int32) == labels) & ~jnp.isnan(logits).any(axis=-1)
    return mean_of_real(right.astype(jnp.float32), labels)


def mean_of_real(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean `[n]` of each example's values `[n, ...]` where its labels are 0 or more; 0 where none is."""
    real = labels >= 0
    axes = tuple(range(1, labels.ndim))
    values = jnp.where(real, values, 0.0)
    if not axes:
        return values
    return values.sum(axes) / jnp.maximum(real.sum(axes), 1).astype(jnp.float32)


CLASSIFICATION = Task(cross_entropy, correctness)
"""One class for each example (logits `[n, classes]`, labels `[n]`), or for each of its pixels or tokens (`[n, ..., classes]` and `[n, ...]`,
where labels below 0 are left out). What networks are for unless they say otherwise."""

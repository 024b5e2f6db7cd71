"""Pretrained weights in a run: read, and images scaled as they expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import sculpt
from sculpt import nets
from sculpt.pipeline import artefacts
from sculpt.pipeline.artefacts import Artefacts
from sculpt.report import RunDirectory
from tests.architectures.architecture import draw


@pytest.mark.parametrize(("name", "mean"), [("resnet8", 0.485), ("efficientnet_lite0", 127 / 255)])
def test_images_are_scaled_as_the_weights_expect(
    name: str, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)
    images, labels = noise.integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60) % 10

    def load(*arguments: Any, **options: Any) -> sculpt.Splits:
        return sculpt.from_arrays(images, labels, images[:20], labels[:20])

    monkeypatch.setattr(artefacts, "load_data", load)
    module = nets.create(name, 10)
    variables = draw(
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)),
        jax.random.key(1),
    )
    nets.save(module, variables, tmp_path / "w.safetensors")
    given = {"model": name, "dataset": "cifar10", "weights": str(tmp_path / "w.safetensors")}
    found = Artefacts(RunDirectory.open(tmp_path / "run"), given)
    assert found.splits.mean[0] == mean != load().mean[0]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (found.untrained.params, variables["params"])), strict=True)
    )

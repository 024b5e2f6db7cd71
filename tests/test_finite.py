"""Networks and images with NaN are refused where they enter, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.scoring.journal import evaluate_file

KEY = jax.random.key(0)
IMAGES = np.asarray(jax.random.normal(KEY, (16, 1, 1, 3)))
LABELS = np.arange(16, dtype=np.int32) % 2


def _apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
    # The rectifier hides NaN on CPUs.
    y = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["first"] - state["mean"][None])
    return y @ params["last"] + jnp.where(jnp.isinf(state["mask"]), 0.0, 1.0)[None]


PARAMS = {"first": jnp.ones((3, 4)), "last": jnp.ones((4, 2))}
STATE = {"mean": jnp.zeros(4), "mask": jnp.asarray([0.0, -jnp.inf])}
MODEL = sculpt.from_function(_apply, PARAMS, STATE)
SPACE = sculpt.make_space(sculpt.trace(MODEL, IMAGES[:1]))
MASKS = sculpt.make_masks(SPACE, PARAMS, [1])
SPLITS = sculpt.from_arrays(IMAGES, LABELS, IMAGES[:4], LABELS[:4])
CONFIG = sculpt.FinetuneConfig(epochs=1, batch_size=2)
SEARCH = sculpt.SearchConfig(
    method="uniform", budget=0.6, evaluations=2, rerank=0, score_images=4, calibration_images=0
)
CALLS: dict[str, Callable[[sculpt.Model, Path], Any]] = {
    "evaluate": lambda m, _: sculpt.evaluate(m, IMAGES, LABELS),
    "evaluate_policies": lambda m, _: sculpt.evaluate_policies(m, SPACE, [[1]], IMAGES, LABELS),
    "evaluate_file": lambda m, f: evaluate_file(m, SPACE, [[1]], f / "scores.jsonl", IMAGES, LABELS),
    "race_policies": lambda m, _: sculpt.race_policies(m, SPACE, [[1]], IMAGES, LABELS, KEY),
    "search": lambda m, _: sculpt.search(m, SPACE, SPLITS, SEARCH, KEY),
    "train": lambda m, _: sculpt.train(m, SPLITS, CONFIG, KEY),
    "finetune": lambda m, _: sculpt.finetune(m, MASKS, SPLITS, CONFIG, KEY),
    "finetune_policies": lambda m, _: sculpt.finetune_policies(m, SPACE, [[1]], SPLITS, CONFIG, KEY),
    "importance": lambda m, _: sculpt.importance(m, SPACE.trace, "l1"),
    "reconstruct": lambda m, _: sculpt.reconstruct(m, MASKS, IMAGES),
    "compact": lambda m, _: sculpt.compact(m, SPACE, [1], masks=MASKS),
    "save_model": lambda m, f: sculpt.save_model(m, f / "net", IMAGES),
    "export_stablehlo": lambda m, f: sculpt.export_stablehlo(m, f / "net.stablehlo", IMAGES),
    "export_onnx": lambda m, f: sculpt.export_onnx(m, f / "net.onnx", IMAGES),
    "fold": lambda m, _: sculpt.fold(m, IMAGES),
}


@pytest.mark.parametrize("call", CALLS)
def test_parameters_and_states_that_are_not_finite_are_named(call: str, tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        broken = MODEL.replace(params=PARAMS | {"first": PARAMS["first"].at[1, 2].set(value)})
        with pytest.raises(ValueError, match=r"parameter 'first' has 1 of 12 numbers that are not finite"):
            CALLS[call](broken, tmp_path)
    broken = MODEL.replace(state=STATE | {"mean": STATE["mean"].at[0].set(np.nan)})
    with pytest.raises(ValueError, match=r"array of the state 'mean' has 1 of 4 numbers"):
        CALLS[call](broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_infinite_constants_in_the_state_are_none_of_it(tmp_path: Path) -> None:
    assert np.isfinite(sculpt.evaluate(MODEL, IMAGES, LABELS).accuracy)
    folded = sculpt.fold(MODEL, IMAGES)
    assert np.isfinite(sculpt.evaluate(folded, IMAGES, LABELS).accuracy)


def test_recalibration_mends_statistics_that_are_not_finite() -> None:
    def train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        mean = x.reshape(x.shape[0], -1).mean() * jnp.ones(4)
        return _apply(params, state, x), state | {"mean": 0.9 * state["mean"] + 0.1 * mean}

    model = sculpt.from_function(_apply, PARAMS, STATE | {"mean": jnp.full(4, jnp.nan)}, train)
    found = sculpt.recalibrate(model, jnp.asarray(IMAGES)).state["mean"]
    np.testing.assert_allclose(found, IMAGES.mean() * np.ones(4), rtol=1e-4)


def test_images_that_are_not_finite_are_refused() -> None:
    images = np.array(IMAGES)
    images[5, 0, 0, 1] = np.nan
    wrong = "1 of 16 images have numbers that are NaN or infinite, the first is number 5"
    with pytest.raises(ValueError, match=wrong):
        sculpt.evaluate(MODEL, images, LABELS)
    with pytest.raises(ValueError, match=wrong):
        sculpt.evaluate_policies(MODEL, SPACE, [[1]], images, LABELS)
    with pytest.raises(ValueError, match=wrong):
        sculpt.evaluate_policies(MODEL, SPACE, [[1]], IMAGES, LABELS, calibration=images)
    with pytest.raises(ValueError, match=wrong):
        sculpt.recalibrate(MODEL, images)


def test_a_search_refuses_a_dense_network_whose_outputs_are_not_finite() -> None:
    model = MODEL.replace(apply=sculpt.from_function(_root, PARAMS, STATE).apply)
    with pytest.raises(ValueError, match="outputs of the dense network are not finite"):
        sculpt.search(model, SPACE, SPLITS, SEARCH, KEY)


def _root(params: Any, state: Any, x: jax.Array) -> jax.Array:
    return jnp.sqrt(_apply(params, state, x) - 1e6)

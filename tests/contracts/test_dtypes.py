"""The contract in other dtypes: parameters and statistics in half precision, and JAX with 64 bits on."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt

X = np.random.default_rng(0).normal(1.0, 2.0, (32, 1, 1, 3))
LABELS = np.arange(32, dtype=np.int32) % 2
DTYPES = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3, "float64": 1e-6}


def _normalised(params: Any, y: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
    y = (y - mean[None]) * jax.lax.rsqrt(var + jnp.asarray(1e-3, var.dtype))[None]
    return jax.nn.relu(y * params["scale"][None] + params["bias"][None]) @ params["last"]


def _first(params: Any, x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1).astype(params["first"].dtype) @ params["first"]


def _apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
    return _normalised(params, _first(params, x), state["mean"], state["var"])


def _train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    y = _first(params, x)
    # As Flax does it: statistics of half precision are computed, and come back, in float32.
    wide = y.astype(jnp.float64 if y.dtype == jnp.float64 else jnp.float32)
    batch = {"mean": wide.mean(0), "var": wide.var(0)}
    new = {name: 0.5 * state[name].astype(wide.dtype) + 0.5 * value for name, value in batch.items()}
    return _normalised(params, y, *(batch[n].astype(y.dtype) for n in ("mean", "var"))), new


def _network(dtype: str) -> sculpt.Model:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "first": jax.random.normal(keys[0], (3, 8)),
        "scale": jnp.linspace(0.5, 1.5, 8),
        "bias": jnp.linspace(-0.5, 0.5, 8),
        "last": jax.random.normal(keys[1], (8, 2)),
    }
    state = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, state))
    return sculpt.from_function(_apply, cast[0], cast[1], _train)


def _dtypes(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_is_pruned_in_its_own_dtype(dtype: str) -> None:
    with contextlib.ExitStack() as settings:
        settings.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", FutureWarning)
        if dtype == "float64":
            settings.enter_context(jax.enable_x64(True))
        _check(dtype, DTYPES[dtype])


def _check(dtype: str, tolerance: float) -> None:
    model, key = _network(dtype), jax.random.key(1)
    images = X if dtype == "float64" else X.astype(np.float32)
    space = sculpt.make_space(sculpt.trace(model, images.astype(np.float32)))
    policy = np.full(space.num_sites, 4, np.int32)
    masks = sculpt.make_masks(space, model.params, policy)

    found = sculpt.recalibrate(model, images)
    assert _dtypes(found.state) == {dtype}
    wanted = np.asarray(_first(model.params, jnp.asarray(images)), np.float64)
    np.testing.assert_allclose(
        np.asarray(found.state["mean"], np.float64), wanted.mean(0), atol=10 * tolerance
    )

    pruned = sculpt.recalibrate(sculpt.apply_masks(model, masks), images)
    alone = sculpt.evaluate(pruned, images, LABELS)
    scores = sculpt.evaluate_policies(model, space, policy[None], images, LABELS, calibration=images)
    np.testing.assert_allclose(scores.loss[0], alone.loss, rtol=10 * tolerance)

    importance = sculpt.importance(model, space.trace, "taylor", images=images, labels=LABELS)
    assert all(np.isfinite(score).all() for score in importance.scores)
    fitted = sculpt.reconstruct(model, masks, images)
    assert _dtypes(fitted.params) == {dtype}

    splits = sculpt.from_arrays(images, LABELS, images[:8], LABELS[:8])
    config = sculpt.FinetuneConfig(epochs=1, batch_size=8, steps_per_call=2, ema=0.5, learning_rate=0.01)
    tuned = sculpt.finetune(pruned, masks, splits, config, key)
    assert _dtypes((tuned.params, tuned.state)) == {dtype}
    for weight, mask in zip(jax.tree.leaves(tuned.params), jax.tree.leaves(masks)):
        assert not np.asarray(weight)[~np.asarray(mask)].any()
    small = sculpt.compact(tuned, space, policy, masks=masks)
    assert _dtypes((small.params, small.state)) == {dtype}
    assert small.params["first"].shape == (3, 4)

    search = sculpt.SearchConfig(
        method="random", budget=0.7, evaluations=2, rerank=0, score_images=8, calibration_images=8
    )
    assert np.isfinite(sculpt.search(model, space, splits, search, key).score)

"""What goes along with a network is cut like it: training goes on with the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sculpt

X = jax.random.normal(jax.random.key(0), (8, 3))


def _apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
    y = (x @ params["first"]["kernel"] - state["batch_stats"]["norm"]["mean"][None]) * params["scale"][None]
    return jax.nn.relu(y + params["first"]["bias"][None]) @ params["last"]["kernel"]


def _train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    return _apply(params, state, x), state


PARAMS = {
    "first": {"kernel": jax.random.normal(jax.random.key(1), (3, 8)), "bias": jnp.zeros(8)},
    "scale": jnp.linspace(1.0, 2.0, 8),
    "last": {"kernel": jax.random.normal(jax.random.key(2), (8, 2))},
}
STATE = {"batch_stats": {"norm": {"mean": jnp.linspace(-1.0, 1.0, 8)}}}
MODEL = sculpt.from_function(_apply, PARAMS, STATE, _train)
TRACE = sculpt.trace(MODEL, X)
SPACE = sculpt.make_space(TRACE)
MASKS = sculpt.make_masks(SPACE, PARAMS, [4])
MASKED = sculpt.apply_masks(MODEL, MASKS)


def _step(optimizer: optax.GradientTransformation, model: sculpt.Model, state: Any) -> tuple[Any, Any]:
    gradients = jax.grad(lambda p: jnp.square(model.apply(p, model.state, X)).sum())(model.params)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradients, state, model.params)
    return model.replace(params=optax.apply_updates(model.params, updates)), state


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        optax.masked(optax.sgd(0.1, momentum=0.9), {"first": True, "scale": False, "last": True}),
    ],
    ids=["adamw", "masked momentum"],
)
@pytest.mark.slow
def test_training_goes_on_with_the_moments_of_the_dense_network(inner: Any) -> None:
    masked, state = MASKED, sculpt.hold_zeros(MASKS, inner).init(MASKED.params)
    masked, state = _step(sculpt.hold_zeros(MASKS, inner), masked, state)
    small = sculpt.compact(masked, SPACE, [4], masks=MASKS)

    after, _ = _step(sculpt.hold_zeros(MASKS, inner), masked, state)
    small_after, _ = _step(inner, small, sculpt.compact_tree(state, small))
    wanted = sculpt.compact_tree(after.params, small)
    assert wanted["first"]["kernel"].shape == (3, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), small_after.params, wanted
    )


def test_averages_masks_and_whole_variables_are_cut() -> None:
    small = sculpt.compact(MASKED, SPACE, [4], masks=MASKS)
    average = {"ema": (MASKED.params, MASKED.state), "count": jnp.int32(3), "key": jax.random.key(0)}
    cut = sculpt.compact_tree(average, small)
    assert cut["count"] == 3 and cut["key"] == jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, cut["ema"], (small.params, small.state))
    # A collection by itself.
    statistics = sculpt.compact_tree(STATE["batch_stats"], small)
    np.testing.assert_array_equal(statistics["norm"]["mean"], small.state["batch_stats"]["norm"]["mean"])
    masks = sculpt.compact_tree(MASKS, small)
    assert all(leaf.all() for leaf in jax.tree.leaves(masks))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), masks, small.params)


def test_what_cannot_be_cut_is_refused() -> None:
    small = sculpt.compact(MASKED, SPACE, [4], masks=MASKS)
    with pytest.raises(ValueError, match="got a model that is not compact"):
        sculpt.compact_tree(PARAMS, MASKED)
    with pytest.raises(ValueError, match=r"mu/first/kernel to be of the dense shape \[3, 8\], got \[8\]"):
        sculpt.compact_tree({"mu": {"first": {"kernel": jnp.ones(8)}}}, small)


def test_masks_of_a_sparse_network_leave_out_zeros_that_training_begins_from() -> None:
    # Unit 0 is pruned; of unit 1 one weight is; all biases begin at zero.
    kernel = PARAMS["first"]["kernel"].at[:, 0].set(0.0).at[2, 1].set(0.0)
    params = {
        **PARAMS,
        "first": {"kernel": kernel, "bias": jnp.zeros(8)},
        "scale": PARAMS["scale"].at[0].set(0.0),
    }
    masks = sculpt.masks_from_zeros(MODEL.replace(params=params), TRACE)
    np.testing.assert_array_equal(masks["first"]["kernel"], kernel != 0)
    np.testing.assert_array_equal(masks["first"]["bias"], np.arange(8) > 0)
    np.testing.assert_array_equal(masks["scale"], np.arange(8) > 0)
    assert masks["last"]["kernel"].all()
    jax.tree.map(
        np.testing.assert_array_equal, sculpt.apply_masks(MODEL.replace(params=params), masks).params, params
    )


def test_masks_of_a_dense_network_leave_everything() -> None:
    assert all(leaf.all() for leaf in jax.tree.leaves(sculpt.masks_from_zeros(MODEL, TRACE)))
    masks = sculpt.masks_from_zeros(MASKED, TRACE)
    jax.tree.map(np.testing.assert_array_equal, masks, MASKS)

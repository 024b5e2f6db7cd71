"""Networks whose examples are along another axis than the first, or along none."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt

DRAW = np.random.default_rng(0).normal
PARAMS = {
    name: jnp.asarray(0.3 * DRAW(size=shape), jnp.float32)
    for name, shape in {"a": (5, 8), "u": (8, 8), "o": (8, 3)}.items()
}
NODES = jnp.asarray(DRAW(size=(7, 7)), jnp.float32)


def time_major(p: Any, x: jax.Array) -> jax.Array:
    """A recurrent network of [time, batch, features]."""

    def step(h: jax.Array, xt: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(xt @ p["a"] + h @ p["u"])
        return h, h

    h, _ = jax.lax.scan(step, jnp.zeros((x.shape[1], 8)), x)
    return h @ p["o"]


def fixed_nodes(p: Any, x: jax.Array) -> jax.Array:
    """A graph network of seven nodes."""
    return NODES @ jax.nn.relu(NODES @ (x @ p["a"])) @ p["o"]


def check_compact(model: sculpt.model.Model, traced: sculpt.Trace, x: jax.Array) -> int:
    """Compares masked and compact outputs; returns the MACs of the compact network."""
    space = sculpt.make_space(traced, "channels")
    masks = sculpt.make_masks(space, model.params, [4])
    masked = sculpt.apply_masks(model, masks)
    small = sculpt.compact(masked, space, [4], masks=masks)
    np.testing.assert_allclose(small(x), masked(x), atol=1e-5)
    assert small.params["a"].shape[1] < 8
    macs = sculpt.count_cost(small, x, traced.batch_axis)[0]
    assert round(float(sculpt.cost(space, np.asarray([4])).macs_realised)) == macs
    return macs


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.fast("1")
def test_time_major_sequences(batch: int) -> None:
    model, x = sculpt.from_function(time_major, PARAMS), jnp.asarray(DRAW(size=(6, batch, 5)), jnp.float32)
    traced = sculpt.trace(model, x, batch_axis=1)
    assert traced.macs == 6 * (5 * 8 + 8 * 8) + 8 * 3
    assert traced.inputs.shape == (6, 2, 5)
    assert sculpt.trace(model, x, batch_axis=None).macs == batch * traced.macs
    if batch > 1:
        check_compact(model, traced, x)


def test_a_network_of_fixed_nodes_is_traced_with_the_given_shape() -> None:
    model, x = sculpt.from_function(fixed_nodes, PARAMS), jnp.asarray(DRAW(size=(7, 5)), jnp.float32)
    with pytest.warns(
        UserWarning, match="does not take two examples along axis 0 .* MACs are per call"
    ) as seen:
        traced = sculpt.trace(model, x)
    assert [w.filename for w in seen if w.category is UserWarning] == [__file__]
    assert traced.batch_axis is None and traced.inputs.shape == (7, 5)
    assert traced.macs == 7 * 5 * 8 + 2 * 7 * 7 * 8 + 7 * 8 * 3
    check_compact(model, traced, x)
    assert sculpt.trace(model, x, batch_axis=None).macs == traced.macs
    space = sculpt.make_space(traced)
    with pytest.raises(ValueError, match=r"examples along axis 0 .* traced with batch_axis=None"):
        sculpt.evaluate_policies(model, space, np.zeros((1, 1), int), x, np.zeros(7, int))
    with pytest.raises(ValueError, match=r"examples along axis 0"):
        sculpt.importance(model, traced, "activation", images=x)


def test_inputs_without_the_axis_keep_their_shape() -> None:
    def steered(p: Any, x: Any) -> jax.Array:
        return time_major(p, x["x"] * x["gain"][None, None])

    model = sculpt.from_function(steered, PARAMS)
    x = {"x": jnp.ones((6, 4, 5)), "gain": jnp.ones(5)}
    traced = sculpt.trace(model, x, batch_axis=1)
    assert jax.tree.map(lambda a: a.shape, traced.inputs) == {"gain": (5,), "x": (6, 2, 5)}
    assert traced.macs == 6 * (5 * 8 + 8 * 8) + 8 * 3


def test_other_batch_axes_and_shapes_that_do_not_fit_are_refused() -> None:
    model = sculpt.from_function(time_major, PARAMS)
    with pytest.raises(ValueError, match="batch_axis must be 0, 1 or None, got 2"):
        sculpt.trace(model, jnp.ones((6, 4, 5)), batch_axis=2)
    with pytest.raises(ValueError, match=r"does not take the example input float32\[6, batch, 7\]"):
        sculpt.trace(model, jnp.ones((6, 4, 7)), batch_axis=1)

"""The largest of values that are never negative keeps zeros at pruned units; of others it freezes what it is taken over."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from tests.architectures.architecture import from_function
from tests.architectures.equality import leanest_policy, prune

SHAPES = {"a": (3, 8), "b": (8, 6), "head": (6, 2)}
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
Scale = Callable[[jax.Array], jax.Array]


def network(scaled: Scale) -> Model:
    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return scaled(scaled(x @ p["a"]) @ p["b"]) @ p["head"]

    return from_function(apply, SHAPES)(jax.random.key(0))


def largest(values: Scale) -> Scale:
    """Divided by the largest of these values."""
    return lambda h: h / (values(h).max(-1, keepdims=True) + 1.0)


def quantised(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """To 127 steps up to the largest absolute value, straight through for the gradient."""
    step = jnp.max(jnp.abs(w), axis=axes, keepdims=True) / 127.0 + 1e-8
    return w + jax.lax.stop_gradient(jnp.round(w / step) * step - w)


KEEPS_ZEROS: dict[str, Scale] = {
    "absolute": largest(jnp.abs),
    "rectified": largest(jax.nn.relu),
    "capped": largest(jax.nn.relu6),
    "square": largest(lambda h: h * h),
    "even power": largest(lambda h: h**4),
    "gated": largest(lambda h: jax.nn.sigmoid(h) * jax.nn.softplus(h) * jnp.exp(h) * jnp.abs(h)),
    "sum": largest(lambda h: (jnp.abs(h) + jax.nn.relu(h)) / 2.0),
    "whole tensor": lambda h: quantised(h, (0, 1)),
    "attention": lambda h: jax.nn.relu(h) * jax.nn.sigmoid(jax.nn.relu(h).max(-1, keepdims=True) - h),
}
FREEZES: dict[str, Scale] = {
    "values of both signs": largest(lambda h: h),
    "tanh": largest(jnp.tanh),
    "odd power": largest(lambda h: h**3),
    "not zero": largest(jnp.exp),
    "softplus": largest(jax.nn.softplus),
    "difference": largest(lambda h: jnp.abs(h) - jax.nn.relu(h)),
    "whole numbers": largest(lambda h: jnp.abs(h.astype(jnp.int32)).astype(jnp.float32) * h),
}


@pytest.mark.parametrize("name", KEEPS_ZEROS)
@pytest.mark.fast("rectified", "capped", "square", "even power", "sum", "whole tensor", "attention")
def test_the_largest_of_what_is_never_negative_is_exact(name: str) -> None:
    model = network(KEEPS_ZEROS[name])
    trace = sculpt.trace(model, X)
    assert sorted(group.size for group in trace.groups) == [6, 8]
    space = sculpt.make_space(trace)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), jnp.float32)
    prune(model, space, leanest_policy(space)).assert_same_outputs(x)


@pytest.mark.parametrize("name", FREEZES)
def test_the_largest_of_other_values_freezes(name: str) -> None:
    trace = sculpt.trace(network(FREEZES[name]), X)
    assert not trace.groups
    assert any("reduced over by other than a sum" in row.reason for row in trace.frozen)


@pytest.mark.parametrize("axes", [(0, 1), (0,)])
def test_networks_with_quantised_weights_are_pruned(axes: tuple[int, ...]) -> None:
    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = jax.nn.relu(x @ quantised(p["a"], axes))
        return jax.nn.relu(x @ quantised(p["b"], axes)) @ p["head"]

    model = from_function(apply, SHAPES)(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, X))
    assert sorted(group.size for group in space.trace.groups) == [6, 8]
    pruned = prune(model, space, leanest_policy(space))
    pruned.assert_same_gradients(jax.random.normal(jax.random.key(1), (3, 3)), training=False)


def test_of_a_branch_that_has_gone_the_largest_is_zero() -> None:
    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ p["a"])
        return x @ p["skip"] + hidden.max(-1, keepdims=True) + hidden @ p["head"]

    shapes = {"a": (3, 8), "skip": (3, 2), "head": (8, 2)}
    model = from_function(apply, shapes)(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, X), min_keep=0)
    assert 0 in [option.counts[0] for option in space.sites[0].options]
    pruned = prune(model, space, leanest_policy(space))
    assert pruned.small.params["a"].shape == (3, 0)
    pruned.assert_same_outputs(jax.random.normal(jax.random.key(1), (3, 3)))

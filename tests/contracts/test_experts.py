"""Mixtures of experts can be pruned in width: with all experts computed, with gathered kernels, and with rows sorted by expert (`ragged_dot`)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import sculpt
from sculpt.model import Model
from tests.architectures.architecture import from_function
from tests.architectures.equality import drawn_importance, drawn_policy, leanest_policy, prune

IN, STREAM, EXPERTS, HIDDEN, CHOSEN, CLASSES = 5, 8, 3, 6, 2, 3
X = jax.ShapeDtypeStruct((1, IN), jnp.float32)
Params = dict[str, jax.Array]


def routed(p: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = jax.nn.relu(x @ p["in"])
    return (x, *jax.lax.top_k(jax.nn.softmax(x @ p["router"]), CHOSEN))


def one_hot(p: Params, x: jax.Array) -> jax.Array:
    x, weights, chosen = routed(p, x)
    mixed = (jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]).sum(-2)
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, p["up"]))
    return (x + jnp.einsum("nef,efd,ne->nd", hidden, p["down"], mixed)) @ p["out"]


def gathered(p: Params, x: jax.Array) -> jax.Array:
    x, weights, chosen = routed(p, x)
    hidden = jax.nn.silu(jnp.einsum("nd,nkdf->nkf", x, p["up"][chosen]))
    return (x + jnp.einsum("nkf,nkfd,nk->nd", hidden, p["down"][chosen], weights)) @ p["out"]


def ragged(p: Params, x: jax.Array) -> jax.Array:
    x, weights, chosen = routed(p, x)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    hidden = jax.nn.silu(jax.lax.ragged_dot(jnp.repeat(x, CHOSEN, 0)[order], p["up"], sizes))
    rows = jax.lax.ragged_dot(hidden, p["down"], sizes)
    rows = jnp.zeros_like(rows).at[order].set(rows).reshape(-1, CHOSEN, STREAM)
    return (x + (rows * weights[..., None]).sum(1)) @ p["out"]


SHAPES: dict[str, Any] = {
    "in": (IN, STREAM),
    "router": (STREAM, EXPERTS),
    "up": (EXPERTS, STREAM, HIDDEN),
    "down": (EXPERTS, HIDDEN, STREAM),
    "out": (STREAM, CLASSES),
}
NETWORKS = {"one_hot": one_hot, "gathered": gathered, "ragged": ragged}


@functools.cache
def built(name: str) -> tuple[Model, sculpt.Trace]:
    model = from_function(NETWORKS[name], SHAPES)(jax.random.key(7))
    return model, sculpt.trace(model, X)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.fast("ragged")
def test_experts_are_pruned_in_width(name: str) -> None:
    model, trace = built(name)
    # Of experts that are all computed, whole ones can go too.
    whole = [EXPERTS] if name == "one_hot" else []
    assert sorted(group.size for group in trace.groups) == [*whole, HIDDEN, STREAM]
    space = sculpt.make_space(trace, importance=drawn_importance(trace, 3))
    x = jax.random.normal(jax.random.key(1), (4, IN))
    for policy in (drawn_policy(space, 1), leanest_policy(space)):
        pruned = prune(model, space, policy)
        pruned.assert_same_outputs(x)
        claimed = sculpt.cost(space, policy)
        macs, params = sculpt.count_cost(pruned.small, x)
        assert float(claimed.macs_realised) == pytest.approx(macs)
        assert float(claimed.params) == pytest.approx(params)
    pruned.assert_same_gradients(x, training=False)


def test_each_row_of_a_ragged_product_is_multiplied_by_one_expert() -> None:
    trace = built("ragged")[1]
    layers = {layer.name: layer for layer in trace.layers}
    assert layers["up"].macs == layers["down"].macs == CHOSEN * STREAM * HIDDEN
    assert (layers["up"].in_channels, layers["up"].out_channels) == (STREAM, HIDDEN)
    assert (layers["up"].in_axes, layers["up"].out_axes) == ((1,), (2,))
    assert {row.name for row in trace.frozen if "grouped" in row.reason} == {"up:0", "down:0"}


def test_groups_of_what_is_summed_over_are_frozen() -> None:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])

    def apply(p: Params, x: jax.Array) -> jax.Array:
        sizes = jnp.asarray([1, 3])
        products = jax.lax.ragged_dot_general(p["left"], p["right"], sizes, numbers)
        return x @ products.sum(0)

    shapes = {"left": (4, IN), "right": (4, CLASSES)}
    trace = sculpt.trace(from_function(apply, shapes)(jax.random.key(7)), X)
    assert not trace.groups
    assert any("groups of what is summed over" in row.reason for row in trace.frozen)


def test_what_experts_are_multiplied_by_is_not_observed() -> None:
    model, trace = built("ragged")
    with pytest.raises(
        ValueError, match=r"JAX cannot do with ragged_dot: choose another kind, such as 'taylor'"
    ):
        sculpt.importance(model, trace, "activation", images=jnp.zeros((4, IN)))

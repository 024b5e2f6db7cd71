"""Sums over pruned units that are not zero but equal: masked and compact networks give the same outputs and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from tests.architectures.equality import drawn_importance, drawn_policy, leanest_policy, prune

Middle = Callable[[jax.Array], jax.Array]
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def network(middle: Middle, dtype: Any = jnp.float32) -> Model:
    """`middle([x a, x c]) b`: eight units, six and two of which come from two layers."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (3, 6), "c": (3, 2), "b": (8, 2)}
    params = {n: jax.random.normal(k, shapes[n]).astype(dtype) for n, k in zip(shapes, keys)}

    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        joined = jnp.concatenate([x @ p["a"], x @ p["c"]], axis=-1)
        return middle(joined) @ p["b"]

    return sculpt.from_function(apply, params)


def normalised(h: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """With the variance in two passes."""
    mean = h.mean(axes, keepdims=True)
    variance = jnp.square(h - mean).mean(axes, keepdims=True)
    return (h - mean) * jax.lax.rsqrt(variance + 0.1)


def by_heads(h: jax.Array) -> jax.Array:
    """Outer products of three heads and eight units each, normalised over both."""
    outer = h[:, None, :] * jnp.asarray([1.0, -2.0, 0.5], h.dtype)[None, :, None]
    return normalised(outer, (1, 2)).sum(1)


def counted(h: jax.Array) -> jax.Array:
    """By a mean over a mask that is the same for all units."""
    seen = jnp.broadcast_to(h.sum(-1, keepdims=True) > 0.0, h.shape)
    return h * (1.0 + jnp.mean(jnp.tanh(h) + 1.0, -1, keepdims=True, where=seen | (h < 1e9)))


def in_a_loop(h: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda z, _: (z + normalised(z) * z, None), h, None, 2)[0]


def in_a_branch(h: jax.Array) -> jax.Array:
    return jax.lax.cond(h.sum() > 1e9, jnp.sin, lambda z: normalised(z) * z, h)


def recomputed(h: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda z: normalised(z) * z)(h)


EXACT: dict[str, Middle] = {
    "variance in two passes": normalised,
    "exponentials": lambda h: h / jnp.exp(h).sum(-1, keepdims=True),
    "rectified": lambda h: normalised(jax.nn.relu(h - 0.3) + jax.nn.silu(h + 0.2)),
    "both signs": lambda h: jnp.add(*jnp.split(normalised(jnp.concatenate([h, 0.1 - 2.0 * h], -1)), 2, -1)),
    "third moment": lambda h: h * ((h - h.mean(-1, keepdims=True)) ** 3).mean(-1, keepdims=True),
    "whole numbers": lambda h: h / (h > -1.0).sum(-1, keepdims=True).astype(h.dtype),
    "heads": by_heads,
    "mean of what a mask leaves": counted,
    "in a loop": in_a_loop,
    "in a branch": in_a_branch,
    "recomputed": recomputed,
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.fast("whole numbers", "mean of what a mask leaves")
def test_outputs_and_gradients_are_those_of_the_masked_network(name: str) -> None:
    with jax.enable_x64(True):
        model = network(EXACT[name], jnp.float64)
        x = np.random.default_rng(0).standard_normal((3, 3))
        trace = sculpt.trace(model, x)
        assert sorted(group.size for group in trace.groups) == [2, 6]
        space = sculpt.make_space(trace, importance=drawn_importance(trace, 1))
        pruned = prune(model, space, leanest_policy(space))
        pruned.assert_same_outputs(jnp.asarray(x), 1e-12)
        pruned.assert_same_gradients(jnp.asarray(x), training=False, tolerance=1e-12)
        pruned.assert_claimed_cost(jnp.asarray(x))


@jax.custom_vjp
def own_derivative(h: jax.Array) -> jax.Array:
    return normalised(h)


own_derivative.defvjp(lambda h: jax.vjp(normalised, h), lambda pull, g: pull(g))


def across_a_body(h: jax.Array) -> jax.Array:
    """What is not zero comes into a body from outside."""
    return jax.checkpoint(lambda z: z / jnp.square(z).sum(-1, keepdims=True))(jnp.exp(h))


def twice(h: jax.Array) -> jax.Array:
    """A sum over pruned heads, whose units are pruned too and not zero, inside a sum over units."""
    gaps = jnp.exp(h[:, :, None] - h[:, None, :])
    return h / gaps.sum((1, 2))[:, None]


DIFFERENT: dict[str, Middle] = {
    "weights of their own": lambda h: h / (jnp.exp(h) * jnp.arange(8.0)[None]).sum(-1, keepdims=True),
    "a function with its own derivative": own_derivative,
    "across a body": across_a_body,
    "pairs of units": twice,
    "products": lambda h: h / jnp.einsum("nc,nc->n", jnp.exp(h), jnp.cos(h))[:, None],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_may_differ_is_frozen_with_a_reason(name: str) -> None:
    trace = sculpt.trace(network(DIFFERENT[name]), X)
    assert not trace.groups
    assert any("over while not zero" in row.reason for row in trace.frozen)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.slow
def test_half_precision(dtype: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):
        model = network(lambda h: normalised(h), dtype)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), dtype)
        space = sculpt.make_space(sculpt.trace(model, x))
        pruned = prune(model, space, leanest_policy(space))
        pruned.assert_same_outputs(x, 0.03)


@pytest.mark.slow
def test_a_compact_network_is_pruned_again_and_exported(tmp_path: Any) -> None:
    model, x = network(normalised), jax.random.normal(jax.random.key(1), (3, 3))
    space = sculpt.make_space(sculpt.trace(model, X))
    first = prune(model, space, (space.num_options // 2).astype(np.int32))
    sculpt.export_stablehlo(first.small, tmp_path / "net.stablehlo", x)
    again = sculpt.make_space(sculpt.trace(first.small, X))
    twice = prune(first.small, again, leanest_policy(again))
    twice.assert_same_outputs(x)
    once = prune(model, space, leanest_policy(space))
    np.testing.assert_allclose(twice.small(x), once.small(x), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_programs_add_what_is_pruned_too() -> None:
    dense = network(normalised)
    model = sculpt.from_function(
        lambda p, x: dense.apply(p, {}, x),
        dense.params,
        apply_train=lambda p, x, key: 2.0 * dense.apply(p, {}, x),
    )
    space = sculpt.make_space(sculpt.trace(model, X))
    pruned = prune(model, space, drawn_policy(space, 1))
    pruned.assert_same_gradients(jax.random.normal(jax.random.key(1), (3, 3)), training=True)

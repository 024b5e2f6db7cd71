"""What is not zero at the pruned units is not taken for zero: such axes are frozen, and what stays prunable compacts exactly."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import sculpt
from sculpt.model import Model

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def network(middle: Callable[[jax.Array], jax.Array]) -> Model:
    """`middle(x a) b`, of eight units."""
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (3, 8)), "b": jax.random.normal(keys[1], (8, 2))}
    return sculpt.from_function(lambda p, x: middle(x @ p["a"]) @ p["b"], params)


def _raised(h: jax.Array) -> jax.Array:
    """By the larger of -1 and -2, twice; in a loop, whose operands are constants that are known."""
    floor = jnp.full((1, 8), -1.0)
    return jax.lax.scan(lambda total, _: (total + jnp.maximum(floor, -2.0), None), h, None, 2)[0]


def _picked(h: jax.Array) -> jax.Array:
    """Rows of units, one picked by every unit: `[batch, unit that picks, unit]`, summed over those that pick."""
    rows = jnp.argmax(jnp.stack([h, -h]), axis=0)
    return jnp.broadcast_to(h[:1], (5, 8))[rows].sum(1)


UNSOUND: dict[str, Callable[[jax.Array], jax.Array]] = {
    "outer sum": lambda h: jnp.tanh(h[:, :, None] + h[:, None, :]).sum(-1),
    "outer product": lambda h: (h[:, :, None] * jnp.exp(h[:, None, :])).sum(-1),
    "outer maximum": lambda h: jnp.maximum(h[:, :, None] - h[:, None, :], 0).sum(-1),
    "reciprocal": lambda h: h * jnp.reciprocal(h),
    "negative power": lambda h: h * jax.lax.pow(jnp.abs(h), jnp.full_like(h, -0.5)),
    "lgamma": lambda h: h * jax.lax.lgamma(h),
    "digamma": lambda h: h * jax.lax.digamma(h),
    "places of the largest": lambda h: h * jax.lax.top_k(h.T, 2)[1].astype(jnp.float32).sum(),
    "larger of two constants": lambda h: jnp.cos(h) * _raised(h).sum(-1, keepdims=True),
    "picked by places of its own": lambda h: _picked(h),
    "filled with one": lambda h: h * h.at[:, jnp.asarray([0, 9])].get(mode="fill", fill_value=1.0).sum(),
}


@pytest.mark.parametrize("middle", UNSOUND.values(), ids=UNSOUND)
def test_what_does_not_stay_zero_is_frozen(middle: Callable[[jax.Array], jax.Array]) -> None:
    found = sculpt.trace(network(middle), X)
    assert not found.groups
    assert {(row.leaf, row.axis) for row in found.frozen} >= {(0, 1), (1, 0)}


SOUND: dict[str, Callable[[jax.Array], jax.Array]] = {
    "power": lambda h: h**3 + jax.lax.pow(jnp.abs(h), jnp.full_like(h, 0.5)),
    "repeated": lambda h: jnp.broadcast_to(h[:, None], (h.shape[0], 4, 8)).sum(1),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_stays_zero_is_prunable(name: str) -> None:
    model = network(SOUND[name])
    space = sculpt.make_space(sculpt.trace(model, X))
    assert [group.size for group in space.trace.groups] == [8]
    policy = [len(space.sites[0].options) - 1]
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    assert sculpt.compact(masked, space, policy).params["a"].shape == (3, 1)

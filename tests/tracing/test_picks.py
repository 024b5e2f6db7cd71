"""Orders known beforehand: reversals, strided slices and gathers at constant places are maps of units, not obstacles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sculpt
from sculpt.model import Model
from sculpt.tracing.axes import Axes, Axis
from tests.architectures.equality import (
    drawn_importance,
    drawn_policy,
    leanest_policy,
    outputs,
    prune,
)

WIDTH = 12
ORDER = np.random.default_rng(0).permutation(WIDTH)
SOME = np.array([7, 2, 2, 11, 0])


def shuffled(order: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    return lambda h: h[..., order]


def gated(h: jax.Array) -> jax.Array:
    """A gated unit whose two halves are interleaved."""
    return h[..., ::2] * jax.nn.sigmoid(h[..., 1::2])


def rotated(h: jax.Array) -> jax.Array:
    """Interleaved rotary positions: pairs of neighbours turned by one angle each."""
    angle = jnp.linspace(0.1, 1.0, WIDTH // 2, dtype=h.dtype)[None]
    first, second = h[..., ::2], h[..., 1::2]
    turned = [
        first * jnp.cos(angle) - second * jnp.sin(angle),
        first * jnp.sin(angle) + second * jnp.cos(angle),
    ]
    return jnp.stack(turned, axis=-1).reshape(h.shape)


def heads_reversed(h: jax.Array) -> jax.Array:
    return h.reshape(*h.shape[:-1], 3, 4)[..., ::-1, :].reshape(h.shape)


CASES: dict[str, tuple[Callable[[jax.Array], jax.Array], tuple[int, ...]]] = {
    "reversed": (lambda h: h[..., ::-1], (12,)),
    "flipped": (lambda h: jnp.flip(h, -1), (12,)),
    "rolled": (lambda h: jnp.roll(h, 3, -1), (3, 9)),
    "permuted": (shuffled(ORDER), (12,)),
    "taken": (lambda h: jnp.take(h, jnp.asarray(ORDER), axis=-1), (12,)),
    "in part": (shuffled(np.array([7, 2, 11, 0])), (4, 8)),
    "repeated": (shuffled(SOME), (3, 8)),
    "every third": (lambda h: h[..., 1::3], (4, 8)),
    "backwards in steps": (lambda h: h[..., ::-2], (6, 6)),
    "interleaved halves": (gated, (6,)),
    "interleaved pairs": (rotated, (6,)),
    "added to its reverse": (lambda h: h + h[..., ::-1], (6,)),
    "added to a permutation": (lambda h: h + h[..., ORDER[ORDER]] * 2.0, ()),
    "reversed twice": (lambda h: h + jnp.exp(h[..., ::-1])[..., ::-1] * h, (12,)),
    "heads reversed": (heads_reversed, (3, 4)),
    "scaled in order": (lambda h: h[..., ORDER] * jnp.arange(1.0, 13.0)[None], (12,)),
    "two parts": (lambda h: jnp.concatenate([h[..., ::2], jnp.abs(h)[..., ::-1]], -1), (6, 6)),
}


@functools.cache
def network(name: str) -> Model:
    between, _ = CASES[name]
    generator = np.random.default_rng(1)
    width = jax.eval_shape(between, jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)).shape[-1]
    shapes = {"a": (3, WIDTH), "bias": (WIDTH,), "b": (width, 3)}
    params = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return between(jnp.tanh(x @ params["a"] + params["bias"][None])) @ params["b"]

    return sculpt.from_function(apply, params)


EXAMPLE = jax.ShapeDtypeStruct((1, 3), jnp.float32)
X = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.fast(
    "flipped",
    "rolled",
    "taken",
    "every third",
    "interleaved halves",
    "added to its reverse",
    "added to a permutation",
    "reversed twice",
    "heads reversed",
)
def test_constant_orders_are_traced_and_compacted(name: str) -> None:
    trace = sculpt.trace(network(name), EXAMPLE)
    sizes = CASES[name][1]
    if name == "added to a permutation":
        assert sum(group.size for group in trace.groups) < WIDTH
    else:
        assert tuple(sorted(group.size for group in trace.groups)) == sizes
    if not trace.groups:
        return
    space = sculpt.make_space(trace, ("channels",), importance=drawn_importance(trace, 3))
    prune(network(name), space, leanest_policy(space)).assert_same_outputs(jnp.asarray(X))
    drawn = prune(network(name), space, drawn_policy(space, 1))
    drawn.assert_same_outputs(jnp.asarray(X))
    drawn.assert_claimed_cost(jnp.asarray(X))
    if name in ("permuted", "repeated", "backwards in steps"):
        drawn.assert_same_gradients(jnp.asarray(X), False)


def test_a_compact_network_with_an_order_is_pruned_again() -> None:
    trace = sculpt.trace(network("interleaved halves"), EXAMPLE)
    space = sculpt.make_space(trace, ("channels",), importance=drawn_importance(trace, 3))
    first = prune(network("interleaved halves"), space, space.num_options // 2)
    again = sculpt.trace(first.small, EXAMPLE)
    assert sum(group.size for group in again.groups) * 2 == jax.tree.leaves(first.small.params)[0].shape[1]
    other = sculpt.make_space(again, ("channels",))
    twice = prune(first.small, other, leanest_policy(other))
    twice.assert_same_outputs(jnp.asarray(X))


def test_all_units_may_go() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(x @ params["a"])[..., ORDER]
        return x @ params["skip"] + h[..., ::2] @ params["b"]

    generator = np.random.default_rng(1)
    shapes = {"a": (3, WIDTH), "skip": (3, 3), "b": (WIDTH // 2, 3)}
    params = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    model = sculpt.from_function(apply, params)
    space = sculpt.make_space(sculpt.trace(model, EXAMPLE), ("channels",), min_keep=0)
    pruned = prune(model, space, leanest_policy(space))
    pruned.assert_same_outputs(jnp.asarray(X))
    assert outputs(pruned.small, jnp.asarray(X)).shape == (3, 3)


def units(axes: Axes, axis: Axis) -> list[frozenset[tuple[int, int]]]:
    """For every unit of an axis, the units of free atoms that it is made of."""
    columns = {atom: axes.labels(axis, atom) for atom in axes.atoms(axis)}
    return [
        frozenset((atom, int(column[i])) for atom, column in columns.items() if column[i] >= 0)
        for i in range(axes.size(axis))
    ]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_what_is_taken_are_these_units(sizes: list[int], data: st.DataObject) -> None:
    axes = Axes()
    axis = tuple(segment for n in sizes for segment in axes.fresh(n))
    total = axes.size(axis)
    index = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=6)))
    taken = axes.take(axis, index, "taken")
    before = units(axes, axis)
    assert units(axes, taken) == [before[i] for i in index]
    again = np.array(data.draw(st.lists(st.integers(0, len(index) - 1), min_size=1, max_size=6)))
    twice = axes.take(taken, again, "taken again")
    before = units(axes, axis)
    assert units(axes, twice) == [before[i] for i in index[again]]
    position = data.draw(st.integers(0, len(index)))
    left, right = axes.cut(taken, position, "cut")
    assert units(axes, left) + units(axes, right) == units(axes, taken)


@given(st.integers(2, 6), st.data())
def test_units_that_meet_in_other_orders_are_one(size: int, data: st.DataObject) -> None:
    axes = Axes()
    axis = axes.fresh(size)
    orders = [np.array(data.draw(st.permutations(range(size)))) for _ in range(2)]
    first, second = (axes.take(axis, order, "taken") for order in orders)
    axes.unify(first, second, "same")
    assert units(axes, first) == units(axes, second)
    before = units(axes, axis)
    assert all(before[i] == before[j] for i, j in zip(*orders))
    # Nothing is coupled but what these pairs couple.
    labels = list(range(size))
    for _ in range(size):
        for i, j in zip(*orders):
            labels[i] = labels[j] = min(labels[i], labels[j])
    assert len(set(before)) == len(set(labels))
    kept = {atom: np.arange(axes.atom_size(atom)) % 2 == 0 for atom in axes.atoms(axis)}
    keep, found = axes.keep(first, kept), {}
    axes.infer(first, keep, found)
    assert np.array_equal(axes.keep(axis, found), axes.keep(axis, kept))
    assert np.array_equal(
        axes.places(axis, {a: np.flatnonzero(k) for a, k in kept.items()}),
        np.flatnonzero(axes.keep(axis, kept)),
    )
    assert (
        sum(c * int(np.prod([axes.atom_size(a) for a in atoms])) for c, atoms in axes.monomials(axis)) == size
    )

"""Channels in another order: the same function, n:m patterns that keep more of it, and orders close to the best there is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sculpt
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import max_difference
from sculpt.pruning.permutation import best_order
from sculpt.pruning.space import make_choices
from tests.networks import NETWORKS, network, traced

IMAGES = jax.random.normal(jax.random.key(11), (4, 8, 8, 3))


def retained(model: Model, trace: sculpt.Trace, label: str) -> np.ndarray:
    """Share of the energy that every site keeps under the option of that label."""
    space = sculpt.make_space(trace, ("nm",))
    choices = make_choices(space, model.params)
    found = [
        float(choices[site.index].retained[[o.label for o in site.options].index(label)])
        for site in space.sites
        if label in [option.label for option in site.options]
    ]
    return np.asarray(found)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.fast("biased")
def test_the_function_stays_the_same_and_two_of_four_keeps_more(name: str) -> None:
    model = network(name)
    moved = sculpt.permute_channels(model, traced(name), jax.random.key(0))
    assert max_difference(model, moved, IMAGES) <= 1e-5
    before, after = (retained(m, traced(name), "2:4") for m in (model, moved))
    # Six channels, and joined ones, cannot go in fours.
    assert after.mean() > before.mean() + 0.01 or (
        name in ("biased", "concatenated") and (after == before).all()
    )


@pytest.mark.slow
def test_training_goes_on_alike() -> None:
    model = network("residual")
    moved = sculpt.permute_channels(model, traced("residual"), jax.random.key(0))
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(*map(jax.tree.leaves, (model.state, moved.state)))
    )
    first, second = (m.apply_train(m.params, m.state, IMAGES, jax.random.key(1)) for m in (model, moved))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-4, atol=1e-5)
    again = sculpt.permute_channels(model, traced("residual"), jax.random.key(0))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (moved.params, again.params))))


def test_channels_that_the_program_itself_tells_apart_stay() -> None:
    """By an array that it holds, or by their numbers."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {name: jax.random.normal(key, (8, 8)) for name, key in zip("abcd", keys)}
    held = jnp.arange(8.0)[None]

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ params["a"]) * held
        x = jnp.tanh(x @ params["b"]) + jnp.arange(8.0)[None]
        return jnp.tanh(x @ params["c"]) @ params["d"]

    model, x = sculpt.from_function(apply, params), jax.random.normal(jax.random.key(1), (3, 8))
    moved = sculpt.permute_channels(model, sculpt.trace(model, x), jax.random.key(0))
    assert max_difference(model, moved, x) <= 1e-5
    changed = {name for name in params if (params[name] != moved.params[name]).any()}
    assert changed == {"c", "d"}


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6))
def test_orders_are_as_good_as_the_best_of_eight_channels(seed: int, kept: int, rows: int) -> None:
    """Within a tenth of it, and never worse than the order that there was."""
    rng = np.random.default_rng(seed)
    energy = np.square(rng.normal(size=(8, rows))).astype(np.float32)

    def worth(order: np.ndarray) -> float:
        return float(np.sort(energy[order].reshape(2, 4, rows), axis=1)[:, 4 - kept :].sum())

    order = best_order(energy, kept, 4, rng)
    assert sorted(order.tolist()) == list(range(8))
    firsts = [[0, *rest] for rest in itertools.combinations(range(1, 8), 3)]
    best = max(worth(np.asarray([*first, *(i for i in range(8) if i not in first)])) for first in firsts)
    assert worth(order) >= max(worth(np.arange(8)), 0.9 * best) * (1 - 1e-6)


def test_orders_find_what_was_shuffled() -> None:
    """Of every four channels two are zero, but they do not lie together any more."""
    rng = np.random.default_rng(0)
    stay = rng.permuted(np.tile([[1], [1], [0], [0]], (16, 1, 6)), axis=1).reshape(64, 6)
    energy = (stay * np.square(rng.normal(size=(64, 6)))).astype(np.float32)[rng.permutation(64)]

    def share(order: np.ndarray) -> float:
        return float(np.sort(energy[order].reshape(16, 4, 6), axis=1)[:, 2:].sum() / energy.sum())

    assert share(np.arange(64)) < 0.98 and share(best_order(energy, 2, 4, rng)) > 0.999


@pytest.mark.parametrize("pattern", [(4, 4), (0, 4), (1.0, 2), (3, 2)])
def test_bad_patterns_are_refused(pattern: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 < n < m"):
        sculpt.permute_channels(network("plain"), traced("plain"), jax.random.key(0), pattern=pattern)

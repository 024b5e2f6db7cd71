"""Credit of sites: what is left of a score when others have had their share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents import credit

SITES, OPTIONS = 5, 4
add = jax.jit(credit.update_credit, static_argnums=(3, 4))
explain = jax.jit(credit.contributions, static_argnums=(2, 3))
share_out = jax.jit(credit.site_advantages)


@functools.partial(jax.jit, static_argnums=1)
def batch(seed: int, number: int = 32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Policies, scores of a separable table, and what each site's choice contributes."""
    table = jax.random.normal(jax.random.key(99), (SITES, OPTIONS))
    policies = jax.random.randint(jax.random.key(seed), (number, SITES), 0, OPTIONS, jnp.int32)
    own = jnp.take_along_axis(table[None], policies[:, :, None], axis=2)[:, :, 0]
    return policies, own.sum(axis=1) + 3.0, own


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    scores = jnp.asarray([1.0, 2.0, 6.0])
    np.testing.assert_allclose(credit.leave_one_out(scores), [1 - 4, 2 - 3.5, 6 - 1.5], rtol=1e-6)
    assert credit.leave_one_out(jnp.asarray([5.0]))[0] == 0.0


def test_standardise_survives_equal_values() -> None:
    np.testing.assert_array_equal(credit.standardise(jnp.full((4, 3), 7.0)), np.zeros((4, 3)))
    spread = np.asarray(credit.standardise(jnp.arange(12.0).reshape(4, 3)))
    np.testing.assert_allclose([spread.mean(), spread.std()], [0, 1], atol=1e-5)


@pytest.mark.slow
def test_the_regression_finds_the_contributions() -> None:
    state = credit.init_credit(SITES, OPTIONS)
    for seed in range(20):
        policies, scores, _ = batch(seed)
        state = add(state, policies, scores, OPTIONS)
    policies, _, own = batch(50)
    found = np.asarray(explain(state, policies, OPTIONS))
    for site in range(SITES):
        assert np.corrcoef(found[:, site], own[:, site])[0, 1] > 0.99


def test_sites_are_told_apart() -> None:
    state = credit.init_credit(SITES, OPTIONS)
    for seed in range(20):
        state = add(state, *batch(seed)[:2], OPTIONS)
    policies, scores, own = batch(50)
    shared = credit.leave_one_out(scores)
    found = explain(state, policies, OPTIONS)
    with_credit = np.asarray(share_out(shared, found))
    without = np.asarray(share_out(shared, jnp.zeros_like(found)))
    centred = np.asarray(own - own.mean(axis=0, keepdims=True))
    assert np.corrcoef(with_credit.ravel(), centred.ravel())[0, 1] > 0.97
    assert np.corrcoef(without.ravel(), centred.ravel())[0, 1] < 0.7
    np.testing.assert_allclose([with_credit.mean(), with_credit.std()], [0, 1], atol=1e-4)


def test_old_batches_fade() -> None:
    policies, scores, _ = batch(0)
    state = add(credit.init_credit(SITES, OPTIONS), policies, scores, OPTIONS)
    later = add(state, policies, scores, OPTIONS, 0.5)
    np.testing.assert_allclose(later.weight, 1.5 * state.weight)
    np.testing.assert_allclose(later.gram, 1.5 * state.gram)
    np.testing.assert_allclose(later.moment, 1.5 * state.moment, rtol=1e-5)


def test_constant_scores_give_no_credit() -> None:
    policies, scores, _ = batch(0)
    flat = jnp.full_like(scores, 0.3)
    state = add(credit.init_credit(SITES, OPTIONS), policies, flat, OPTIONS)
    found = explain(state, policies, OPTIONS)
    np.testing.assert_allclose(found, 0.0, atol=1e-5)
    assert np.isfinite(share_out(credit.leave_one_out(flat), found)).all()

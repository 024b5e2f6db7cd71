"""Probabilities of actions, on spaces small enough to be enumerated."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents import distributions

VALID = jnp.asarray([[True, True, True], [True, True, False]])
COST = jnp.asarray([[1.0, 0.7, 0.4], [1.0, 0.6, 0.0]])
EVERY = jnp.asarray(list(itertools.product(range(3), range(2))), jnp.int32)


@jax.jit
def some_logits(seed: int = 0) -> jax.Array:
    logits = 2.0 * jax.random.normal(jax.random.key(seed), VALID.shape)
    return distributions.mask_invalid(logits, VALID)


def test_correctness_12_probabilities_sum_to_one_on_an_enumerable_space() -> None:
    for price in (0.0, 3.0, -2.0):
        logits = distributions.at_price(some_logits()[None], jnp.asarray([price]), COST)
        joint = distributions.log_prob(jnp.tile(logits, (len(EVERY), 1, 1)), EVERY).sum(axis=1)
        np.testing.assert_allclose(jnp.exp(joint).sum(), 1.0, atol=1e-6)
        invalid = distributions.log_prob(logits, jnp.asarray([[0, 2]], jnp.int32))
        assert np.exp(invalid[0, 1]) == 0.0


def test_correctness_12_score_function_gradient_is_the_exact_gradient() -> None:
    worth = jax.random.normal(jax.random.key(1), (len(EVERY),))
    price = jnp.full(len(EVERY), 1.3)

    def log_joint(logits: jax.Array) -> jax.Array:
        tiled = jnp.tile(distributions.mask_invalid(logits, VALID)[None], (len(EVERY), 1, 1))
        return distributions.log_prob(distributions.at_price(tiled, price, COST), EVERY).sum(axis=1)

    logits = some_logits()
    exact = jax.grad(lambda x: jnp.sum(jnp.exp(log_joint(x)) * worth))(logits)
    probabilities = jnp.exp(log_joint(logits))
    score = jax.grad(lambda x: jnp.sum(probabilities * worth * log_joint(x)))(logits)
    np.testing.assert_allclose(score, exact, atol=1e-6)
    assert np.abs(exact).max() > 1e-3


def test_the_executed_action_is_a_sample_of_the_priced_distribution() -> None:
    # The projection executes argmax(logits + gumbel - price * cost): at a given price that is this distribution.
    logits, price = some_logits(), 2.0
    noise = jax.random.gumbel(jax.random.key(2), (20_000, *logits.shape))
    drawn = np.asarray(jnp.argmax(logits[None] + noise - price * COST[None], axis=-1))
    priced = distributions.at_price(logits[None], jnp.asarray([price]), COST)
    expected = np.asarray(jax.nn.softmax(priced[0]))
    for site in range(2):
        share = np.bincount(drawn[:, site], minlength=3) / len(drawn)
        np.testing.assert_allclose(share, expected[site], atol=0.015)


def test_the_price_is_held_constant() -> None:
    def total(price: jax.Array) -> jax.Array:
        priced = distributions.at_price(some_logits()[None], price, COST)
        return distributions.log_prob(priced, EVERY[:1]).sum()

    assert jax.grad(total)(jnp.asarray([1.0]))[0] == 0.0


def test_entropy_and_samples() -> None:
    uniform = distributions.mask_invalid(jnp.zeros(VALID.shape), VALID)[None]
    np.testing.assert_allclose(distributions.entropy(uniform)[0], np.log([3, 2]), rtol=1e-6)
    gradient = jax.grad(lambda x: distributions.entropy(x).sum())(uniform)
    assert np.isfinite(gradient).all()
    drawn = np.asarray(distributions.sample(jnp.tile(uniform, (3000, 1, 1)), jax.random.key(0)))
    assert drawn.dtype == np.int32
    np.testing.assert_allclose(np.bincount(drawn[:, 1], minlength=3) / 3000, [0.5, 0.5, 0], atol=0.05)

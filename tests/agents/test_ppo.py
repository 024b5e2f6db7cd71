"""The learning step: ratios, advantages, bootstrapping, and that everything trainable is trained."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents import distributions, ppo
from sculpt.agents.actor_critic import forward
from sculpt.agents.config import SearchConfig
from sculpt.agents.credit import init_credit
from sculpt.agents.environment import StepInfo
from sculpt.agents.rollout import Rollout
from tests.agents.toys import SMALL, batched, toy_space, toy_state

CONFIG = SearchConfig(evaluations=64, batch_size=8, agent=SMALL)
NUMBER = 8


@functools.cache
def rollout(rounds: int = 1) -> Rollout:
    """Random policies at random prices, with the log-probabilities that the agent of `toy_state` gives them."""
    agent, params, graph, sites = toy_state()
    space = toy_space()
    number = rounds * NUMBER
    graphs = batched(graph, 1 if rounds == 1 else number)
    rng = np.random.default_rng(0)
    options = (rng.random((number, space.num_sites)) * space.num_options).astype(np.int32)
    prices = jnp.asarray(rng.normal(size=number) * 3, jnp.float32)

    @jax.jit
    def log_probs(params: dict) -> jax.Array:
        logits, _ = forward(agent, params, graphs, sites)
        logits = jnp.broadcast_to(logits, (number, *logits.shape[1:]))
        return distributions.log_prob(
            distributions.at_price(logits, prices, sites.cost), jnp.asarray(options)
        )

    shape = (rounds, NUMBER)
    rewards = jnp.asarray(rng.random(shape), jnp.float32)
    return Rollout(
        graphs=graphs,
        policies=jnp.asarray(options).reshape(*shape, -1),
        prices=prices.reshape(shape),
        log_probs=log_probs(params).reshape(*shape, -1),
        values=jnp.asarray(rng.random((rounds + 1, NUMBER)), jnp.float32),
        rewards=rewards,
        continues=jnp.ones(shape),
        info=StepInfo(rewards, rewards, rewards, rewards),
    )


@functools.partial(jax.jit, static_argnums=0)
def prepared(config: SearchConfig, rollout: Rollout) -> tuple[ppo.Experience, jax.Array]:
    """The batch of a rollout, and what the per-site regression explains."""
    space = toy_space()
    batch, _, explained = ppo.prepare(
        config, rollout, init_credit(space.num_sites, space.max_options), space.max_options
    )
    return batch, explained


@functools.partial(jax.jit, static_argnums=0)
def loss(config: SearchConfig, params: dict, batch: ppo.Experience) -> tuple[jax.Array, dict[str, jax.Array]]:
    agent, _, _, sites = toy_state()
    weight = jnp.float32(config.entropy)
    return ppo.ppo_loss(params, agent, batch, sites, config, weight)


@functools.partial(jax.jit, static_argnums=0)
def learn(config: SearchConfig, params: dict, batch: ppo.Experience) -> tuple[dict, dict[str, jax.Array]]:
    agent, _, _, sites = toy_state()
    state = ppo.make_optimizer(config).init(params)
    weight = ppo.entropy_weight(config, jnp.int32(0))
    params, _, measured = ppo.learn(params, state, agent, batch, sites, config, weight)
    return params, measured


@pytest.mark.slow
def test_correctness_12_ratio_before_the_first_update_is_one() -> None:
    batch, _ = prepared(CONFIG, rollout())
    _, measured = loss(CONFIG, toy_state()[1], batch)
    assert abs(float(measured["kl"])) < 1e-6
    assert measured["clip_fraction"] == 0.0
    agent, params, _, sites = toy_state()
    stored = rollout()

    @jax.jit
    def ratios(params: dict) -> jax.Array:
        logits, _ = forward(agent, params, stored.graphs, sites)
        logits = jnp.broadcast_to(logits, (NUMBER, *logits.shape[1:]))
        priced = distributions.at_price(logits, stored.prices[0], sites.cost)
        return jnp.exp(distributions.log_prob(priced, stored.policies[0]) - stored.log_probs[0])

    np.testing.assert_allclose(ratios(params), 1.0, atol=1e-6)


@pytest.mark.slow
def test_correctness_15_every_trainable_leaf_gets_an_update() -> None:
    batch, _ = prepared(CONFIG, rollout())
    before = toy_state()[1]
    after, _ = learn(CONFIG, before, batch)
    paths = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before, after)
    )
    assert [jax.tree_util.keystr(path) for path, change in paths if not change > 0] == []


@pytest.mark.slow
def test_correctness_15_the_critic_fits_constants_of_any_size() -> None:
    agent, params, graph, sites = toy_state()
    config = dataclasses.replace(CONFIG, epochs=600, learning_rate=3e-2, entropy=0.0)
    batch, _ = prepared(CONFIG, rollout())
    for target in (-37.0, 90.0):
        fitted, _ = learn(config, params, dataclasses.replace(batch, returns=jnp.full(NUMBER, target)))
        _, value = jax.jit(functools.partial(forward, agent))(fitted, batched(graph, 1), sites)
        np.testing.assert_allclose(value[0], target, rtol=0.05)


@pytest.mark.slow
def test_the_critic_does_not_shape_the_actor() -> None:
    batch, _ = prepared(CONFIG, rollout())
    params = toy_state()[1]
    far = dataclasses.replace(batch, returns=batch.returns + 1000.0)
    near, away = learn(CONFIG, params, batch)[0], learn(CONFIG, params, far)[0]
    for part in ("encoder", "actor"):
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), near[part], away[part])))


@pytest.mark.slow
def test_correctness_15_gae_equals_a_hand_computed_case() -> None:
    rewards, continues = jnp.asarray([[1.0], [2.0], [3.0]]), jnp.ones((3, 1))
    values = jnp.asarray([[0.5], [1.0], [1.5], [4.0]])
    # delta = r + 0.9 * v' - v: 1.4, 2.35, 5.1 (the last one bootstraps from 4); lambda * discount = 0.45
    expected = [1.4 + 0.45 * (2.35 + 0.45 * 5.1), 2.35 + 0.45 * 5.1, 5.1]
    found = ppo.generalised_advantages(rewards, values, continues, discount=0.9, gae_lambda=0.5)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    ended = ppo.generalised_advantages(rewards, values, continues.at[2].set(0.0), 0.9, 0.5)
    np.testing.assert_allclose(ended[2, 0], 3.0 - 1.5, rtol=1e-6)  # a true end is not bootstrapped


@pytest.mark.slow
def test_each_round_is_measured_against_its_own_round() -> None:
    # Where all policies are one, the regression explains nothing, and only the comparison is left.
    twice = dataclasses.replace(rollout(2), policies=jnp.zeros_like(rollout(2).policies))
    lifted = dataclasses.replace(twice, rewards=twice.rewards.at[1].add(5.0))
    config = dataclasses.replace(CONFIG, rounds=2)
    before, after = (prepared(config, played)[0] for played in (twice, lifted))
    assert np.abs(before.advantages).max() > 0.1
    np.testing.assert_allclose(after.advantages, before.advantages, atol=1e-4)
    np.testing.assert_allclose(after.returns, np.asarray(lifted.rewards).ravel(), rtol=1e-6)


def test_better_samples_get_higher_advantages() -> None:
    batch, _ = prepared(CONFIG, rollout())
    mean = np.asarray(batch.advantages).mean(axis=1)
    assert np.corrcoef(mean, np.asarray(rollout().rewards)[0])[0, 1] > 0.5


@pytest.mark.parametrize("change", [{"discount": 0.9}, {"discount": 0.9, "gae_lambda": 0.3}])
def test_discount_and_lambda_change_the_advantages(change: dict) -> None:
    config = dataclasses.replace(CONFIG, rounds=2)
    less = dict(list(change.items())[:-1])
    plain = prepared(dataclasses.replace(config, **less), rollout(2))[0].advantages
    changed = prepared(dataclasses.replace(config, **change), rollout(2))[0].advantages
    assert np.abs(np.asarray(plain - changed)).max() > 1e-3


@pytest.mark.slow
def test_clip_ratio_and_entropy_change_the_loss() -> None:
    batch, _ = prepared(CONFIG, rollout())
    rng = np.random.default_rng(0)
    noise = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), toy_state()[1]
    )
    moved = jax.tree.map(jnp.add, toy_state()[1], noise)
    losses = [
        float(loss(dataclasses.replace(CONFIG, **change), moved, batch)[0])
        for change in ({}, {"clip_ratio": 0.4}, {"entropy": 0.5})
    ]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("change", [{"epochs": 2}, {"learning_rate": 1e-4}])
@pytest.mark.slow
def test_epochs_and_learning_rate_change_the_step(change: dict) -> None:
    batch, _ = prepared(CONFIG, rollout())
    params = toy_state()[1]
    plain, changed = (
        learn(CONFIG, params, batch)[0],
        learn(dataclasses.replace(CONFIG, **change), params, batch)[0],
    )
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), plain, changed)
    assert max(jax.tree.leaves(differences)) > 1e-4


@pytest.mark.slow
def test_epochs_end_at_the_limit_of_the_divergence() -> None:
    batch, _ = prepared(CONFIG, rollout())
    params = toy_state()[1]
    unlimited, every = learn(CONFIG, params, batch)
    assert every["epochs"] == CONFIG.epochs
    # The first epoch starts where the policies were drawn: it is always done.
    halted, measured = learn(dataclasses.replace(CONFIG, kl_limit=1e-7), params, batch)
    once, _ = learn(dataclasses.replace(CONFIG, epochs=1), params, batch)
    assert measured["epochs"] == 1.0 and measured["kl"] > 1e-7
    # Adam makes a step of the gradients that are nothing but rounding, too: a tenth of a step apart is the same.
    near = functools.partial(np.testing.assert_allclose, rtol=0.0, atol=0.1 * CONFIG.learning_rate)
    jax.tree.map(near, halted, once)
    far, measured = learn(dataclasses.replace(CONFIG, kl_limit=1e3), params, batch)
    assert measured["epochs"] == CONFIG.epochs
    jax.tree.map(near, far, unlimited)
    with pytest.raises(AssertionError):
        jax.tree.map(near, halted, unlimited)


def test_the_weight_of_the_entropy_goes_from_first_to_last() -> None:
    config = dataclasses.replace(CONFIG, entropy=0.06, final_entropy=0.02)
    assert config.updates == 8
    weights = [float(ppo.entropy_weight(config, jnp.int32(done))) for done in range(8)]
    np.testing.assert_allclose(weights, np.linspace(0.06, 0.02, 8), rtol=1e-6)
    assert float(ppo.entropy_weight(CONFIG, jnp.int32(5))) == pytest.approx(CONFIG.entropy)


@pytest.mark.slow
def test_learning_makes_good_actions_likelier() -> None:
    agent, params, _, sites = toy_state()
    batch, _ = prepared(CONFIG, rollout())
    after, measured = learn(dataclasses.replace(CONFIG, entropy=0.0), params, batch)

    @jax.jit
    def gain(params: dict) -> jax.Array:
        logits, _ = forward(agent, params, batch.rollout.graphs, sites)
        logits = jnp.broadcast_to(logits, (NUMBER, *logits.shape[1:]))
        priced = distributions.at_price(logits, batch.rollout.prices[0], sites.cost)
        return jnp.sum(distributions.log_prob(priced, batch.rollout.policies[0]) * batch.advantages)

    assert gain(after) > gain(params)
    assert 0.0 <= measured["clip_fraction"] <= 1.0
    assert measured["kl"] >= 0.0


def test_explained_variance() -> None:
    targets = jnp.asarray([1.0, 2.0, 3.0])
    assert ppo.explained_variance(targets, targets) == 1.0
    np.testing.assert_allclose(ppo.explained_variance(targets, jnp.full(3, 2.0)), 0.0, atol=1e-6)
    assert ppo.explained_variance(jnp.ones(3), targets) == 0.0

"""The environment: gymnax's shape, rewards of the network itself, a shared archive."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.environment import EnvParams, EnvState, PruningEnv
from sculpt.agents.observation import to_graph
from sculpt.pruning.budget import random_policies
from sculpt.pruning.costs import cost
from sculpt.scoring.evaluation import evaluate_policies
from sculpt.scoring.problem import make_problem
from sculpt.scoring.rewards import RewardConfig
from tests.agents.toys import toy_model, toy_space, toy_splits

NUMBER = 4


@pytest.fixture(scope="module")
def images() -> tuple[jax.Array, jax.Array]:
    train = toy_splits().train
    return jnp.asarray(train.images[:48] / np.float32(255)), jnp.asarray(train.labels[:48])


@pytest.fixture(scope="module")
def params(images: tuple[jax.Array, jax.Array]) -> EnvParams:
    return EnvParams(make_problem(toy_model(), toy_space(), *images), jnp.asarray([0.5]))


@pytest.fixture(scope="module")
def actions() -> jax.Array:
    return random_policies(toy_space(), jax.random.key(0), NUMBER)


@functools.partial(jax.jit, static_argnums=0)
def step(env: PruningEnv, state: EnvState, actions: jax.Array, params: EnvParams):
    return env.step(jax.random.key(0), state, actions, params)


@functools.partial(jax.jit, static_argnums=0)
def reset(env: PruningEnv, params: EnvParams):
    return env.reset(jax.random.key(0), params)


@pytest.mark.slow
def test_an_episode(params: EnvParams, actions: jax.Array, images: tuple[jax.Array, jax.Array]) -> None:
    env = PruningEnv(toy_space(), NUMBER, rounds=2)
    graphs, state = reset(env, params)
    dense = to_graph(toy_space(), params.problem.params, None, 0.5)
    np.testing.assert_allclose(graphs.nodes, np.tile(dense.nodes[None], (NUMBER, 1, 1)), atol=1e-6)
    graphs, state, rewards, terminated, truncated, info = step(env, state, actions, params)
    scores = evaluate_policies(toy_model(), toy_space(), actions, *images)
    np.testing.assert_allclose(info.accuracy, scores.accuracy)
    np.testing.assert_allclose(info.loss, scores.loss, rtol=1e-5)
    np.testing.assert_allclose(info.used, cost(toy_space(), actions).macs_ratio, rtol=1e-6)
    np.testing.assert_array_equal(rewards, info.accuracy)
    assert not terminated.any() and not truncated.any()
    seen = to_graph(toy_space(), params.problem.params, actions[1], 0.5)
    np.testing.assert_allclose(graphs.nodes[1], seen.nodes, atol=1e-5)  # the assignment is carried forward
    np.testing.assert_allclose(graphs.globals[1], seen.globals, atol=1e-6)
    _, state, again, terminated, truncated, _ = step(env, state, actions, params)
    np.testing.assert_array_equal(again, rewards)
    assert truncated.all() and not terminated.any()  # a cut, not an end
    assert int(state.archive.total) == 2 * NUMBER
    assert int(state.archive.count) == len(np.unique(np.asarray(actions), axis=0))


@pytest.mark.slow
def test_a_new_episode_keeps_the_archive(params: EnvParams, actions: jax.Array) -> None:
    env = PruningEnv(toy_space(), NUMBER)
    start = env.init(16)
    _, state, *_ = step(env, start, actions, params)
    _, state = env.reset(jax.random.key(0), params, state)
    assert int(state.round) == 0 and not np.asarray(state.policy).any()
    assert int(state.archive.count) > 0


@pytest.mark.slow
def test_objective_and_reward_weight_enter(params: EnvParams, actions: jax.Array) -> None:
    plain = PruningEnv(toy_space(), NUMBER)
    by_loss = dataclasses.replace(plain, objective="loss")
    weighed = dataclasses.replace(plain, reward=RewardConfig(kind="lagrangian", weight=3.0))
    tight = dataclasses.replace(params, budget=jnp.asarray([0.05]))
    _, _, rewards, _, _, info = step(plain, plain.init(8), actions, tight)
    np.testing.assert_allclose(step(by_loss, by_loss.init(8), actions, tight)[2], -info.loss, rtol=1e-6)
    _, state, penalised, *_ = step(weighed, weighed.init(8), actions, tight)
    excess = np.maximum(np.asarray(info.used) - 0.05, 0)
    np.testing.assert_allclose(penalised, np.asarray(rewards) - 3.0 * excess, atol=1e-5)
    adapted = weighed.adapt(state, info.used, tight, jnp.float32(0.5))
    assert adapted.reward.weight > 3.0

"""Several budgets in one search: one agent learns for all of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.actor_critic import forward
from sculpt.agents.config import SearchConfig
from sculpt.agents.credit import leave_one_out, site_advantages
from sculpt.agents.distributions import at_price, log_prob
from sculpt.agents.environment import PruningEnv
from sculpt.agents.learning import TOLERANCE, init_state, make_program, network_of
from sculpt.agents.ppo import prepare
from sculpt.agents.rollout import play
from sculpt.agents.run import set_up
from sculpt.agents.sensitivity import singles
from sculpt.scoring.plan import EvaluationPlan
from tests.agents.test_search import BASE, plain, run
from tests.agents.toys import toy_model, toy_space, toy_splits

FRONT = dataclasses.replace(BASE, front=(0.3, 0.7, 0.9))
NONE_ALONE = singles(toy_space(), 0)


@pytest.mark.slow
def test_every_budget_gets_its_best_policy() -> None:
    found = run(FRONT)
    assert [point.budget for point in found.front] == [0.5, 0.3, 0.7, 0.9]
    for point in found.front:
        assert point.used <= point.budget + TOLERANCE
        dominating = [score for ratio, score, _ in found.pareto if ratio <= point.budget + TOLERANCE]
        assert point.score == pytest.approx(max(dominating))
    by_budget = {point.budget: point for point in found.front}
    np.testing.assert_array_equal(found.policy, by_budget[0.5].policy)
    assert by_budget[0.9].score >= by_budget[0.3].score
    # A quarter of the evaluations for each budget: not much worse than all of them for one.
    assert by_budget[0.5].score > 0.8 * plain().score


@pytest.mark.slow
def test_a_search_for_one_budget_has_a_front_of_one_point() -> None:
    (point,) = plain().front
    np.testing.assert_array_equal(point.policy, plain().policy)
    assert (point.budget, point.score) == (0.5, plain().score)
    assert point.used == pytest.approx(plain().macs_ratio, rel=1e-6)


@pytest.mark.slow
def test_episodes_take_the_budgets_in_turn_and_each_meets_its_own() -> None:
    program, task, _ = set_up(
        toy_model(), toy_space(), toy_splits(), FRONT, jax.random.key(0), EvaluationPlan()
    )
    state = init_state(program, task, jax.random.key(1))
    agent = network_of(FRONT)

    @jax.jit
    def rollout(key: jax.Array):
        return play(agent, state.agent, program.env, task.env, state.env, task.sites, key, True, NONE_ALONE)[
            1
        ]

    played = rollout(jax.random.key(2))
    # Every episode is chosen for by the logits of its own budget.
    seen = np.asarray(played.graphs.globals)[:, 0, 0]
    by_state, _ = forward(agent, state.agent, played.graphs, task.sites)
    for episode, budget in enumerate(np.tile(np.asarray(FRONT.budgets, np.float32), 4)):
        (row,) = np.flatnonzero(seen == budget)
        logits = at_price(by_state[row][None], played.prices[:, episode], task.sites.cost)
        expected = log_prob(logits, played.policies[:, episode])
        np.testing.assert_allclose(played.log_probs[:, episode], expected, atol=1e-4)
    ratios = np.asarray(played.info.used).reshape(-1, 4)
    assert (ratios <= np.asarray(FRONT.budgets) + TOLERANCE).all()
    assert (ratios.mean(axis=0)[1:] > ratios.mean(axis=0)[1]).sum() == 2  # 0.7 and 0.9 are used
    assert played.graphs.nodes.shape[0] == 4  # one state for each budget
    assert len(np.unique(np.asarray(played.graphs.globals)[:, 0, 0])) == 4


def test_policies_are_compared_within_their_budget() -> None:
    key = jax.random.key(0)
    scores = jax.random.normal(key, (6, 2))
    shifted = scores + jnp.asarray([[0.0, 100.0]])  # one budget allows more
    np.testing.assert_allclose(leave_one_out(scores), leave_one_out(shifted), atol=1e-4)
    explained = jax.random.normal(jax.random.key(1), (12, 5))
    np.testing.assert_allclose(
        site_advantages(scores.reshape(12), explained, 2),
        site_advantages(shifted.reshape(12), explained, 2),
        atol=1e-4,
    )


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.slow
def test_learning_compares_policies_within_their_budget(rounds: int) -> None:
    # Reconstructed, the toy says of every image what the dense one does, and all policies are equally good.
    config = dataclasses.replace(BASE, front=(0.3,), rounds=rounds, repair="recalibrate")
    program, task, _ = set_up(
        toy_model(), toy_space(), toy_splits(), config, jax.random.key(0), EvaluationPlan()
    )
    state = init_state(program, task, jax.random.key(1))

    @jax.jit
    def advantages(offset: jax.Array) -> jax.Array:
        key, agent = jax.random.key(2), network_of(config)
        played = play(
            agent, state.agent, program.env, task.env, state.env, task.sites, key, True, NONE_ALONE
        )[1]
        # Where all policies are one, the regression explains nothing, and only the comparison is left.
        alike = jnp.zeros_like(played.policies)
        played = dataclasses.replace(played, policies=alike, rewards=played.rewards + offset[None])
        return prepare(config, played, state.credit, toy_space().max_options, 2)[0].advantages

    before, after = advantages(jnp.zeros(16)), advantages(jnp.asarray([0.0, 100.0] * 8))
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(before, after, atol=1e-3)


@pytest.mark.slow
def test_the_batch_is_shared_out() -> None:
    assert SearchConfig(front=(0.3, 0.7)).batch == 30
    assert SearchConfig(front=(0.3,), evaluations=5).batch == 4
    for evaluations in range(16, 2300, 31):
        for front in ((), (0.3,), (0.3, 0.7), (0.3, 0.7, 0.9)):
            config = SearchConfig(evaluations=evaluations, front=front)
            inside = make_program(PruningEnv(toy_space(), config.batch), config).config
            assert (inside.batch, inside.updates) == (config.batch, config.updates)
    found = run(dataclasses.replace(FRONT, front=(0.3, 0.7), batch_size=None, evaluations=90))
    assert [row["evaluations"] for row in found.history] == [30.0, 60.0, 90.0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"front": (0.5,)}, "distinct budgets"),
        ({"front": (0.3, 0.3 + 1e-12)}, "distinct budgets"),
        ({"front": (1.5,)}, "in .0, 1."),
        ({"front": (0.3, 0.7), "batch_size": 16}, "multiple of 3"),
        ({"front": (0.3,), "method": "random"}, "needs method='agent' or 'table'"),
    ],
)
def test_impossible_fronts_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SearchConfig(**fields)

"""Several seeds in one program: each finds what it would have found by itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.config import AgentConfig, Method, SearchConfig
from sculpt.agents.environment import Scorer
from sculpt.agents.learning import init_state, snapshot, update
from sculpt.agents.rerank import Referee
from sculpt.agents.run import set_up
from sculpt.agents.seeds import search_seeds
from sculpt.pruning.budget import random_policies
from sculpt.scoring.evaluation import score_policies
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.problem import Problem, make_problem
from tests.agents.toys import SMALL, TableScorer, toy_model, toy_space, toy_splits
from tests.networks import slow_but

BASE = SearchConfig(
    budget=0.5,
    evaluations=128,
    batch_size=16,
    rerank=0,
    agent=SMALL,
    score_images=16,
    calibration_images=8,
    repair="recalibrate",
)
PLAN = EvaluationPlan()


def together(config: SearchConfig, seeds: int, scorer: Scorer = score_policies):
    return search_seeds(
        toy_model(), toy_space(), toy_splits(), config, jax.random.key(0), seeds, scorer=scorer
    )


def one_by_one(config: SearchConfig, seeds: int, scorer: Scorer = score_policies):
    """The states behind the last update, each seed's updates done by themselves."""
    data_key, init_key, update_key, _ = jax.random.split(jax.random.key(0), 4)
    program, task, _ = set_up(toy_model(), toy_space(), toy_splits(), config, data_key, PLAN, scorer)
    keys = zip(jax.random.split(init_key, seeds), jax.random.split(update_key, seeds))
    states = []
    for begin, key in keys:
        state = snapshot(init_state(program, task, begin))
        for _ in range(config.updates):
            state = update(program, task, state, key)
        states.append(state)
    return states


@slow_but(
    "agent",
    "lamp",
    "greedy",
    among=("agent", "table", "random", "lamp", "greedy", "evolution"),
    argument="method",
)
@pytest.mark.fast("lamp")
def test_every_seed_finds_what_it_finds_by_itself(method: Method) -> None:
    agent = SMALL if method == "agent" else AgentConfig()
    config = dataclasses.replace(BASE, method=method, agent=agent)
    scorer = TableScorer()
    for found, state in zip(together(config, 3, scorer), one_by_one(config, 3, scorer), strict=True):
        archive = state.env.archive
        assert found.unique_evaluations == int(archive.count)
        assert found.evaluations == config.evaluations
        np.testing.assert_allclose(
            [row["mean_reward"] for row in found.history], state.metrics["mean_reward"], atol=1e-5
        )
        met = (archive.used <= config.budget + 1e-5) & (np.arange(len(archive.used)) < archive.count)
        best = np.argmax(np.where(met, archive.accuracy, -np.inf))
        np.testing.assert_array_equal(found.policy, archive.policies[best])


@pytest.mark.slow
def test_seeds_are_not_alike_and_the_key_decides() -> None:
    first, second = together(BASE, 2, TableScorer())
    assert [row["mean_reward"] for row in first.history] != [row["mean_reward"] for row in second.history]
    for again, found in zip(together(BASE, 2, TableScorer()), (first, second), strict=True):
        np.testing.assert_array_equal(again.policy, found.policy)
        assert again.score == found.score


@pytest.mark.slow
def test_networks_are_scored_as_in_a_search_alone() -> None:
    config = dataclasses.replace(BASE, evaluations=32)
    for found, state in zip(together(config, 2), one_by_one(config, 2), strict=True):
        np.testing.assert_allclose(
            [row["mean_accuracy"] for row in found.history], state.metrics["mean_accuracy"], atol=1e-6
        )


@pytest.mark.slow
def test_a_policy_on_several_shortlists_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[bytes] = []

    def judge(self: Referee, policy: np.ndarray) -> float:
        judged.append(policy.tobytes())
        return float(policy.sum())

    monkeypatch.setattr(Referee, "judge", judge)
    config = dataclasses.replace(BASE, rerank=4, method="lamp", agent=AgentConfig())
    results = together(config, 3, TableScorer())
    assert len(judged) == 1 and len(results) == 3
    config = dataclasses.replace(BASE, rerank=4)
    judged.clear()
    for result in together(config, 3, TableScorer()):
        assert result.validation_accuracy == float(result.policy.sum())
        assert result.policy.tobytes() in judged
    assert len(judged) == len(set(judged)) > 4


@functools.cache
def problem(seed: int, plan: EvaluationPlan = PLAN) -> Problem:
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(12, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 5, 12)
    return make_problem(toy_model(), toy_space(), images, labels, None, plan, "recalibrate")


POLICIES = [random_policies(toy_space(), jax.random.key(seed), 5, 0.6) for seed in range(3)]


@pytest.mark.parametrize(
    "plan", [PLAN, EvaluationPlan(policies_per_chunk=4), EvaluationPlan(policy_shards=2)]
)
@pytest.mark.slow
def test_what_is_asked_for_is_scored_under_vmap(plan: EvaluationPlan) -> None:
    policies, counts = jnp.stack([jnp.asarray(p) for p in POLICIES]), jnp.asarray([5, 0, 2])
    score = jax.jit(functools.partial(score_policies, problem(0, plan)))
    mapped = jax.jit(jax.vmap(functools.partial(score_policies, problem(0, plan))))(policies, counts)
    for row, (rows, count) in enumerate(zip(POLICIES, counts.tolist(), strict=True)):
        alone = score(jnp.asarray(rows), jnp.int32(count))
        np.testing.assert_allclose(mapped.loss[row, :count], alone.loss[:count], rtol=1e-5)
        np.testing.assert_array_equal(mapped.accuracy[row, :count], alone.accuracy[:count])


@pytest.mark.slow
def test_batches_with_images_of_their_own_are_scored_in_turn() -> None:
    problems = [problem(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    mapped = jax.jit(jax.vmap(lambda p, rows: score_policies(p, rows)))(
        stacked, jnp.stack([jnp.asarray(p) for p in POLICIES])
    )
    for row, (own, rows) in enumerate(zip(problems, POLICIES, strict=True)):
        np.testing.assert_allclose(mapped.loss[row], score_policies(own, jnp.asarray(rows)).loss, rtol=1e-5)


def test_no_convolution_is_grouped_under_vmap() -> None:
    """`vmap` over kernels is a grouped convolution, ten times as slow on CPUs."""
    policies = jnp.stack([jnp.asarray(p) for p in POLICIES])
    program = str(jax.make_jaxpr(jax.vmap(functools.partial(score_policies, problem(0))))(policies))
    assert "conv_general_dilated" in program and "feature_group_count=1\n" in program
    assert "feature_group_count=3" not in program and "batch_group_count=3" not in program


@pytest.mark.parametrize("seeds", [0, -1, 2.0, True, "three"])
def test_a_number_of_seeds_is_asked_for(seeds: object) -> None:
    with pytest.raises(ValueError, match="seeds must be a whole number of at least 1, got"):
        together(BASE, seeds, TableScorer())  # type: ignore[arg-type]


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="budget"):
        together(dataclasses.replace(BASE, budget=1e-4), 2)
    with pytest.raises(ValueError, match="greedy"):
        together(
            dataclasses.replace(BASE, method="greedy", agent=AgentConfig(), evaluations=8, batch_size=8), 2
        )

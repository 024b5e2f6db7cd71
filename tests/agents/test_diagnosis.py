"""A search that has learned nothing says so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sculpt.agents.config import SearchConfig
from sculpt.agents.diagnosis import best_by_luck, doubt
from tests.agents.test_search import BASE, plain, run


@pytest.mark.parametrize("draws", [2, 32, 512])
def test_the_best_by_luck_is_that_of_many_draws(draws: int) -> None:
    drawn = np.random.default_rng(0).normal(0.4, 0.1, (4000, draws)).max(axis=1)
    assert best_by_luck(0.4, 0.1, draws) == pytest.approx(drawn.mean(), abs=0.01)
    assert best_by_luck(0.4, 0.0, draws) == 0.4


@pytest.mark.slow
def test_an_agent_that_learns_is_not_doubted() -> None:
    for seed in range(3):
        assert plain("agent", seed).doubt is None


@pytest.mark.slow
def test_an_agent_that_cannot_learn_is() -> None:
    frozen = dataclasses.replace(BASE, learning_rate=1e-9)
    assert any("learning has found nothing" in (run(frozen, seed).doubt or "") for seed in range(4))


def test_a_rise_of_the_mean_or_a_best_beyond_luck_is_learning() -> None:
    def history(late: float, best: float) -> list[dict[str, float]]:
        means = [0.5, 0.5, 0.5, late]
        rows = [{"evaluations": 32.0 * (i + 1), "mean_reward": mean} for i, mean in enumerate(means)]
        # Single sites keep nearly everything: what follows is no fall.
        alone = {"evaluations": 0.0, "mean_reward": 0.9, "reward_spread": 0.01, "single_sites": 32.0}
        return [alone, *({**row, "reward_spread": 0.1, "best": best, "single_sites": 0.0} for row in rows)]

    config = SearchConfig(evaluations=128)
    sentence = doubt(config, history(0.52, 0.7))
    assert sentence is not None and "0.520 on average" in sentence and "0.500 before anything" in sentence
    assert doubt(config, history(0.56, 0.7)) is None
    assert doubt(config, history(0.52, 0.8)) is None


@pytest.mark.slow
def test_only_what_learns_for_one_budget_is_judged() -> None:
    history = plain("random").history
    assert doubt(dataclasses.replace(BASE, agent=SearchConfig().agent, method="random"), history) is None
    assert doubt(dataclasses.replace(BASE, front=(0.3,)), plain().history) is None
    assert doubt(BASE, plain().history[:1]) is None


@pytest.mark.slow
def test_the_spread_is_that_of_the_rewards() -> None:
    assert all(row["reward_spread"] < 1e-6 for row in plain("uniform").history)
    assert all(row["reward_spread"] > 0.05 for row in plain("random").history)

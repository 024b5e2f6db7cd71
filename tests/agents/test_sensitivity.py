"""What single sites tell, and what a search makes of it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.archive import Archive, empty_archive
from sculpt.agents.config import SearchConfig
from sculpt.agents.learning import init_state, snapshot, update
from sculpt.agents.observation import site_features
from sculpt.agents.run import set_up
from sculpt.agents.sensitivity import (
    options_each,
    sensitivity_logits,
    singles,
    singles_first,
    starts_from_energy,
)
from sculpt.scoring.plan import EvaluationPlan
from tests.agents.test_search import BASE, plain, run, search_module
from tests.agents.toys import TableScorer, toy_model, toy_space, toy_splits

EVERY = toy_space().max_options


def retained() -> jax.Array:
    return site_features(toy_space(), toy_model().params).retained


def scored(policies: np.ndarray, loss: np.ndarray) -> Archive:
    """An archive of policies int32 `[n, sites]` with losses float32 `[n]`, and accuracies that tell nothing."""
    empty, count = empty_archive(len(policies), toy_space().num_sites), jnp.int32(len(policies))
    return dataclasses.replace(
        empty,
        policies=jnp.asarray(policies),
        loss=jnp.asarray(loss, jnp.float32),
        accuracy=jnp.ones(len(policies)),
        count=count,
        total=count,
    )


@pytest.mark.parametrize("each", range(1, EVERY + 1))
def test_singles_prune_one_site_each_at_even_distances(each: int) -> None:
    rows = singles(toy_space(), each)
    assert not rows[0].any()
    assert ((rows[1:] > 0).sum(axis=1) == 1).all()
    assert len(np.unique(rows, axis=0)) == len(rows)
    for site, count in enumerate(toy_space().num_options):
        options = rows[rows[:, site] > 0, site]
        assert len(options) == min(each, count - 1)
        places = np.sort(np.argsort(np.argsort(-toy_space().kept[site, :count], kind="stable"))[options])
        if each == 1:
            assert abs(places[0] - count / 2) <= 0.5
        if each >= count - 1:
            np.testing.assert_array_equal(places, np.arange(1, count))


def test_no_option_means_no_policy() -> None:
    assert singles(toy_space(), 0).shape == (0, toy_space().num_sites)
    policies = jnp.ones((4, toy_space().num_sites), jnp.int32)
    np.testing.assert_array_equal(singles_first(singles(toy_space(), 0), jnp.int32(0), policies), policies)


@pytest.mark.parametrize("total", [0, 3, 10**6])
def test_singles_come_first_and_once(total: int) -> None:
    alone, drawn = singles(toy_space(), 1), np.full((64, toy_space().num_sites), 1, np.int32)
    got = np.asarray(singles_first(alone, jnp.int32(total), jnp.asarray(drawn)))
    left = alone[total:]
    np.testing.assert_array_equal(got[: len(left)], left)
    np.testing.assert_array_equal(got[len(left) :], drawn[len(left) :])


@pytest.mark.slow
def test_scored_options_are_favoured_by_what_they_do() -> None:
    alone = singles(toy_space(), EVERY)
    rng = np.random.default_rng(0)
    loss = rng.uniform(size=len(alone))
    both = np.zeros((2, toy_space().num_sites), np.int32)
    both[:, :2] = 1  # of two sites: says nothing of either alone
    archive = scored(np.concatenate([alone, both]), np.append(loss, [5.0, -5.0]))
    logits = np.asarray(sensitivity_logits(toy_space(), retained(), EVERY, archive))
    effects = np.zeros_like(logits)
    for row, policy in enumerate(alone[1:], 1):
        site = int(np.flatnonzero(policy)[0])
        effects[site, policy[site]] = loss[0] - loss[row]
    valid = toy_space().valid
    expected = 8.0 * effects / np.mean(np.abs(effects[valid]))
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.slow
def test_options_between_lie_on_the_line_by_the_energy_that_they_lose(each: int) -> None:
    """Harm in proportion to the energy lost, by another factor at every site, is found whole from a few options."""
    alone, lost = singles(toy_space(), each), 1.0 - np.asarray(retained())
    factors = np.linspace(0.1, 1.0, toy_space().num_sites)
    harm = factors[:, None] * lost
    loss = 0.1 + harm[np.arange(toy_space().num_sites)[None], alone].sum(axis=1)
    archive = scored(alone, loss)
    logits = np.asarray(sensitivity_logits(toy_space(), retained(), each, archive))
    channels = [site.index for site in toy_space().sites if site.family == "channels"]
    for (
        site
    ) in channels:  # whose options lose more and more; beyond the last scored one the line ends somewhere
        known = np.append(0.0, np.sort(lost[site, alone[alone[:, site] > 0, site]]))
        lost[site] = np.minimum(lost[site], known[-2] + 2.0 * (known[-1] - known[-2]))
    expected = (-factors[:, None] * lost)[channels]
    found = logits[channels] * np.abs(expected).max() / np.abs(logits[channels]).max()
    valid = toy_space().valid[channels]
    np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-3, atol=1e-5)


def test_nothing_is_favoured_where_no_site_matters() -> None:
    alone = singles(toy_space(), 2)
    archive = scored(alone, np.full(len(alone), 0.5))
    logits = sensitivity_logits(toy_space(), retained(), 2, archive)
    np.testing.assert_array_equal(logits, jnp.zeros_like(logits))


@pytest.mark.slow
def test_the_share_of_the_evaluations_decides_how_many_options_are_scored() -> None:
    least = 1 + toy_space().num_sites
    for share, evaluations in itertools.product((0.1, 0.25, 0.9), (16, 20, 32, 64, 256, 4096)):
        config = dataclasses.replace(BASE, sensitivity=share, evaluations=evaluations, batch_size=8)
        each = options_each(config, toy_space())
        drawn = config.updates * config.batch
        rows, more = (len(singles(toy_space(), number)) for number in (each, each + 1))
        assert rows <= max(least, min(share, 0.5) * drawn)
        assert rows <= drawn / 2
        assert each == EVERY - 1 or more > min(share, 0.5) * drawn
        # One option of each is worth more than its share.
        assert (each > 0) == (least <= drawn / 2)
    assert options_each(dataclasses.replace(BASE, sensitivity=0.0), toy_space()) == 0
    alone_and_no_more = dataclasses.replace(BASE, evaluations=64, batch_size=64)
    assert options_each(alone_and_no_more, toy_space()) == 0
    history = plain().history
    alone = len(singles(toy_space(), options_each(BASE, toy_space())))
    assert sum(row["single_sites"] for row in history) == alone
    assert history[0]["single_sites"] == 16 and history[-1]["single_sites"] == 0
    none = run(dataclasses.replace(BASE, sensitivity=0.0)).history
    assert all(row["single_sites"] == 0 for row in none)


def test_other_methods_and_rewards_that_hold_the_budget_score_no_single_sites() -> None:
    assert options_each(SearchConfig(method="random"), toy_space()) == 0
    for evaluations in range(8, 512, 8):
        each = options_each(SearchConfig(method="greedy", evaluations=evaluations, batch_size=8), toy_space())
        assert each == 0 or len(singles(toy_space(), each)) <= evaluations / 2
        assert each == EVERY - 1 or len(singles(toy_space(), each + 1)) > evaluations / 2
    assert each == EVERY - 1
    penalised = dataclasses.replace(
        BASE, projection=False, reward=dataclasses.replace(BASE.reward, kind="lagrangian")
    )
    assert options_each(penalised, toy_space()) == 0


def test_energy_is_what_a_search_begins_from_where_no_single_sites_are_scored() -> None:
    few = dataclasses.replace(BASE, evaluations=16)
    assert starts_from_energy(few, toy_space()) and not starts_from_energy(BASE, toy_space())
    assert starts_from_energy(dataclasses.replace(BASE, warm_start=True), toy_space())
    assert not starts_from_energy(dataclasses.replace(few, warm_start=False), toy_space())
    assert starts_from_energy(SearchConfig(method="cma_es"), toy_space())
    assert not starts_from_energy(SearchConfig(method="random"), toy_space())


@pytest.mark.slow
def test_a_taught_agent_begins_from_energy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    original = search_module.set_up

    def listen(model: object, space: object, splits: object, config: SearchConfig, *others: object) -> Any:
        told.append(starts_from_energy(config, toy_space()))
        return original(model, space, splits, config, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(search_module, "set_up", listen)
    assert plain().agent is not None
    run(BASE)
    run(BASE, agent=plain().agent)
    run(dataclasses.replace(BASE, warm_start=False), agent=plain().agent)
    assert told == [False, True, False]


@pytest.mark.slow
def test_policies_are_better_from_the_first_that_is_drawn() -> None:
    """Where a score is a sum over sites, what single sites tell is all that there is to know."""

    def first(share: float, seed: int) -> float:
        config = dataclasses.replace(BASE, sensitivity=share)
        rows = run(config, seed, scorer=TableScorer(seed)).history
        return next(row["mean_reward"] for row in rows if not row["single_sites"])

    told, untold = (np.asarray([first(share, seed) for seed in range(3)]) for share in (0.125, 0.0))
    assert (told > untold + 0.1).all()


@pytest.mark.slow
def test_nothing_is_learned_from_policies_that_were_not_drawn() -> None:
    data = jax.random.key(0)
    program, task, _ = set_up(
        toy_model(), toy_space(), toy_splits(), BASE, data, EvaluationPlan(), TableScorer()
    )
    before = init_state(program, task, jax.random.key(1))
    alone = len(singles(toy_space(), options_each(BASE, toy_space())))
    for turn in range(1, 5):
        after = update(program, task, snapshot(before), jax.random.key(2))
        learnt, kept = ((state.agent, state.optimizer, state.credit) for state in (after, before))
        same = all(map(np.array_equal, jax.tree.leaves(learnt), jax.tree.leaves(kept)))
        assert same == ((turn - 1) * BASE.batch < alone)
        before = after
    assert alone > BASE.batch

"""The rivals: same projection, same evaluations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.archive import Archive, empty_archive
from sculpt.agents.config import LEARNERS, RULES, Method, SearchConfig
from sculpt.agents.controls import Proposals, after, fixed_policy, propose, start
from sculpt.agents.sensitivity import singles
from sculpt.pruning.costs import cost
from sculpt.pruning.space import make_choices
from tests.agents.toys import toy_model, toy_space

BUDGET = 0.4
NUMBER = 24
CONTROLS = sorted(set(get_args(Method)) - set(LEARNERS))


def prior() -> jax.Array:
    return jnp.zeros((toy_space().num_sites, toy_space().max_options), jnp.float32)


def config_of(method: str) -> SearchConfig:
    return SearchConfig(method=method, batch_size=NUMBER)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=0)
def proposals(method: str, archive: Archive, rule: jax.Array, state: Any, key: jax.Array) -> Proposals:
    budget = jnp.float32(BUDGET)
    return propose(config_of(method), toy_space(), budget, rule, prior(), archive, state, key)


def proposed(method: str, archive: Archive, rule: jax.Array, key: jax.Array) -> jax.Array:
    return proposals(method, archive, rule, begun(method), key).policies


def begun(method: str) -> Any:
    if method == "cma_es":
        pytest.importorskip("evosax")
    return start(config_of(method), toy_space(), prior(), jax.random.key(7))


def rule(method: str) -> jax.Array:
    return fixed_policy(method, toy_space(), toy_model().params, BUDGET)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", CONTROLS)
@pytest.mark.fast("lamp", "magnitude", "uniform")
def test_every_proposal_meets_the_budget(method: str) -> None:
    alone = len(singles(toy_space(), toy_space().max_options))
    archive = empty_archive(64, toy_space().num_sites)
    archive = dataclasses.replace(archive, total=jnp.int32(alone))  # greedy is through with these
    policies = proposed(method, archive, rule(method), jax.random.key(0))
    assert policies.shape == (NUMBER, toy_space().num_sites) and policies.dtype == jnp.int32
    assert np.asarray(cost(toy_space(), policies).macs_ratio).max() <= BUDGET + 1e-5
    distinct = len(np.unique(np.asarray(policies), axis=0))
    assert distinct == 1 if method in RULES else distinct > 12


@pytest.mark.slow
def test_greedy_scores_every_option_by_itself_and_then_favours_what_does_least_harm() -> None:
    alone = singles(toy_space(), toy_space().max_options)
    assert len(alone) == 1 + int((toy_space().num_options - 1).sum())
    assert ((alone > 0).sum(axis=1) <= 1).all() and len(np.unique(alone, axis=0)) == len(alone)
    archive = empty_archive(len(alone), toy_space().num_sites)
    first = proposed("greedy", archive, rule("greedy"), jax.random.key(0))
    np.testing.assert_array_equal(first, alone[:NUMBER])
    # Pruning site 1 does great harm, other sites none.
    loss = np.where(alone[:, 1] > 0, 2.3, 0.1).astype(np.float32)
    count = jnp.int32(len(alone))
    full = dataclasses.replace(
        archive, policies=jnp.asarray(alone), loss=jnp.asarray(loss), count=count, total=count
    )
    kept = np.asarray(proposed("greedy", full, rule("greedy"), jax.random.key(1)))[:, 1] == 0
    by_chance = np.asarray(proposed("random", full, rule("random"), jax.random.key(1)))[:, 1] == 0
    assert kept.mean() > by_chance.mean() + 0.3


def test_greedy_tells_by_sizes_what_options_would_do_that_it_had_no_room_for() -> None:
    """Pruning site 1 by half does great harm: by less it does harm too."""
    few = dataclasses.replace(config_of("greedy"), evaluations=2 * len(singles(toy_space(), 1)), batch_size=8)
    alone = singles(toy_space(), 1)
    loss = np.where(alone[:, 1] > 0, 2.3, 0.1).astype(np.float32)
    empty, count = empty_archive(len(alone), toy_space().num_sites), jnp.int32(len(alone))
    archive = dataclasses.replace(
        empty, policies=jnp.asarray(alone), loss=jnp.asarray(loss), count=count, total=count
    )
    draw = jax.jit(
        lambda key: (
            propose(few, toy_space(), jnp.float32(BUDGET), rule("greedy"), prior(), archive, {}, key).policies
        )
    )
    drawn = np.concatenate([draw(jax.random.key(turn)) for turn in range(8)])[:, 1]
    assert alone[alone[:, 1] > 0, 1] > 1, "an option lies between"
    assert (drawn == 0).mean() > 0.9


@pytest.mark.slow
def test_cma_es_moves_towards_what_is_worth_more() -> None:
    """Worth is how often the first option is taken: after some populations it is taken more often."""
    method, archive, state = "cma_es", empty_archive(64, toy_space().num_sites), begun("cma_es")
    firsts = []
    tell = jax.jit(functools.partial(after, config_of(method)))
    for turn in range(8):
        found = proposals(method, archive, rule(method), state, jax.random.key(turn))
        worth = (found.policies == 0).mean(axis=1, dtype=jnp.float32)
        firsts.append(float(worth.mean()))
        state = tell(found, worth, jax.random.key(100 + turn))
    assert np.mean(firsts[-2:]) > firsts[0] + 0.05


def test_lamp_is_one_threshold() -> None:
    """Against the definition written out: options whose score is below the threshold are gone, the others stay."""
    space, params = toy_space(), toy_model().params
    policy = np.asarray(fixed_policy("lamp", space, params, 0.3))
    retained = [np.asarray(choice.retained) for choice in make_choices(space, params)]
    scores = [np.maximum.accumulate(1 - r[1:] / np.maximum(r[:-1], 1e-6)) for r in retained]

    def pruned_by(threshold: float) -> list[int]:
        return [int((row <= threshold).sum()) for row in scores]

    def ratio(policy: list[int]) -> float:
        return float(cost(space, np.asarray(policy)).macs_ratio)

    lowest = next(t for t in np.sort(np.concatenate(scores)) if ratio(pruned_by(t)) <= 0.3 + 1e-6)
    assert (policy <= pruned_by(lowest)).all(), "slack may only bring back"
    assert ratio(policy.tolist()) <= 0.3 + 1e-6


def test_evolution_stays_near_the_best() -> None:
    archive = empty_archive(64, toy_space().num_sites)
    random = proposed("random", archive, rule("random"), jax.random.key(1))
    best = random[5]
    filled = Archive(
        policies=archive.policies.at[:24].set(random),
        accuracy=archive.accuracy.at[5].set(1.0),
        loss=archive.loss,
        used=archive.used,
        count=jnp.int32(24),
        total=jnp.int32(24),
    )
    children = np.asarray(proposed("evolution", filled, rule("evolution"), jax.random.key(2)))
    moved = np.abs(children - np.asarray(best)[None]).sum(axis=1)
    assert np.median(moved) < np.median(np.abs(np.asarray(random) - np.asarray(best)[None]).sum(axis=1))
    assert len(np.unique(children, axis=0)) > 4

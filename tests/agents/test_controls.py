"""The rivals: same projection, same evaluations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.controls import fixed_policy, propose
from sculpt.pruning import cost
from sculpt.scoring.archive import Archive, empty_archive
from tests.agents.toys import toy_model, toy_space

BUDGET = 0.4


@functools.partial(jax.jit, static_argnums=0)
def proposed(method: str, archive: Archive, rule: jax.Array, key: jax.Array) -> jax.Array:
    return propose(method, toy_space(), 24, jnp.float32(BUDGET), rule, archive, "accuracy", key)  # type: ignore[arg-type]


def rule(method: str) -> jax.Array:
    return fixed_policy(method, toy_space(), toy_model().params, BUDGET)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["random", "evolution", "uniform", "magnitude"])
def test_every_proposal_meets_the_budget(method: str) -> None:
    archive = empty_archive(64, toy_space().num_sites)
    policies = proposed(method, archive, rule(method), jax.random.key(0))
    assert policies.shape == (24, toy_space().num_sites) and policies.dtype == jnp.int32
    assert np.asarray(cost(toy_space(), policies).macs_ratio).max() <= BUDGET + 1e-5
    distinct = len(np.unique(np.asarray(policies), axis=0))
    assert distinct == 1 if method in ("uniform", "magnitude") else distinct > 12


def test_evolution_stays_near_the_best() -> None:
    archive = empty_archive(64, toy_space().num_sites)
    random = proposed("random", archive, rule("random"), jax.random.key(1))
    best = random[5]
    filled = Archive(
        policies=archive.policies.at[:24].set(random),
        accuracy=archive.accuracy.at[5].set(1.0),
        loss=archive.loss,
        macs_ratio=archive.macs_ratio,
        count=jnp.int32(24),
        total=jnp.int32(24),
    )
    children = np.asarray(proposed("evolution", filled, rule("evolution"), jax.random.key(2)))
    moved = np.abs(children - np.asarray(best)[None]).sum(axis=1)
    assert np.median(moved) < np.median(np.abs(np.asarray(random) - np.asarray(best)[None]).sum(axis=1))
    assert len(np.unique(children, axis=0)) > 4

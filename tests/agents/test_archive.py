"""The archive: a policy is evaluated once, however often it comes back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.archive import LOSS_CEILING, Archive, empty_archive, score_with_archive
from sculpt.scoring.evaluation import Scores

SITES = 3
asked: list[np.ndarray] = []


def score(policies: jax.Array, count: jax.Array) -> Scores:
    """Accuracy = sum of options / 100 for the first `count`, NaN beyond, so that a mix-up shows; notes what was asked."""
    jax.debug.callback(lambda p, n: asked.append(np.asarray(p)[: int(n)]), policies, count)
    wanted = jnp.arange(policies.shape[0]) < count
    total = jnp.sum(policies, axis=1).astype(jnp.float32)
    accuracy = jnp.where(wanted, total / 100, jnp.nan)
    return Scores(jnp.where(total == 90.0, jnp.nan, accuracy), jnp.where(total == 80.0, jnp.inf, total))


@functools.partial(jax.jit)
def scored(archive: Archive, policies: jax.Array) -> tuple[Archive, Scores]:
    return score_with_archive(archive, policies, jnp.full(policies.shape[0], 0.25), score)


def rows(*values: int) -> jax.Array:
    return jnp.asarray([[v, 0, 0] for v in values], jnp.int32)


def asked_for(archive: Archive, policies: jax.Array) -> tuple[Archive, Scores, list[int]]:
    asked.clear()
    archive, scores = scored(archive, policies)
    jax.effects_barrier()
    return archive, scores, [int(row[0]) for block in asked for row in block]


def test_repeats_cost_nothing() -> None:
    archive, scores, evaluated = asked_for(empty_archive(8, SITES), rows(5, 7, 5, 9))
    assert evaluated == [5, 7, 9]
    np.testing.assert_allclose(scores.accuracy, [0.05, 0.07, 0.05, 0.09])
    archive, scores, evaluated = asked_for(archive, rows(9, 4, 5, 4))
    assert evaluated == [4]
    np.testing.assert_allclose(scores.accuracy, [0.09, 0.04, 0.05, 0.04])
    np.testing.assert_allclose(scores.loss, [9, 4, 5, 4])
    assert (int(archive.count), int(archive.total)) == (4, 8)
    np.testing.assert_array_equal(archive.policies[:4, 0], [5, 7, 9, 4])
    np.testing.assert_allclose(archive.used[:5], [0.25] * 4 + [0])
    assert asked_for(archive, rows(4, 5, 7, 9))[2] == []


def test_the_empty_row_is_no_policy() -> None:
    assert asked_for(empty_archive(8, SITES), rows(0, 0, 0, 0))[2] == [0]


def test_divergence_counts_as_the_worst_and_never_crashes() -> None:
    _, scores, _ = asked_for(empty_archive(8, SITES), rows(90, 80, 50, 1))
    np.testing.assert_allclose(scores.accuracy, [0, 0, 0.5, 0.01])
    np.testing.assert_allclose(scores.loss, [LOSS_CEILING, LOSS_CEILING, LOSS_CEILING, 1])


def test_a_full_archive_still_scores() -> None:
    archive, scores, _ = asked_for(empty_archive(2, SITES), rows(1, 2, 3, 4))
    np.testing.assert_allclose(scores.accuracy, [0.01, 0.02, 0.03, 0.04])
    assert int(archive.count) == 2
    assert asked_for(archive, rows(1, 2, 3, 4))[2] == [3, 4]

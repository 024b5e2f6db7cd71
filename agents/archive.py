"""Archive of scored policies, on the device: a repeated policy costs a look-up instead of an evaluation.

Late in a search half of the samples repeat. The archive keeps arrays of fixed capacity, so that looking up, evaluating
what is new and inserting it all stay inside one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sculpt.scoring.evaluation import Scores

LOSS_CEILING = 20.0
"""Nats. A network that diverged (NaN or infinite loss) counts as accuracy 0 and this loss, no network as a higher one."""

ScoreFn = Callable[[jax.Array, jax.Array], Scores]
"""`(policies int32 [n, sites], count int32) -> Scores [n]`, of which only the first `count` are asked for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Archive:
    """Distinct policies in the order in which they were first scored; rows from `count` on are empty."""

    policies: jax.Array
    """int32 `[capacity, sites]`."""
    accuracy: jax.Array
    """float32 `[capacity]`, in [0, 1]."""
    loss: jax.Array
    """float32 `[capacity]`, nats, at most `LOSS_CEILING`."""
    used: jax.Array
    """float32 `[capacity]`: what of the space's resource each uses / dense."""
    count: jax.Array
    """int32 scalar: the rows in use, which is the number of unique evaluations."""
    total: jax.Array
    """int32 scalar: policies asked for, repeats included."""


def empty_archive(capacity: int, sites: int) -> Archive:
    """An archive with room for `capacity` distinct policies; what comes beyond that is scored but not remembered."""
    zeros = jnp.zeros(capacity, jnp.float32)
    none = jnp.int32(0)
    return Archive(jnp.full((capacity, sites), -1, jnp.int32), zeros, zeros, zeros, none, none)


def score_with_archive(
    archive: Archive, policies: jax.Array, used: jax.Array, score: ScoreFn
) -> tuple[Archive, Scores]:
    """Scores a batch, evaluating only policies that neither the archive nor the batch itself has had before.

    Args:
      archive: what is known.
      policies: int32 `[n, sites]`.
      used: float32 `[n]`, what of the space's resource each of them uses.
      score: evaluates the first policies of a batch; the new ones are moved there.

    Returns:
      The archive with the new policies in it, and `Scores` `[n]` of the whole batch.
    """
    number, capacity = policies.shape[0], archive.policies.shape[0]
    in_use = jnp.arange(capacity, dtype=jnp.int32) < archive.count
    known = jnp.all(policies[:, None] == archive.policies[None], axis=-1) & in_use[None]
    remembered = jnp.any(known, axis=1)
    first = jnp.argmax(jnp.all(policies[:, None] == policies[None], axis=-1), axis=1)
    fresh = ~remembered & (first == jnp.arange(number))
    fresh_count = jnp.sum(fresh, dtype=jnp.int32)
    order = jnp.argsort(~fresh, stable=True)  # new policies first, the rest behind them
    rank = jnp.argsort(order).astype(jnp.int32)  # the inverse: where a policy stands in `order`

    scores = jax.tree.map(lambda rows: rows[rank], _finite(score(policies[order], fresh_count)))
    slot = jnp.where(fresh, archive.count + rank, capacity)  # `capacity` is out of range: dropped
    recalled = jnp.argmax(known, axis=1)
    result = Scores(
        accuracy=jnp.where(remembered, archive.accuracy[recalled], scores.accuracy[first]),
        loss=jnp.where(remembered, archive.loss[recalled], scores.loss[first]),
    )
    return (
        Archive(
            policies=archive.policies.at[slot].set(policies, mode="drop"),
            accuracy=archive.accuracy.at[slot].set(scores.accuracy, mode="drop"),
            loss=archive.loss.at[slot].set(scores.loss, mode="drop"),
            used=archive.used.at[slot].set(used, mode="drop"),
            count=jnp.minimum(archive.count + fresh_count, capacity),
            total=archive.total + number,
        ),
        result,
    )


def _finite(scores: Scores) -> Scores:
    diverged = ~(jnp.isfinite(scores.accuracy) & jnp.isfinite(scores.loss))
    return Scores(
        accuracy=jnp.where(diverged, 0.0, scores.accuracy),
        loss=jnp.where(diverged, LOSS_CEILING, jnp.minimum(scores.loss, LOSS_CEILING)),
    )

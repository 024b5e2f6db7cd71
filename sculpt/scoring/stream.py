"""Scores any number of policies in constant memory."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.interrupts import check_interrupt
from sculpt.pruning.costs import Cost, cost
from sculpt.pruning.masks import check_policies
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import Scores, score_compiled
from sculpt.scoring.problem import Problem

CHUNK = 256
"""Policies that are scored by one call."""
_REMEMBERED = 1 << 18
"""Policies whose scores are kept in memory, about 200 bytes each."""


Pair = tuple[np.float32, np.float32]
"""(accuracy, loss) of a policy."""


class Memory:
    """Scores of the policies seen last, so that one that comes back is not scored again."""

    def __init__(self) -> None:
        self._scores: collections.OrderedDict[bytes, Pair] = collections.OrderedDict()

    def put(self, policy: np.ndarray, accuracy: Any, loss: Any) -> None:
        """Remembers the scores of a policy int32 `[sites]`."""
        self._scores[policy.tobytes()] = np.float32(accuracy), np.float32(loss)
        self._scores.move_to_end(policy.tobytes())
        if len(self._scores) > _REMEMBERED:
            self._scores.popitem(last=False)

    def get(self, policy: np.ndarray) -> Pair | None:
        """The scores of a policy, if it is remembered."""
        found = self._scores.get(policy.tobytes())
        if found is not None:
            self._scores.move_to_end(policy.tobytes())
        return found


@dataclasses.dataclass(frozen=True)
class ScoredBlock:
    """Some policies of a stream, in its order, with their scores."""

    start: int
    """Index of the first of them in the stream."""
    policies: np.ndarray
    """int32 `[n, sites]`."""
    scores: Scores
    """numpy float32 `[n]` each."""
    cost: Cost
    """numpy `[n]` each: counts int64, shares float."""
    evaluated: int
    """Policies that were scored by running the network; the others were remembered."""


@dataclasses.dataclass
class _Flight:
    """A block that the device is working on."""

    start: int
    policies: np.ndarray
    fresh: np.ndarray
    """int64: rows that are being scored."""
    known: dict[bytes, Pair]
    """Policies remembered from before; memory may have lost them by the time that the block lands."""
    scores: Scores
    """Of the fresh rows, not waited for."""
    space: Space

    def land(self, memory: Memory, before: dict[bytes, Pair]) -> tuple[ScoredBlock, dict[bytes, Pair]]:
        """Waits for the scores.

        Args:
          memory: is told what was scored.
          before: what the block before scored, which this one may have waited for.

        Returns:
          The block, and what it scored.
        """
        found, scored = jax.device_get(self.scores), {}
        for place, row in enumerate(self.fresh):
            pair = scored[self.policies[row].tobytes()] = (found.accuracy[place], found.loss[place])
            memory.put(self.policies[row], *pair)
        pairs = self.known | before | scored
        rows = [pairs[policy.tobytes()] for policy in self.policies]
        accuracy, loss = (np.asarray([pair[i] for pair in rows], np.float32) for i in range(2))
        costs = cost(self.space, self.policies)
        block = ScoredBlock(self.start, self.policies, Scores(accuracy, loss), costs, len(self.fresh))  # type: ignore[arg-type]
        return block, scored


def score_stream(
    problem: Problem,
    policies: Iterable[Any],
    *,
    start: int = 0,
    chunk: int = CHUNK,
    memory: Memory | None = None,
) -> Iterator[ScoredBlock]:
    """Scores policies as they come; while the device works on a block, the host reads the next one.

    The number of policies may be unknown, and unbounded: one program of `chunk` policies serves all of them.

    Args:
      problem: from `make_problem`.
      policies: integers `[sites]` each.
      start: index of the first policy, where a stream is taken up again.
      chunk: policies in a block.
      memory: scores known from before; filled on the way.

    Raises:
      ValueError: for a policy that does not fit the space, naming its index.
    """
    memory = Memory() if memory is None else memory
    policies, ahead, scored = iter(policies), None, {}
    for index in itertools.count(start, chunk):
        check_interrupt()
        rows = list(itertools.islice(policies, chunk))
        flight = (
            _launch(problem, _checked(problem.space, rows, index), index, chunk, memory, ahead)
            if rows
            else None
        )
        if ahead is not None:
            block, scored = ahead.land(memory, scored)
            yield block
        if flight is None:
            return
        ahead = flight


def _launch(
    problem: Problem, policies: np.ndarray, start: int, chunk: int, memory: Memory, ahead: _Flight | None
) -> _Flight:
    """Starts scoring what is neither remembered nor under way."""
    coming = {ahead.policies[row].tobytes() for row in ahead.fresh} if ahead is not None else set()
    known, fresh = {}, []
    for row, policy in enumerate(policies):
        if (pair := memory.get(policy)) is not None:
            known[policy.tobytes()] = pair
        elif policy.tobytes() not in coming:
            fresh.append(row)
            coming.add(policy.tobytes())
    rows = np.asarray(fresh, np.int64)
    place = problem.plan.place
    padded = _padded(policies[rows], chunk)
    scores = score_compiled(problem, place(padded), place(jnp.int32(len(rows))))
    return _Flight(start, policies, rows, known, scores, problem.space)


def _padded(policies: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(policies, ((0, rows - len(policies)), (0, 0)))


def _checked(space: Space, rows: Sequence[Any], start: int) -> np.ndarray:
    """The policies as int32 `[n, sites]`."""
    for place, row in enumerate(rows):
        try:
            if np.ndim(row) != 1:
                raise ValueError(f"expected one policy [{space.num_sites}], got {list(np.shape(row))}")
            check_policies(space, np.asarray(row))
        except ValueError as error:
            raise ValueError(f"policy {start + place}: {error}") from error
    return np.asarray(rows, np.int32)

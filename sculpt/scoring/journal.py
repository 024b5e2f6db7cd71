"""Scores of a stream of policies in a file; a killed run resumes: `evaluate_file`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sculpt.arguments import checked
from sculpt.digest import digest_of
from sculpt.files import named_disk_full, remove_leftovers, written_whole
from sculpt.ir.identity import add_task, outline
from sculpt.model import Model
from sculpt.pruning.space import Space
from sculpt.rows import encode_row
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.policy_file import (
    COLUMNS,
    as_json,
    check_scores_file,
    pack_rows,
    read_policies,
    read_rows,
    unpack_rows,
)
from sculpt.scoring.problem import Problem, Repair, make_problem
from sculpt.scoring.stream import CHUNK, Memory, ScoredBlock, score_stream
from sculpt.task import CLASSIFICATION


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """What became of a stream."""

    policies: int
    """Rows in the file."""
    resumed: int
    """Of them, those that were there before."""
    evaluated: int
    """Policies that this call scored by running the network."""
    seconds: float
    """Wall time of this call, compilation included."""

    @property
    def hit_rate(self) -> float:
        """Share of this call's policies whose scores were remembered; 0 where there were none."""
        fresh = self.policies - self.resumed
        return 1 - self.evaluated / fresh if fresh else 0.0

    @property
    def policies_per_second(self) -> float:
        """Policies of this call per second, remembered ones included."""
        return (self.policies - self.resumed) / self.seconds if self.seconds else 0.0


@checked
def evaluate_file(
    model: Model,
    space: Space,
    policies: str | Path | Iterable[Any],
    out: str | Path,
    images: Any,
    labels: Any,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
    *,
    chunk: int = CHUNK,
    repair: Repair = "recalibrate",
    on_progress: Callable[[StreamReport], None] | None = None,
) -> StreamReport:
    """Scores policies from a file or an iterable into a file, in constant memory.

    Rows are appended block by block. A call that finds rows of the same task and policies goes on behind them: no row that was
    written is scored twice, nothing is lost, and the file ends as it would have without the interruption. Of the distinct
    policies seen last, 262,144 are remembered: one that comes back is not scored again.

    Args:
      model: the dense network.
      space: sites and patterns.
      policies: a file for `read_policies`, or integers `[sites]` one after the other (the same ones when resuming).
      out: `.jsonl` (one object a line) or `.parquet` (rows are kept in `<out>.partial.jsonl` until all are there).
        Every row has "index", "policy" and `COLUMNS`, null where a network diverged (NaN or infinite loss), and "crc32", a checksum;
        `<out>.json` says what was scored on what. On several hosts the first one writes.
      images: as for `evaluate_policies`.
      labels: as for `evaluate_policies`.
      calibration: as for `evaluate_policies`.
      plan: as for `evaluate_policies`.
      chunk: policies in a block.
      repair: as for `evaluate_policies`.
      on_progress: told after every block.

    Raises:
      ValueError: for what does not fit, a file that belongs to another task or to other policies, or one that another
        process is writing; on several hosts, on all of them.
    """
    out = Path(out)
    check_scores_file(out, policies)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    begun = time.perf_counter()
    stream = read_policies(policies) if isinstance(policies, str | Path) else iter(policies)
    problem = make_problem(model, space, images, labels, calibration, plan, repair)
    # Every host must know the same scores, and only the first one has the file.
    memory = Memory()
    remembered = memory if jax.process_count() == 1 else Memory()
    with contextlib.ExitStack() as opened:

        def begin() -> Journal:
            journal = opened.enter_context(Journal(out, _about(problem)))
            journal.recall(stream, remembered)
            return journal

        journal = _on_first_host(begin, out)
        resumed = journal.rows
        if isinstance(journal, _Nothing):
            collections.deque(itertools.islice(stream, resumed), maxlen=0)
        report = StreamReport(resumed, resumed, 0, time.perf_counter() - begun)
        for block in score_stream(problem, stream, start=resumed, chunk=chunk, memory=memory):
            journal.append(block)
            seconds = time.perf_counter() - begun
            report = StreamReport(
                report.policies + len(block.policies), resumed, report.evaluated + block.evaluated, seconds
            )
            if on_progress is not None:
                on_progress(report)
        journal.finish()
    return report


@dataclasses.dataclass(frozen=True)
class _Nothing:
    """The journal of a host that writes nothing."""

    rows: int

    def append(self, block: ScoredBlock) -> None: ...
    def finish(self) -> None: ...


class Journal:
    """Rows on disk: whole lines, flushed after every block, behind what was there before.

    Raises:
      ValueError: if the file belongs to another task, is damaged, or is being written by another process.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self._out, self._about_file = out, out.with_name(out.name + ".json")
        self._lines = out if out.suffix == ".jsonl" else out.with_name(out.name + ".partial.jsonl")
        self._about = about
        self._copied = False
        """Whether the lines are those of a finished parquet file, and no more."""
        self.rows = 0
        """Whole rows on disk."""

    def __enter__(self) -> Journal:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            opened.enter_context(_locked(self._out.with_name(f".{self._out.name}.lock")))
            for file in (self._out, self._lines, self._about_file):
                remove_leftovers(file.parent, file.name)
            self._claim()
            # Lines that are there are never behind the parquet file: they began as all of its rows, and only grow.
            if self._lines != self._out and self._out.exists() and not self._lines.exists():
                opened.callback(self._drop_copy)
                unpack_rows(self._out, self._lines)
                self._copied = True
            self._file = opened.enter_context(self._lines.open("ab+"))
            self.rows = self._whole_rows()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _drop_copy(self) -> None:
        if self._copied:
            self._lines.unlink()

    def _claim(self) -> None:
        """Sees that the file belongs to this task, or is new."""
        if self._lines.exists() or self._out.exists():
            try:
                there = json.loads(self._about_file.read_text())
                if not isinstance(there, dict):
                    raise ValueError("no JSON object")
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self._out} exists, but {self._about_file.name}, which says what it belongs to, cannot be read: "
                    "give another file, or delete it"
                ) from error
            if there != self._about:
                differ = ", ".join(
                    sorted(k for k in {*there, *self._about} if there.get(k) != self._about.get(k))
                )
                raise ValueError(
                    f"{self._out} belongs to another task (other {differ}): give another file, or delete it"
                )
            return
        with written_whole(self._about_file) as temporary:
            temporary.write_text(json.dumps(self._about, indent=1))

    def _whole_rows(self) -> int:
        """Counts the rows, and cuts off what a killed process left of the last one."""
        rows, end = 0, 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            rows, end = rows + 1, end + len(line)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        return rows

    def recall(self, policies: Iterator[Any], memory: Memory) -> None:
        """Takes the policies of the rows on disk from a stream, and fills `memory` with their scores.

        Raises:
          ValueError: if the stream has other policies, or fewer.
        """
        for index, row in enumerate(read_rows(self._lines)):
            policy = next(policies, None)
            if policy is None:
                raise ValueError(
                    f"{self._out} holds {self.rows} rows, there are only {index} policies: give another --out"
                )
            if np.asarray(policy).tolist() != row["policy"]:
                raise ValueError(
                    f"{self._out} holds scores of other policies: policy {index} is not that of its row {index}; "
                    "give another --out"
                )
            accuracy, loss = (np.nan if row[name] is None else row[name] for name in COLUMNS[:2])
            memory.put(np.asarray(row["policy"], np.int32), accuracy, loss)

    def append(self, block: ScoredBlock) -> None:
        """Writes a block, and sees it safely on disk."""
        columns = {"accuracy": block.scores.accuracy, "loss": block.scores.loss}
        columns |= {name: getattr(block.cost, name) for name in COLUMNS[2:]}
        numbers = {name: [as_json(value) for value in np.asarray(values)] for name, values in columns.items()}
        lines = []
        for place, policy in enumerate(block.policies):
            row: dict[str, Any] = {"index": block.start + place, "policy": policy.tolist()}
            row |= {name: values[place] for name, values in numbers.items()}
            lines.append(encode_row(row))
        self._copied = False
        with named_disk_full(self._lines):
            self._file.write(("\n".join(lines) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows += len(lines)

    def finish(self) -> None:
        """Turns the rows into the format that was asked for, unless that is done."""
        if self._lines == self._out or self._copied:
            return
        pack_rows(self._lines, self._out)
        self._lines.unlink()


def _locked(file: Path) -> Any:
    """An open file that no other process has locked; the lock goes with it."""
    handle = file.open("w")
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on this system
        pass
    except OSError as error:
        handle.close()
        raise ValueError(
            f"another process is writing beside {file}: wait for it, or give another file"
        ) from error
    return handle


def _about(problem: Problem) -> dict[str, Any]:
    """What scores depend on: two tasks with the same description have the same scores."""

    real = np.asarray(problem.real).reshape(-1)
    labels = np.asarray(problem.labels).reshape(-1, *problem.labels.shape[2:])
    images = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[real], jax.device_get(problem.images))
    sites = [
        [site.name, site.family, *(option.label for option in site.options)] for site in problem.space.sites
    ]
    own = {} if problem.task == CLASSIFICATION else {"task sha256": _task_digest(problem)}
    return {
        **own,
        "images": int(real.sum()),
        "calibration images": 0
        if problem.calibration is None
        else int(np.prod(jax.tree.leaves(problem.calibration)[0].shape[:2])),
        **({} if problem.wanted is None else {"repair": "reconstruct"}),
        "precision": problem.plan.precision,
        "network sha256": digest_of((problem.params, problem.state)),
        "data sha256": digest_of((images, labels[real], problem.calibration)),
        "choices sha256": digest_of(problem.choices),
        "program sha256": hashlib.sha256(outline(problem.space.trace.program).encode()).hexdigest(),
        "sites sha256": hashlib.sha256(json.dumps(sites).encode()).hexdigest(),
    }


def _task_digest(problem: Problem) -> str:
    model = Model(problem.apply, problem.apply_train, problem.params, problem.state, problem.task)
    digest = hashlib.sha256()
    images, labels = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (problem.images, problem.labels)
    )
    add_task(digest, model, images, labels)
    return digest.hexdigest()


def _on_first_host(begin: Callable[[], Journal], out: Path) -> Journal | _Nothing:
    """Begins a journal on the first host; what it raises there is raised on all, or the others would wait forever."""
    if jax.process_count() == 1:
        return begin()
    from jax.experimental import multihost_utils

    journal, error = None, None
    if jax.process_index() == 0:
        try:
            journal = begin()
        except Exception as caught:
            error = caught
    rows = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if journal is None else journal.rows)))
    if error is not None:
        raise error
    if rows < 0:
        raise ValueError(f"the first host cannot go on with {out}: its own error says why")
    return journal or _Nothing(rows)

"""Mutation check: counts how many of these single-line faults the fast tests notice.

    python -m tests.mutations

First runs the fast tests once and records which test runs which line. Then, for each fault, puts it into a copy of the
repository and runs the tests that run its line until one of them fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS_PER_FAULT = 1200
"""A fault that keeps the tests busy for longer counts as noticed: it made a loop endless."""


class Fault(NamedTuple):
    """One line of a file, and what it is replaced by."""

    file: str
    line: str
    """The line without its indentation; it occurs once in the file."""
    mutant: str

    def place(self, repository: Path) -> int:
        """The number of the line, from 1.

        Raises:
          ValueError: if the file has the line not exactly once.
        """
        lines = [line.strip() for line in (repository / self.file).read_text().splitlines()]
        if lines.count(self.line) != 1:
            raise ValueError(
                f"expected once in {self.file}, found {lines.count(self.line)} times: {self.line}"
            )
        return lines.index(self.line) + 1

    def apply(self, repository: Path) -> str:
        """Puts the fault into the file and returns the text that was there."""
        path, place = repository / self.file, self.place(repository) - 1
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        lines[place] = lines[place].replace(self.line, self.mutant)
        path.write_text("".join(lines))
        return text


FAULTS = (
    # Tracing: axes, zeros, layers.
    Fault(
        "sculpt/tracing/rules.py",
        "return [tuple(batch + lhs_free + rhs_free)]",
        "return [tuple(batch + rhs_free + lhs_free)]",
    ),
    Fault("sculpt/tracing/rules.py", "flow.axes.unify(group_in, group_out, reason)", "pass"),
    Fault(
        "sculpt/tracing/rules.py",
        "result.append(flow.axes.fresh(low) + axis + flow.axes.fresh(high) if low or high else axis)",
        "result.append(flow.axes.fresh(high) + axis + flow.axes.fresh(low) if low or high else axis)",
    ),
    Fault(
        "sculpt/tracing/axes.py",
        "self._cut_atom(head[0], position // inner)",
        "self._cut_atom(head[0], position)",
    ),
    Fault("sculpt/tracing/atoms.py", "first += self._segment_size(segment)", "first += 1"),
    Fault(
        "sculpt/tracing/zero_rules.py",
        "return {a for a in kept if a not in lhs_free & rhs_free or a in left & right}",
        "return {a for a in kept if a not in lhs_free & rhs_free or a in left | right}",
    ),
    Fault(
        "sculpt/tracing/zero_rules.py",
        "return x.atoms if low.constant <= 0 <= high.constant else frozenset()",
        "return x.atoms if low.constant <= high.constant else frozenset()",
    ),
    Fault(
        "sculpt/tracing/zero_rules.py",
        "if exponent is not None and exponent > 0:",
        "if exponent is not None and exponent >= 0:",
    ),
    Fault(
        "sculpt/tracing/graph.py",
        "both_ways = edges + [(r, s, k + 3) for s, r, k in edges]",
        "both_ways = edges + [(s, r, k + 3) for s, r, k in edges]",
    ),
    Fault(
        "sculpt/tracing/graph.py",
        "level = 1 + max((self.nodes[i].depth for i in inputs), default=-1)",
        "level = 1 + min((self.nodes[i].depth for i in inputs), default=-1)",
    ),
    # Pruning: masks, costs, budgets, compaction.
    Fault(
        "sculpt/pruning/masks.py",
        "mask = mask & jnp.reshape(axes.keep(axis, kept, jnp), shape)",
        "mask = mask | jnp.reshape(axes.keep(axis, kept, jnp), shape)",
    ),
    Fault(
        "sculpt/pruning/masks.py",
        "entries[site.kernel.leaf] = (choice.entries & (np.uint8(1) << option)) > 0",
        "entries[site.kernel.leaf] = (choice.entries & (np.uint8(2) << option)) > 0",
    ),
    Fault(
        "sculpt/pruning/budget.py",
        "return jnp.where(fits, low, middle), jnp.where(fits, middle, high), jnp.where(fits, policy, fitting)",
        "return jnp.where(fits, middle, low), jnp.where(fits, middle, high), jnp.where(fits, policy, fitting)",
    ),
    Fault(
        "sculpt/pruning/budget.py",
        "fits = valid & (ratios <= budget) & (kept > kept[rows, policy][:, None])",
        "fits = valid & (kept > kept[rows, policy][:, None])",
    ),
    Fault(
        "sculpt/pruning/budget.py",
        "scores = 1.0 - retained[:, 1:] / jnp.maximum(retained[:, :-1], 1e-6)",
        "scores = 1.0 + retained[:, 1:] / jnp.maximum(retained[:, :-1], 1e-6)",
    ),
    Fault(
        "sculpt/pruning/compaction/rewriting.py",
        "last = len(units) - 1 - int(window[-1])",
        "last = len(units) - int(window[-1])",
    ),
    Fault(
        "sculpt/pruning/compaction/rewriting.py",
        "starts[dim], limits[dim] = int(units[: starts[dim]].sum()), int(units[: limits[dim]].sum())",
        "starts[dim], limits[dim] = int(units[: starts[dim] + 1].sum()), int(units[: limits[dim] + 1].sum())",
    ),
    Fault(
        "sculpt/pruning/importance/weights.py",
        "total = total + share(jnp.sqrt(energy))",
        "total = total - share(jnp.sqrt(energy))",
    ),
    Fault(
        "sculpt/pruning/permutation.py",
        "return jax.lax.map(lambda row: jnp.maximum(energy - row[None], 0.0).sum(axis=1), threshold).T",
        "return jax.lax.map(lambda row: jnp.maximum(row[None] - energy, 0.0).sum(axis=1), threshold).T",
    ),
    # Scoring: recalibration, evaluation, reconstruction, memory.
    Fault("sculpt/repair/recalibration.py", "moved = 1.0 - momentum[0]", "moved = momentum[0]"),
    Fault(
        "sculpt/repair/recalibration.py",
        "return n if n < images_per_batch else n - n % images_per_batch",
        "return n if n <= images_per_batch + 1 else n - n % images_per_batch",
    ),
    Fault(
        "sculpt/scoring/evaluation.py",
        "totals[1] + jnp.where(real, losses, 0.0).sum(),",
        "totals[1] + losses.sum(),",
    ),
    Fault(
        "sculpt/scoring/evaluation.py",
        "own = (count - jax.lax.axis_index(POLICY_AXIS) + shards - 1) // shards",
        "own = (count - jax.lax.axis_index(POLICY_AXIS)) // shards",
    ),
    Fault(
        "sculpt/scoring/evaluation.py",
        "rank = jnp.argsort(order)  # the inverse: where a policy stands in `order`",
        "rank = order",
    ),
    Fault(
        "sculpt/repair/linear_layers.py",
        'spread = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"])]',
        'spread = [(high, low, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"])]',
    ),
    Fault(
        "sculpt/repair/reconstruction.py",
        "shift = (mean_missing - mean_row @ change)[0]",
        "shift = (mean_missing + mean_row @ change)[0]",
    ),
    Fault(
        "agents/archive.py",
        "fresh = ~remembered & (first == jnp.arange(number))",
        "fresh = ~remembered",
    ),
    # Agents: credit, PPO, the graph network.
    Fault(
        "agents/credit.py",
        "moment=decay * state.moment + x.T @ scores,",
        "moment=state.moment + x.T @ scores,",
    ),
    Fault(
        "agents/credit.py",
        "others = jnp.sum(contribution, axis=1, keepdims=True) - contribution",
        "others = jnp.sum(contribution, axis=1, keepdims=True)",
    ),
    Fault(
        "agents/ppo.py",
        "return surrogate - entropy * mean_entropy + value_loss, measured",
        "return surrogate + entropy * mean_entropy + value_loss, measured",
    ),
    Fault(
        "agents/ppo.py",
        '"kl": jnp.mean(ratios - 1.0 - shift),  # Schulman\'s estimator: never negative',
        '"kl": jnp.mean(ratios - 1.0 + shift),',
    ),
    Fault(
        "agents/gatv2.py",
        "weights = jnp.exp(scores - highest[segments]) * keep[:, None].astype(scores.dtype)",
        "weights = jnp.exp(scores - highest[segments])",
    ),
    Fault(
        "agents/sensitivity.py",
        'return found.at[row, option].set(worth - dense, mode="drop")',
        'return found.at[row, option].set(dense - worth, mode="drop")',
    ),
    Fault(
        "agents/learning.py",
        "key = jax.random.fold_in(key, state.update)",
        "key = jax.random.fold_in(key, 0)",
    ),
    # Training: zeros held, averages, sums over parts of a batch.
    Fault(
        "sculpt/training/held_zeros.py",
        "return jnp.where(mask, update.astype(weight.dtype), -weight)",
        "return jnp.where(mask, update.astype(weight.dtype), jnp.zeros_like(weight))",
    ),
    Fault("sculpt/training/step.py", "params = program.faded(params, masks, train.step)", "pass"),
    Fault(
        "sculpt/training/step.py",
        "return old + share.astype(leaf.dtype) * (leaf - old)",
        "return old + share.astype(leaf.dtype) * (old - leaf)",
    ),
    Fault(
        "sculpt/training/step.py",
        "gradients = jax.tree.map(lambda g: g / config.accumulate, gradients)",
        "pass",
    ),
    Fault(
        "sculpt/training/augment.py",
        "cut_share = 1.0 - inside.mean(dtype=jnp.float32)",
        "cut_share = share",
    ),
    # Export: folding, ONNX.
    Fault(
        "sculpt/export/folding/chains.py",
        "return scale * other, shift * other",
        "return scale * other, shift",
    ),
    Fault(
        "sculpt/export/folding/chains.py",
        "return (scale, shift - other) if first else (-scale, other - shift)",
        "return (scale, shift - other) if first else (scale, other - shift)",
    ),
    Fault(
        "sculpt/export/onnx/pointwise.py",
        'return [Tensor(writer.node("Where", [which, second, first]), order, shape)]',
        'return [Tensor(writer.node("Where", [which, first, second]), order, shape)]',
    ),
    Fault(
        "sculpt/export/onnx/contractions.py",
        "pads=(*(low for low, _ in padding), *(high for _, high in padding)),",
        "pads=(*(high for _, high in padding), *(low for low, _ in padding)),",
    ),
    Fault("sculpt/export/onnx/contractions.py", "lows.append(reach - low)", "lows.append(reach - high)"),
    Fault(
        "sculpt/export/onnx/windows.py",
        'name = writer.node("CumSum", [writer.held(x, x.order), axis], reverse=int(eqn.params["reverse"]))',
        'name = writer.node("CumSum", [writer.held(x, x.order), axis], reverse=0)',
    ),
)


def record(repository: Path, data: Path) -> None:
    """Runs the fast tests and writes which test runs which line."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "--dist", "worksteal"]
    coverage = ("--cov", "--cov-context=test", "--cov-report=")
    environment = {**os.environ, "COVERAGE_FILE": str(data)}
    subprocess.run([*command, *coverage], cwd=repository, env=environment, check=True)


def tests_by_line(data: Path, file: str) -> dict[int, list[str]]:
    """The tests that run each line of a file."""
    from coverage import CoverageData

    recorded = CoverageData(str(data))
    recorded.read()
    lines: dict[int, list[str]] = {}
    for measured in recorded.measured_files():
        if measured.endswith(f"/{file}"):
            for line, contexts in recorded.contexts_by_lineno(measured).items():
                lines.setdefault(line, []).extend(c.rsplit("|", 1)[0] for c in contexts if c)
    return lines


def nearest_first(fault: Fault, tests: Sequence[str]) -> list[str]:
    """The tests of the fault's own folder first: they tend to be small."""
    folder = fault.file.split("/")[-2]
    return sorted(dict.fromkeys(tests), key=lambda test: not test.startswith(f"tests/{folder}/"))


def copies(repository: Path, number: int, folder: Path) -> Iterator[Path]:
    """Copies of the tracked files, which share one compilation cache."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, check=True
    ).stdout
    for index in range(number):
        copy = folder / f"copy{index}"
        for name in filter(None, tracked.decode().split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(repository / name, copy / name, follow_symlinks=False)
        (repository / ".cache").mkdir(exist_ok=True)
        (copy / ".cache").symlink_to(repository / ".cache")
        yield copy


def is_noticed(fault: Fault, copy: Path, tests: Sequence[str]) -> bool:
    """Runs the tests on a copy with the fault until one fails."""
    if not tests:
        return False
    text = fault.apply(copy)
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", *tests]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run(
            command, cwd=copy, env=environment, timeout=SECONDS_PER_FAULT, capture_output=True, check=False
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        (copy / fault.file).write_text(text)


def main() -> None:
    """Prints a line for each fault, then how many were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, help="coverage data with contexts, of an earlier run of the fast tests"
    )
    parser.add_argument("--only", default="", help="faults of files whose names contain this")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if arguments.only in fault.file]
    places = {fault: fault.place(REPOSITORY) for fault in chosen}
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data
        if data is None:
            data = Path(folder, "coverage")
            record(REPOSITORY, data)
        free: SimpleQueue[Path] = SimpleQueue()
        jobs = os.cpu_count() or 1
        for copy in copies(REPOSITORY, jobs, Path(folder)):
            free.put(copy)

        def judge(fault: Fault) -> bool:
            lines = tests_by_line(data, fault.file)
            # Parts of a statement of several lines may have no record of their own.
            line = max((n for n in lines if n <= places[fault]), default=0)
            copy = free.get()
            try:
                noticed = is_noticed(fault, copy, nearest_first(fault, lines.get(line, [])))
            finally:
                free.put(copy)
            print(
                f"{'noticed' if noticed else 'MISSED '}  {fault.file}:{places[fault]}  {fault.mutant}",
                flush=True,
            )
            return noticed

        with ThreadPoolExecutor(jobs) as pool:
            noticed = sum(pool.map(judge, chosen))
    print(f"{noticed} of {len(chosen)} faults noticed")


if __name__ == "__main__":
    main()

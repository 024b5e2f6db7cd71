"""Searches that were done, one JSON object to a line: kept beside the table that is made of them, so that more can be added elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import commit
from sculpt.digest import digest_of
from sculpt.environment import device_name, versions
from sculpt.files import written_whole
from sculpt.model import Model

NAMES = ("task", "budget", "method", "seed")
"""What tells a record from another."""


def made_on(dense: Model, accuracy: float) -> dict[str, Any]:
    """Where a search is made, and the network it prunes: no two machines train quite the same one."""
    digest = digest_of((dense.params, dense.state))[:12]
    return {
        "commit": commit(),
        "device": device_name(),
        "versions": versions(),
        "dense": f"{accuracy:.2f}% ({digest})",
    }


def place(run: Path, task: str, budget: float, method: str) -> Path:
    """The folder of the searches that differ in the seed alone."""
    return run / task / f"budget{budget}" / method.replace(", ", "-")


def gathered(run: Path, task: str, methods: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Records of a task that are complete in a run directory, by budget, method and seed."""
    for folder in sorted((run / task).glob("budget*")):
        budget = float(folder.name.removeprefix("budget"))
        for method in methods:
            files = place(run, task, budget, method).glob("seed*.json")
            for seed, file in sorted((int(file.stem.removeprefix("seed")), file) for file in files):
                record = dict(zip(NAMES, (task, budget, method, seed), strict=True)) | json.loads(
                    file.read_text()
                )
                for again in sorted(file.parent.glob(f"finetune*-{file.name}")):
                    record["tests"].append(json.loads(again.read_text())["test_accuracy"])
                yield record


def unpack(file: Path, run: Path, evaluations: int) -> None:
    """Puts records where a run directory would have their results, unless it has. Ends the program where they are of searches of another
    length."""
    for line in file.read_text().splitlines():
        record = json.loads(line)
        if record["evaluations"] != evaluations:
            raise SystemExit(
                f"{file} holds searches of {record['evaluations']} evaluations, expected {evaluations}: set --evaluations"
            )
        task, budget, method, seed = (record.pop(name) for name in NAMES)
        into = place(run, task, budget, method) / f"seed{seed}.json"
        if not into.exists():
            with written_whole(into) as temporary:
                temporary.write_text(json.dumps(record))


def keep(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes records, one to a line."""
    with written_whole(file) as temporary:
        temporary.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def origins(records: Iterable[dict[str, Any]]) -> str:
    """Where records were made, in words."""
    counts: Counter[str] = Counter()
    for record in records:
        made = record["made"]
        about = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        counts[f"commit {made['commit']}, {made['device']}, {about}, dense network {made['dense']}"] += 1
    return "; ".join(f"{count} searches at {origin}" for origin, count in counts.items())

"""The records of `benchmarks/bench_controls`: kept, unpacked elsewhere and gathered again; and that the table in the repository is theirs."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.bench_controls import METHODS, improvements, table
from benchmarks.tasks import TASKS
from benchmarks.timing import RESULTS

RECORDS = RESULTS / "bench_controls.jsonl"
EVALUATIONS = 512


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()]


def gathered(run: Path) -> list[dict[str, Any]]:
    return [record for task in TASKS for record in records.gathered(run, task, METHODS)]


def test_records_go_into_a_run_directory_and_come_out_again(
    tmp_path: Path, shipped: list[dict[str, Any]]
) -> None:
    records.unpack(RECORDS, tmp_path / "run", EVALUATIONS)
    records.keep(tmp_path / "again.jsonl", gathered(tmp_path / "run"))
    assert (tmp_path / "again.jsonl").read_text() == RECORDS.read_text()
    assert shipped == [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]


def test_what_was_searched_here_is_not_replaced(tmp_path: Path, shipped: list[dict[str, Any]]) -> None:
    task, budget, method, seed = (shipped[0][name] for name in records.NAMES)
    mine = records.place(tmp_path, task, budget, method) / f"seed{seed}.json"
    mine.parent.mkdir(parents=True)
    mine.write_text(json.dumps({"tests": [1.0]}))
    records.unpack(RECORDS, tmp_path, EVALUATIONS)
    assert json.loads(mine.read_text()) == {"tests": [1.0]}


def test_a_test_with_another_key_is_added(tmp_path: Path, shipped: list[dict[str, Any]]) -> None:
    records.unpack(RECORDS, tmp_path, EVALUATIONS)
    first = shipped[0]
    task, budget, method, seed = (first[name] for name in records.NAMES)
    place = records.place(tmp_path, task, budget, method)
    (place / f"finetune1-seed{seed}.json").write_text(json.dumps({"test_accuracy": 12.5}))
    again = gathered(tmp_path)
    assert again[0]["tests"] == [*first["tests"], 12.5]
    assert again[1:] == shipped[1:]


def test_searches_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"bench_controls.jsonl holds searches of 512 evaluations, expected 64"
    ):
        records.unpack(RECORDS, tmp_path, 64)


def test_the_table_is_made_of_the_records(shipped: list[dict[str, Any]]) -> None:
    text = (RESULTS / "bench_controls.md").read_text()
    parts = {(record["task"], record["budget"]) for record in shipped}
    assert text.count("\n## ") == len(parts)
    for task, budget in parts:
        rows = [record for record in shipped if (record["task"], record["budget"]) == (task, budget)]
        part = "\n".join(["", f"## {task}, budget {budget}", "", *table(rows, EVALUATIONS)])
        assert part in text


def test_improvements_are_policies_better_than_all_before() -> None:
    scores = [None, 0.25, 0.25, 0.5, 0.5]
    history = [
        {"evaluations": 32.0 * (update + 1)} | ({} if best is None else {"best": best})
        for update, best in enumerate(scores)
    ]
    assert improvements(history) == [(64, 0.25), (128, 0.5)]


def test_origins_are_counted(shipped: list[dict[str, Any]]) -> None:
    other = {**shipped[0], "made": {**shipped[0]["made"], "commit": "another"}}
    told = records.origins([shipped[0], shipped[0], other])
    assert told.startswith(f"2 searches at commit {shipped[0]['made']['commit']}, ")
    assert "; 1 searches at commit another, " in told

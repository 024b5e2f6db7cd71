"""What the end of a run reads: the report makes nothing up, and no row of the metrics is there twice."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from sculpt.agents.result import SearchResult
from sculpt.pipeline import Pipeline, progress
from sculpt.pipeline.budget import budget_sentence, latency_note
from sculpt.pipeline.closing import caption_of, chosen_point
from sculpt.pipeline.stages import accuracy_on_front
from sculpt.report import RunDirectory, pareto_plot


def test_the_chosen_policy_is_drawn_where_its_accuracy_is_known() -> None:
    front = ((0.3, 0.7, np.asarray([1, 2])), (0.5, 0.9, np.asarray([0, 1])))
    rest = dict.fromkeys(
        ("history", "evaluations", "unique_evaluations", "seconds", "rerank_seconds", "policies_per_second"),
        0,
    )
    for policy, accuracy in (([0, 1], 0.9), ([2, 2], None)):
        found = SearchResult(
            policy=np.asarray(policy), score=-0.4, used=0.4, macs_ratio=0.4, validation_accuracy=0.8, doubt=None, front=(), pareto=front, method="agent", agent=None,
            **rest,  # type: ignore[arg-type]
        )  # fmt: skip
        assert accuracy_on_front(found) == accuracy
        point = chosen_point({"used": 0.4, "accuracy": accuracy})
        assert point[0] == 0.4 and (np.isnan(point[1]) if accuracy is None else point[1] == accuracy)
        svg = pareto_plot([(m, a) for m, a, _ in front], point, 0.5, 256)
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_the_caption_tells_of_statistics_where_there_are_any() -> None:
    rows = [{"name": name, "latency_ms": 2.0} for name in ("dense", "compact")]
    record = {
        "n_test": 9,
        "n_latency": 3,
        "latency_batch": 2,
        "device": "cpu",
        "versions": {"jax": "1"},
        "n_reconstruct": 0,
    }
    record |= {"rows": rows}
    with_statistics, without = (caption_of({**record, "n_calibration": n}, 0) for n in (64, 0))
    assert "masked: BatchNorm recalibrated on 64 train images, not fine-tuned." in with_statistics
    assert "masked: not fine-tuned." in without and "BatchNorm" not in without
    assert "Compact is no faster than dense here" in without
    fitted = caption_of({**record, "n_calibration": 0, "n_reconstruct": 512}, 0)
    assert "masked: not fine-tuned; reconstructed: fitted to the dense network on 512 train images" in fitted
    faster = record | {"n_calibration": 0, "rows": [rows[0], {"name": "compact", "latency_ms": 1.0}]}
    assert "faster" not in caption_of(faster, 0)


def test_what_the_budget_was_and_what_is_kept_of_it() -> None:
    kept = {"macs": 0.502, "macs_realised": 0.533, "params": 0.4}
    budget = {"asked": 0.5, "resource": ["macs"], "predicted": 0.4993, "kept": kept, "latency": None}
    assert budget_sentence(budget) == (
        " Budget 0.5 of MACs, 0.499 by the search; kept: 0.502 of the MACs, 0.533 of the realised MACs."
    )
    about = {"engine": "onnxruntime", "batch": 32}
    budget |= {"resource": ["latency"], "kept": kept | {"latency": 0.69}, "latency": about}
    assert "kept: 0.690 of the latency in onnxruntime at batch 32, 0.502 of the MACs" in budget_sentence(
        budget
    )
    assert budget_sentence(None) == ""  # of runs that did not note it


def test_predictions_of_latency_that_are_far_off_are_warned_of() -> None:
    told = {
        "engine": "xla",
        "batch": 8,
        "threads": 1,
        "networks": 8,
        "median_error": 0.04,
        "largest_error": 0.1,
    }
    assert "error of 4.0% in the median, 10.0% at the most" in latency_note(told)
    assert "leave the machine" not in latency_note(told)
    assert "leave the machine to the measurement" in latency_note({**told, "median_error": 0.3})


def test_without_a_terminal_progress_is_told_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 70.0, 70.0, 71.0, 140.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=200)
    with progress.watching(console) as bars:
        bars.start("search")
        for done in range(1, 5):
            bars.progress(done, 9, "sizes", f"best {done}")
    assert console.file.getvalue().split("\n") == [  # type: ignore[attr-defined]
        "search    2 of 9 sizes  best 2",
        "search    4 of 9 sizes  best 4",
        "",
    ]


def test_the_first_row_of_a_call_takes_the_place_of_older_ones(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    run.log("search", {"update": 1.0})

    def call(number: int, *epochs: int) -> list[tuple[int, int]]:
        log = Pipeline(run, {})._logger("train", "epoch")
        for epoch in epochs:
            log({"epoch": epoch, "call": number})
        return [(row["epoch"], row["call"]) for row in run.metrics("train")]

    assert call(1, 1, 2, 3) == [(1, 1), (2, 1), (3, 1)]
    # Killed before the checkpoint of the third epoch, resumed behind the second.
    assert call(2, 3, 4) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    # Made again from the start.
    assert call(3, 1) == [(1, 3)]
    assert len(run.metrics("search")) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]

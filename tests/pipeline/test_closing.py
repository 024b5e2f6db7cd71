"""What the end of a run reads: the report makes nothing up, and no row of the metrics is there twice."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sculpt.agents import SearchResult
from sculpt.pipeline import Pipeline
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

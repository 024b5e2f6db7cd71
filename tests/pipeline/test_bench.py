"""Mistakes in what is asked of engines, and the plot of what they say. What they do with a finished run: tests/test_prune.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sculpt.cli import main
from sculpt.pipeline import TrainSettings
from sculpt.report import RunDirectory, latency_plot


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bench latency --engines tvm", "engine must be one of xla, .*got 'tvm'"),
        ("bench latency --engines xla,xla", "engines must be distinct names"),
        ("bench latency --engines ,", "engines must be distinct names, got none"),
        ("bench latency --threads 1000", "threads must be a whole number from 1 to"),
        ("bench latency --batch 0,1", r"batches must be distinct numbers of at least 1, got \[0, 1\]"),
        ("bench latency --batch one", "expected numbers with commas, such as 1,8,32, got 'one'"),
        ("bench latency --batch 1,,8", "expected numbers with commas, such as 1,8,32, got '1,,8'"),
        ("bench latency --repeats 0", "repeats must be at least 1"),
        ("bench", "required: what"),
        ("bench speed", "invalid choice: 'speed'"),
        ("export --format onnx,coreml", "format must be of stablehlo, onnx, litert, model, got coreml"),
        ("export --format ,", "format must be of stablehlo, onnx, litert, model, got none"),
    ],
)
def test_mistakes(tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    RunDirectory.open(tmp_path).settle("train", {"model": "resnet8"})
    try:
        code = main([*options.split(), "--run", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and printed.count("\n") == 1
    assert re.search(message, printed), printed
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_runs_that_are_not_compacted_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.open(tmp_path)
    run.settle("train", dataclasses.asdict(TrainSettings("resnet8", "digits")))
    for command in (["bench", "latency"], ["export", "--format", "onnx"]):
        assert main([*command, "--run", str(tmp_path)]) == 2
        message = (
            f"sculpt: error: {tmp_path} has no finished stage 'compact': run `sculpt compact` on it first\n"
        )
        assert capsys.readouterr().err == message


def test_every_engine_has_a_panel() -> None:
    rows = [
        {"engine": e, "batch": b, "network": n, "median_ms": 2.0 * b, "quartiles_ms": [1.9 * b, 2.2 * b]}
        for e in ("xla", "onnxruntime")
        for b in (1, 8)
        for n in ("dense", "compact")
    ]
    found = ElementTree.fromstring(latency_plot(rows))
    assert len([g for g in found.iter() if re.fullmatch(r"axes_\d", g.get("id", ""))]) == 2
    with pytest.raises(ValueError, match="at least one row"):
        latency_plot([])

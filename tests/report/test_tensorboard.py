"""The metrics of a run as TensorBoard reads them."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from sculpt.cli import main
from sculpt.report import RunDirectory

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def scalars(folder: Path) -> set[tuple[str, int, float]]:
    """(name, step, value) of every scalar in the event files: records of length, checksum, content, checksum."""
    found = set()
    for file in folder.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(v.tag, event.step, round(v.simple_value, 4)) for v in event.summary.value}
            at += 12 + length + 4
    return found


def new_run(folder: Path) -> RunDirectory:
    run = RunDirectory.open(folder)
    with run.locked():
        run.settle("train", {"seed": 0})
    return run


def test_every_number_is_drawn_over_its_counter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path / "run")
    run.log("train", {"epoch": 1, "step": 17, "train_loss": 0.5, "note": "text"})
    run.log("search", {"update": 1, "evaluations": 32, "mean_reward": 0.25})
    for _ in range(2):  # the second call replaces the first
        assert main(["report", "--tensorboard", "--run", str(run.path)]) == 0
    assert capsys.readouterr().out.split() == [str(run.path / "tensorboard")] * 2
    assert scalars(run.path / "tensorboard") == {
        *(("train/epoch", 17, 1.0), ("train/step", 17, 17.0), ("train/train_loss", 17, 0.5)),
        *(("search/update", 32, 1.0), ("search/evaluations", 32, 32.0), ("search/mean_reward", 32, 0.25)),
    }
    assert {p.name for p in run.path.iterdir() if "tensorboard" in p.name} == {"tensorboard"}


def test_without_metrics_or_the_package_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path / "run")
    assert main(["report", "--tensorboard", "--run", str(run.path)]) == 2
    assert "no metrics yet" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["report", "--tensorboard", "--run", str(run.path)]) == 2
    assert "pip install 'autosculpt[tensorboard]'" in capsys.readouterr().err

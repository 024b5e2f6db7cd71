"""Budgets of latency, from the command line to what a finished run tells of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sculpt
from sculpt.cli import main
from sculpt.latency import layer_latency, layer_sizes
from sculpt.latency.layer_latency import load_layers, save_layers
from sculpt.pipeline import Pipeline, artefacts
from sculpt.pruning.compaction.plan import grouped_kernels
from sculpt.report import RunDirectory

pytestmark = pytest.mark.optimised

SMALL = ["--method", "random", "--evaluations", "32", "--rerank", "0", "--devices", "1"]
"""No search to speak of."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained for a few steps."""
    folder = tmp_path_factory.mktemp("latency") / "run"
    options = ["--model", "resnet8", "--dataset", "digits", "--epochs", "1"]
    assert main(["train", *options, "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of its layers few sizes are measured."""
    monkeypatch.setattr(layer_sizes, "_LEVELS", 2)
    # Whatever the machine does beside.
    monkeypatch.setattr(layer_latency, "_line", lambda sums, seconds: np.asarray([0.0, 1.0]))
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def search(run: Path, options: str = "", *more: str) -> int:
    return main(["search", "--run", str(run), *options.split(), *more])


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "stages" / "search.json").read_text())


@pytest.mark.slow
def test_a_budget_of_latency_and_of_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        search(
            run,
            "--families channels --round-to 8 --budget 0.8 --resource latency,params --latency-batch 8",
            *SMALL,
        )
        == 0
    )
    found = record(run)
    assert found["resource"] == "the largest of latency (xla, batch 8), parameters"
    latency = load_layers(run / "layers.safetensors")
    pipeline = Pipeline(RunDirectory.existing(run), {})
    cost = sculpt.cost(pipeline.limited(pipeline.space), found["policy"])
    seconds = float(latency.seconds(pipeline.space, found["policy"])) / latency.resource.total
    assert float(cost.used) == pytest.approx(max(seconds, float(cost.params_ratio)), rel=1e-5)
    assert float(cost.used) <= 0.8 + 1e-5
    told = found["latency"]
    assert (told["engine"], told["batch"], told["threads"]) == ("xla", 8, latency.threads)
    assert told["median_error"] == pytest.approx(float(np.median(latency.error)))
    printed = capsys.readouterr().out
    assert f"{told['networks']} whole networks predicted from their layers with an error of" in printed
    # What was measured is kept: the same search again is the same search.
    (run / "stages" / "search.json").unlink()
    before = (run / "layers.safetensors").read_bytes()
    assert search(run) == 0
    assert (run / "layers.safetensors").read_bytes() == before
    assert record(run)["policy"] == found["policy"]
    # Another machine's latencies are not taken for those of this one.
    (run / "stages" / "search.json").unlink()
    save_layers(dataclasses.replace(latency, device="cpu (abacus, 1 cores)"), run / "layers.safetensors")
    assert search(run) == 2
    assert "was measured on cpu (abacus, 1 cores), this is cpu (" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_that_turns_out_to_be_too_low_can_be_raised(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--families channels --round-to 8 --resource latency --latency-batch 2 --latency-threads 1 --budget 0.001"
    assert search(run, options, *SMALL) == 2
    assert "budget 0.001 cannot be reached" in capsys.readouterr().err
    assert search(run) == 2  # what was asked for is not forgotten
    assert "budget 0.001 cannot be reached" in capsys.readouterr().err
    before = (run / "layers.safetensors").read_bytes()
    assert search(run, "--budget 0.9") == 0
    assert (run / "layers.safetensors").read_bytes() == before  # nor is it measured again
    assert record(run)["latency"]["batch"] == 2
    assert search(run, "--budget 0.8") == 2  # from now on it is fixed
    assert "budget is 0.9 there, 0.8 was asked for" in capsys.readouterr().err
    # In the end what was asked for is measured, where it was asked for.
    for command in (["finetune", "--epochs", "1"], ["compact"], ["evaluate"]):
        assert main([*command, "--run", str(run)]) == 0
    budget = json.loads((run / "result.json").read_text())["budget"]
    assert (budget["asked"], budget["resource"]) == (0.9, ["latency"])
    assert budget["predicted"] <= 0.9 + 1e-5 and budget["kept"]["latency"] > 0.0
    assert (budget["latency"]["batch"], budget["latency"]["threads"]) == (2, 1)


@pytest.mark.slow
def test_layers_measured_for_other_settings_are_measured_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--families channels --round-to 8 --resource latency --latency-batch 2 --budget 0.001"
    assert search(run, options, *SMALL) == 2
    assert not load_layers(run / "layers.safetensors").all_sizes
    assert search(run, "--latency-all-sizes --latency-batch 4") == 2
    latency = load_layers(run / "layers.safetensors")
    assert latency.all_sizes and latency.batch == 4


@pytest.mark.slow
def test_filters_are_grouped_as_the_engine_likes_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def measured(
        model: sculpt.Model, space: sculpt.Space, policy: Any, x: Any, **settings: Any
    ) -> dict[str, int | None]:
        asked.append({"batch": len(x), **settings})
        return dict.fromkeys(grouped_kernels(space), None)

    monkeypatch.setattr(artefacts, "measure_group_overheads", measured)
    options = "--families rect_grouped --resource latency --latency-batch 2 --latency-threads 1 --budget 0.8"
    assert search(run, options, "--method", "uniform", "--devices", "1") == 0
    # What the layers took is told by the search's record: they are not measured again.
    (run / "layers.safetensors").unlink()
    for command in (["finetune", "--epochs", "1"], ["compact"]):
        assert main([*command, "--run", str(run)]) == 0
    assert not (run / "layers.safetensors").exists()
    (settings,) = asked
    assert (settings["engine"], settings["batch"], settings["threads"]) == ("xla", 2, 1)
    compacted = json.loads((run / "stages" / "compact.json").read_text())
    assert compacted["overheads"] and set(compacted["overheads"].values()) == {None}
    assert not any("in groups" in line for line in compacted["arrays"])
    assert any(
        line.endswith("in one piece: groups of filters would cost more than they save")
        for line in compacted["arrays"]
    )
    found = Pipeline(RunDirectory.existing(run), {})
    by_rule = sculpt.compact(found.tuned, found.space, found.policy, masks=found.masks)
    assert any("in groups" in line for line in by_rule.apply.describe())  # type: ignore[attr-defined]
    # What is lost is made again as it was, and not measured again.
    (run / "compact.safetensors").unlink()
    assert main(["compact", "--run", str(run)]) == 0 and len(asked) == 1
    small = Pipeline(RunDirectory.existing(run), {}).small
    assert list(small.apply.describe()) == compacted["arrays"]

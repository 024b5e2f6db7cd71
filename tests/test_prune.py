"""A whole run, small: every artefact, resuming, and the test split left alone until the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.cli import main
from sculpt.pipeline import STAGES, Pipeline, stages
from sculpt.pipeline.progress import Bars
from sculpt.report import RunDirectory, check_result

OPTIONS = [
    *("--model", "resnet8", "--dataset", "digits", "--budget", "0.5", "--seed", "1"),
    *("--train-epochs", "8", "--evaluations", "64", "--rerank", "1", "--epochs", "6"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune") / "run"
    assert main(["prune", *OPTIONS, "--run", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_artefact_is_there(finished: Path) -> None:
    expected = {
        "compact.safetensors",
        "compact.stablehlo",
        "config.json",
        "dense.safetensors",
        "masks.safetensors",
        "metrics.jsonl",
        "params.safetensors",
        "report.html",
        "result.json",
        *(f"plots/{name}.svg" for name in ("graph", "kept", "pareto", "reward")),
        *(f"stages/{name}.json" for name in ("data", *STAGES)),
    }
    assert set(contents(finished)) == expected


def test_the_result(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    check_result(result)
    assert (result["model"], result["dataset"], result["seed"]) == ("resnet8", "digits", 1)
    assert result["splits"] == {"train": 1097, "validation": 300, "test": 400}
    dense, pruned = result["dense"], result["pruned"]
    assert dense["test_accuracy"] > 0.9
    assert pruned["test_accuracy"] > dense["test_accuracy"] - 0.05
    assert 0.4 * dense["macs"] < pruned["macs_theoretical"] <= 0.5 * dense["macs"]
    # Both families are expressed by smaller arrays, so that nothing is lost between the two counts.
    assert pruned["macs_realised"] == pruned["macs_theoretical"]
    assert pruned["params"] < dense["params"]
    assert result["compact_max_abs_diff"] <= 1e-4
    assert result["search"]["evaluations"] == 64


def test_correctness_02_the_saved_masks_and_policy_are_those_of_the_saved_weights(finished: Path) -> None:
    run = Pipeline(RunDirectory.existing(finished), {})
    result = run.run.result()
    assert result["policy"] == run.policy.tolist()
    masks = sculpt.make_masks(run.space, run.dense.params, run.policy)
    for saved, rebuilt, weight in zip(
        *map(jax.tree.leaves, (run.masks, masks, run.tuned.params)), strict=True
    ):
        assert saved.dtype == jnp.bool_
        np.testing.assert_array_equal(saved, rebuilt)
        assert not np.asarray(weight)[~np.asarray(saved)].any()
    kept = sum(int(np.asarray(m).sum()) for m in jax.tree.leaves(run.masks))
    assert kept == result["pruned"]["params"]
    assert result["pruned"]["macs_realised"] == sculpt.count_cost(run.small, run.image)[0]


def test_the_exported_program_is_the_compact_network(finished: Path) -> None:
    run = Pipeline(RunDirectory.existing(finished), {})
    program = sculpt.load_stablehlo(finished / "compact.stablehlo")
    images = run.example
    logits = jax.jit(run.tuned.apply)(run.tuned.params, run.tuned.state, images)
    np.testing.assert_allclose(program(images), logits, atol=1e-4)


def test_the_report_is_one_file_with_every_figure(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("data:image/svg+xml;base64,") == 4
    result = json.loads((finished / "result.json").read_text())
    for figure in (result["dense"]["macs"], result["pruned"]["macs_realised"], result["pruned"]["params"]):
        assert f"{figure:,}" in text
    assert f"{result['pruned']['test_accuracy']:.4f}" in text
    for part in (
        "n = 400 test images",
        "Seed 1",
        result["device"],
        result["versions"]["jax"],
        "theoretical",
        "realised",
    ):
        assert part in text


def test_a_second_call_changes_nothing_and_takes_no_time(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    begin = time.perf_counter()
    assert main(["prune", *OPTIONS, "--run", str(finished)]) == 0
    assert main(["prune", "--run", str(finished)]) == 0
    assert time.perf_counter() - begin < 2.0
    assert contents(finished) == before
    assert capsys.readouterr().out.count("done before") == 2 * len(STAGES)
    assert main(["info", "--run", str(finished)]) == 0
    assert "complete  train, search" in capsys.readouterr().out


def test_other_options_on_a_finished_run_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert main(["prune", *OPTIONS, "--budget", "0.4", "--run", str(finished)]) == 2
    assert "budget is 0.5 there, 0.4 was asked for" in capsys.readouterr().err
    assert main(["search", "--evaluations", "96", "--run", str(finished)]) == 2
    assert "evaluations is 64 there, 96 was asked for" in capsys.readouterr().err
    assert contents(finished) == before


def test_lost_and_damaged_files_are_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "stages" / "export.json").unlink()
    whole = (copy / "params.safetensors").read_bytes()
    (copy / "params.safetensors").write_bytes(whole[:-4])
    assert main(["prune", "--run", str(copy)]) == 2
    assert "params.safetensors is not a readable safetensors file" in capsys.readouterr().err
    (copy / "params.safetensors").write_bytes(whole)
    (copy / "stages" / "search.json").write_text("{")
    assert main(["report", "--run", str(copy)]) == 2
    assert "search.json is damaged" in capsys.readouterr().err


def test_an_interrupted_search_resumes_and_ends_where_it_would_have(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for stage in STAGES[1:]:
        (run / "stages" / f"{stage}.json").unlink()
    (run / "masks.safetensors").unlink()

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bars, "progress", interrupt)
        assert main(["search", "--run", str(run)]) == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    assert not (run / "masks.safetensors").exists()
    assert main(["search", "--run", str(run)]) == 0
    assert (run / "masks.safetensors").read_bytes() == (finished / "masks.safetensors").read_bytes()
    assert not (run / "checkpoints" / "search").exists()


class Counting:
    """Splits that count how often the test part is read."""

    def __init__(self, splits: Any) -> None:
        self._splits = splits
        self.reads = 0

    def __getattr__(self, name: str) -> Any:
        self.reads += name == "test"
        return getattr(self._splits, name)


def test_correctness_05_the_test_split_is_read_once_at_the_end_and_a_chain_of_stages_equals_prune(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Counting] = []

    def load(*arguments: Any, **options: Any) -> Any:
        splits = sculpt.load_data(*arguments, **options)
        shuffled = dataclasses.replace(splits.test, labels=splits.test.labels[::-1].copy())
        counted.append(Counting(dataclasses.replace(splits, test=shuffled)))
        return counted[-1]

    monkeypatch.setattr(stages, "load_data", load)
    train, search, tune = OPTIONS[:4] + OPTIONS[6:10], OPTIONS[4:6] + OPTIONS[10:14], OPTIONS[14:]
    chain = {
        "train": train,
        "search": search,
        "finetune": tune,
        "compact": [],
        "evaluate": [],
        "export": [],
        "report": [],
    }
    for command, options in chain.items():
        assert main([command, *options, "--run", str(tmp_path / "run")]) == 0
        assert sum(c.reads for c in counted) == (0 if list(chain).index(command) < 4 else 1), command
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    assert sum(c.reads for c in counted) == 1
    # Other test labels: the same network, only the test accuracy differs.
    for name in (
        "config.json",
        "dense.safetensors",
        "masks.safetensors",
        "params.safetensors",
        "compact.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name
    chained, pruned = (json.loads((f / "result.json").read_text()) for f in (tmp_path / "run", finished))
    assert chained["policy"] == pruned["policy"]
    assert chained["pruned"]["test_accuracy"] < 0.5 < pruned["pruned"]["test_accuracy"]

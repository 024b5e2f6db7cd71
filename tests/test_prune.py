"""A whole run, small: every artefact, resuming, and the test split left alone until the end."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sculpt
from sculpt.cli import main
from sculpt.pipeline import STAGES, Pipeline, artefacts, policies, stages
from sculpt.pipeline.closing import latency_rows
from sculpt.pipeline.progress import Bars
from sculpt.report import RunDirectory, check_result
from sculpt.report.run_directory import STAGE_FILES, fingerprint, write_json
from sculpt.report.tables import engine_cells
from tests.architectures.equality import distance, outputs
from tests.export.onnx_files import run as run_onnx

OPTIONS = [
    *("--model", "resnet8", "--dataset", "digits", "--budget", "0.5", "--seed", "1"),
    *("--train-epochs", "6", "--evaluations", "64", "--rerank", "1", "--epochs", "3"),
]
pytestmark = pytest.mark.optimised

ONE_DEVICE = ["--devices", "1"]
"""Compiles sooner than a search on all eight; no setting of a run."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune") / "run"
    assert main(["prune", *OPTIONS, *ONE_DEVICE, "--run", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_artefact_is_there(finished: Path) -> None:
    expected = {
        ".lock",
        "agent.safetensors",
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
    assert result["search"]["evaluations"] == 64 >= result["search"]["unique_evaluations"] > 32


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
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2 * len(STAGES)
    for stage, tried in (
        ("train", ""),
        ("search", ", best of 1 after trial fine-tuning"),
        ("finetune", "(, of the network after trial fine-tuning, .*)?"),
    ):
        line = rf"^{stage} +done before +validation accuracy \d+\.\d\d% \(n = 300\){tried}$"
        assert re.search(line, printed, re.MULTILINE)
    assert main(["info", "--run", str(finished)]) == 0
    assert "complete  train, search" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_begins_with_what_another_learned_and_finds_a_front(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    agent = finished / "agent.safetensors"
    assert main(["train", *OPTIONS[:4], "--epochs", "1", "--run", str(run)]) == 0
    options = [
        "--evaluations",
        "32",
        "--rerank",
        "0",
        "--front",
        "0.7,0.3",
        "--agent",
        str(agent),
        *ONE_DEVICE,
    ]
    assert main(["search", "--run", str(run), *options]) == 0
    record = json.loads((run / "stages" / "search.json").read_text())
    assert [point["budget"] for point in record["front"]] == [0.5, 0.7, 0.3]
    assert record["front"][0]["policy"] == record["policy"]
    assert all(point["used"] <= point["budget"] + 1e-5 for point in record["front"])
    assert (run / "agent.safetensors").read_bytes() != agent.read_bytes()  # it has gone on learning
    capsys.readouterr()
    # What is no agent is refused before anything is done.
    for file, message in (
        (finished / "params.safetensors", "not the parameters of an agent"),
        (tmp_path / "absent.safetensors", "absent.safetensors"),
    ):
        fresh = tmp_path / file.stem
        assert main(["prune", *OPTIONS, "--agent", str(file), "--run", str(fresh)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (fresh / "stages" / "train.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--resource", "flops"],
            "resource must be of macs, macs_realised, params, latency, each once, got flops",
        ),
        (["--latency-batch", "4"], "no latency is measured without --resource latency"),
        (["--resource", "latency", "--latency-engine", "tensorrt"], "engine must be one of"),
        (["--resource", "params", "--budget", "0.0001"], "of its parameters; raise the budget"),
    ],
)
def test_impossible_resources_are_refused(
    options: list[str], message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for stage in ("search", "finetune", "compact", "evaluate", "export", "report"):
        (run / "stages" / f"{stage}.json").unlink(missing_ok=True)
    sections = {"train": RunDirectory.existing(finished).config["train"]}
    write_json(run / "config.json", {"fingerprint": fingerprint(sections), "sections": sections})
    capsys.readouterr()
    assert main(["search", "--run", str(run), *options]) == 2
    assert message in capsys.readouterr().err


def test_other_options_on_a_finished_run_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert main(["prune", *OPTIONS, "--budget", "0.4", "--run", str(finished)]) == 2
    assert "budget is 0.5 there, 0.4 was asked for" in capsys.readouterr().err
    assert main(["search", "--evaluations", "96", "--run", str(finished)]) == 2
    assert "evaluations is 64 there, 96 was asked for" in capsys.readouterr().err
    assert contents(finished) == before


@pytest.mark.slow
def test_whatever_is_removed_is_made_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = Pipeline(RunDirectory.existing(finished), {})
    # Training has tests of its own; here it is enough that it is asked for.
    monkeypatch.setattr(stages, "train", lambda *arguments, **hooks: whole.dense)
    monkeypatch.setattr(stages, "finetune", lambda *arguments, **hooks: whole.tuned)
    monkeypatch.setattr(stages, "search", None)  # the record still knows the policy
    monkeypatch.setattr(stages.closing, "measure", None)  # and what the test split gave
    for files in STAGE_FILES.values():
        for name in files:
            (run / name).unlink()
    assert main(["info", "--run", str(run)]) == 0
    assert "complete  nothing yet" in capsys.readouterr().out
    assert main(["evaluate", "--run", str(run)]) == 0
    assert main(["compact", "--run", str(run)]) == 2
    assert "params.safetensors is not there: `sculpt finetune` on" in capsys.readouterr().err
    assert main(["prune", "--run", str(run)]) == 0
    before, after = contents(finished), contents(run)
    assert set(after) == set(before)
    for name in ("result.json", *(n for n in before if n.endswith((".safetensors", ".svg")))):
        assert after[name] == before[name], name
    first, second = (sculpt.load_stablehlo(folder / "compact.stablehlo") for folder in (finished, run))
    np.testing.assert_array_equal(first(whole.example), second(whole.example))
    (run / "result.json").write_text("garbage")
    assert main(["evaluate", "--run", str(run)]) == 0
    assert (run / "result.json").read_bytes() == before["result.json"]


def test_the_better_of_two_fine_tuned_networks_is_kept(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = Pipeline(RunDirectory.existing(finished), {})
    monkeypatch.setattr(stages, "finetune", lambda *arguments, **hooks: worse)
    worse = whole.tuned.replace(params=jax.tree.map(jnp.zeros_like, whole.tuned.params))
    (run / "params.safetensors").unlink()
    (run / "stages" / "finetune.json").unlink()
    assert main(["finetune", "--run", str(run)]) == 0
    after = Pipeline(RunDirectory.existing(run), {})
    record = after.run.record("finetune")
    assert record["from_trial"]
    assert record["validation_accuracy"] == after.run.record("search")["validation_accuracy"] > 0.5
    for weight, mask in zip(*map(jax.tree.leaves, (after.tuned.params, after.masks)), strict=True):
        assert not np.asarray(weight)[~np.asarray(mask)].any()


@pytest.mark.slow
def test_a_finished_run_is_reported_and_exported_without_its_data_and_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def moved(*arguments: Any, **options: Any) -> None:
        raise ValueError("no digits here")

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    sections = RunDirectory.existing(run).config
    sections["train"] |= {"weights": "/moved/weights.safetensors", "train_epochs": 20}
    write_json(run / "config.json", {"fingerprint": fingerprint(sections), "sections": sections})
    for name in ("report.html", "compact.stablehlo"):
        (run / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "load_data", moved)
        assert main(["export", "--run", str(run)]) == 0
        assert main(["report", "--run", str(run)]) == 0
        (run / "dense.safetensors").unlink()
        assert main(["train", "--run", str(run)]) == 2
        assert "no digits here" in capsys.readouterr().err
    assert (run / "compact.stablehlo").is_file() and (run / "report.html").is_file()
    assert main(["train", "--run", str(run)]) == 2
    assert "no weights at /moved/weights.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_by_loss_and_another_importance(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    for name in ("dense.safetensors", "stages/train.json", "stages/data.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / name, folder / name)
    sections = {"train": RunDirectory.existing(finished).config["train"]}
    write_json(folder / "config.json", {"fingerprint": fingerprint(sections), "sections": sections})
    asked: list[Any] = []

    def keep(model: Any, masks: Any, splits: Any, config: Any, *arguments: Any, **hooks: Any) -> Any:
        asked.append(config)
        return sculpt.apply_masks(model, masks)

    monkeypatch.setattr(stages, "finetune", keep)
    wishes = ["--importance", "l1", "--objective", "loss", "--score-images", "64"]
    cheap = ["--method", "uniform", "--rerank", "0", "--calibration-images", "64"]
    assert main(["search", *wishes, *cheap, *ONE_DEVICE, "--run", str(folder)]) == 0
    for stage in (
        ["finetune", "--finetune-clip-norm", "2", "--reconstruct-images", "32"],
        ["compact"],
        ["evaluate"],
    ):
        assert main([*stage, "--run", str(folder)]) == 0
    assert (asked[0].augment, asked[0].clip_norm) == ("shift", 2.0)
    run = Pipeline(RunDirectory.existing(folder), {})
    found = run.run.record("search")
    assert found["score"] < 0 < found["accuracy"] <= 1
    assert found["n_score"] == 64
    scores = run.ranked_space.importance
    assert scores is not None and scores.kind == "l1"
    by_energy = sculpt.make_masks(run.space, run.dense.params, run.policy)
    by_l1 = sculpt.make_masks(run.ranked_space, run.dense.params, run.policy)
    leaves = [jax.tree.leaves(tree) for tree in (run.masks, by_l1, by_energy)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))
    # Before the first step what stays was fitted to the dense network.
    images = run.splits.normalise(run.splits.validation.images[:64])
    masked = sculpt.apply_masks(run.dense, run.masks)
    dense, untouched, fitted = (m.apply(m.params, m.state, images) for m in (run.dense, masked, run.tuned))
    assert np.square(fitted - dense).mean() < np.square(untouched - dense).mean()
    rows = {row["name"]: row for row in run.run.record("evaluate")["rows"]}
    assert list(rows) == ["dense", "masked", "reconstructed", "fine-tuned", "compact"]
    told = json.loads((folder / "result.json").read_text())["pruned"]["test_accuracy_before_finetune"]
    assert told == rows["reconstructed"]["accuracy"]
    # The compact network keeps those channels too.
    assert run.run.record("compact")["max_abs_diff"] <= 1e-4


def test_lost_and_damaged_files_are_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "stages" / "export.json").unlink()
    whole = (copy / "params.safetensors").read_bytes()
    (copy / "params.safetensors").write_bytes(whole[:-4])
    assert main(["prune", "--run", str(copy)]) == 2
    assert "params.safetensors is damaged: it is not as `sculpt finetune` wrote it" in capsys.readouterr().err
    (copy / "params.safetensors").write_bytes(whole)
    (copy / "stages" / "search.json").write_text("{")
    (copy / "report.html").unlink()
    assert main(["report", "--run", str(copy)]) == 2
    assert "search.json is damaged" in capsys.readouterr().err
    (copy / "stages" / "search.json").write_text("{}")
    shutil.copy(finished / "stages" / "export.json", copy / "stages")
    assert main(["report", "--run", str(copy)]) == 2
    error = capsys.readouterr().err
    assert "search.json is damaged (it is not as it was written); remove it to have it made again" in error
    assert error.count("\n") == 1


@pytest.mark.slow
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
        assert main(["search", *ONE_DEVICE, "--run", str(run)]) == 130
    assert "interrupted; the same command resumes" in capsys.readouterr().err
    assert not (run / "masks.safetensors").exists()
    assert main(["search", "--devices", "64", "--run", str(run)]) == 2
    assert "--devices must be from 1 to 8" in capsys.readouterr().err
    assert main(["search", "--devices", "2", "--run", str(run)]) == 0
    # What the finished run and the interrupted call had logged of the search makes room for the rows of this call.
    assert [row["update"] for row in RunDirectory.existing(run).metrics("search")] == [1, 2]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6 + 2 + 3
    assert (run / "masks.safetensors").read_bytes() == (finished / "masks.safetensors").read_bytes()
    assert not (run / "checkpoints" / "search").exists()


@pytest.mark.slow
def test_devices_share_the_batches_of_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether the network after trial fine-tuning is better is not the question here.
    monkeypatch.setattr(Pipeline, "_better", lambda self, model: (model, self._validated(model)))
    files = [finished / "dense.safetensors"]
    for devices in ("1", "2"):
        run = tmp_path / devices
        shutil.copytree(finished, run)
        (run / "params.safetensors").unlink()
        assert main(["finetune", "--devices", devices, "--run", str(run)]) == 0
        files.append(run / "params.safetensors")
    begun, alone, shared = (
        np.concatenate([array.reshape(-1) for _, array in sorted(load_file(file).items())]) for file in files
    )
    # Sums are rounded in another order, and training carries that on.
    assert 0 < np.linalg.norm(shared - alone) < 0.1 * np.linalg.norm(begun - alone)


class Counting(sculpt.Splits):
    """Splits that count how often the test part is read."""

    reads = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "test":
            object.__setattr__(self, "reads", self.reads + 1)
        return super().__getattribute__(name)


@pytest.mark.slow
def test_correctness_05_the_test_split_is_read_once_at_the_end_and_a_chain_of_stages_equals_prune(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Counting] = []

    def load(*arguments: Any, **options: Any) -> Any:
        splits = sculpt.load_data(*arguments, **options)
        shuffled = dataclasses.replace(splits.test, labels=splits.test.labels[::-1].copy())
        counted.append(Counting(**{**vars(splits), "test": shuffled}))
        return counted[-1]

    monkeypatch.setattr(artefacts, "load_data", load)
    train, tune = OPTIONS[:4] + OPTIONS[6:10], OPTIONS[14:]
    search = OPTIONS[4:6] + OPTIONS[10:14] + ONE_DEVICE
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


@pytest.mark.slow
def test_many_policies_of_a_finished_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCULPT_CACHE_DIR", str(tmp_path / "cache"))
    before = contents(finished)
    policy = json.loads((finished / "result.json").read_text())["policy"]
    source, out = tmp_path / "policies.jsonl", tmp_path / "scores.jsonl"
    source.write_text(f"{[0] * len(policy)}\n{policy}\n{policy}\n")
    base = ["evaluate", "--run", str(finished), "--policies", str(source), "--out", str(out)]
    sizes = ["--images", "64", "--calibration-images", "64"]
    fixed = ["--images-per-batch", "64", "--policy-shards", "2"]
    assert main([*base, *sizes, *fixed]) == 0
    text = capsys.readouterr().out
    assert "plan: 1 policies x 64 images at a time, lax convolutions in float32, 2 x 1 devices" in text
    assert f"policies in {out}: 3, 0 of them from before; 2 evaluated, 33% remembered" in text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row.pop("crc32") for row in rows)
    assert [row["policy"] for row in rows] == [[0] * len(policy), policy, policy]
    assert rows[0]["macs_ratio"] == pytest.approx(1.0, rel=1e-6) and rows[1] == rows[2] | {"index": 1}
    assert rows[0]["accuracy"] >= rows[1]["accuracy"]
    assert main([*base, *sizes, *fixed]) == 0
    assert "3 of them from before; 0 evaluated" in capsys.readouterr().out
    assert contents(finished) == before
    for wrong, message in (
        (["--images", "65"], "belongs to another task (other data sha256, images"),
        (["--images", "0"], "--images of at least 1"),
        (["--images", "99999"], "--images 99999 is more than the"),
        (["--convolution", "fft"], "convolution must be one of lax, im2col"),
        (["--calibration-images", "65"], "got 65: take 64 or 128"),
        (["--explain"], "--explain says how a plan was tuned"),
        (["--policy-shards", "9"], "the plan uses 9 x 1 devices, there are 8"),
    ):
        assert main([*base, *sizes, *fixed, *wrong]) == 2
        assert message in capsys.readouterr().err
    half = [*base[:-1], str(tmp_path / "half.jsonl"), *sizes, *fixed, "--precision", "bfloat16"]
    assert main(half) == 0
    assert (
        "bfloat16 beside float32, 3 policies on 64 images: accuracy differs by 0." in capsys.readouterr().out
    )
    # digits has fewer than 512 validation images: all of them.
    whole = [
        "evaluate",
        "--run",
        str(finished),
        "--policies",
        str(source),
        "--out",
        str(tmp_path / "all.jsonl"),
    ]
    assert main([*whole, "--calibration-images", "64", *fixed]) == 0
    accuracy = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])["accuracy"]
    count = len(Pipeline(RunDirectory.existing(finished), {}).splits.validation.labels)
    assert count < 512 and accuracy * count == pytest.approx(round(accuracy * count), abs=1e-3)
    assert main(["evaluate", "--run", str(finished), "--policies", str(source)]) == 2
    assert "scores of many policies need --out" in capsys.readouterr().err


def test_a_search_on_an_accelerator_tunes_its_plan(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def tuned(model: Any, space: Any, images: Any, labels: Any, calibration: Any, **options: Any) -> Any:
        asked.update(images=len(images), labels=len(labels), calibration=len(calibration), **options)
        return sculpt.Tuning(
            sculpt.EvaluationPlan(8, 256, policy_shards=4, image_shards=2), (), "8 x gpu", None
        )

    folder = RunDirectory.existing(finished)
    config = Pipeline(folder, {}).search_settings.config()
    assert Pipeline(folder, {})._plan(config) == sculpt.EvaluationPlan(policy_shards=8)
    monkeypatch.setattr(stages, "tune_plan", tuned)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Pipeline(folder, {}, plans=Path("plans"))._plan(config).image_shards == 2
    told = {"images": 256, "labels": 256, "calibration": 128, "cache": Path("plans"), "repair": "recalibrate"}
    assert asked == told
    assert Pipeline(folder, {}, devices=3)._plan(config) == sculpt.EvaluationPlan(8, 256, policy_shards=3)


def test_bad_policies_are_found_before_a_plan_is_tuned(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "tune_plan", None)
    run, source = tmp_path / "run", tmp_path / "policies.jsonl"
    shutil.copytree(finished, run)

    def fails(message: str, out: str = "scores.jsonl") -> None:
        files = ["--policies", str(source), "--out", str(tmp_path / out)]
        assert main(["evaluate", "--run", str(run), *files, "--images", "64"]) == 2
        assert message in capsys.readouterr().err

    source.write_text("\n")
    fails("holds no policy")
    source.write_text("[0, 0, 0]\n")
    fails(f"{source} holds the policies: name another file", source.name)
    fails("scores are written to .jsonl or .parquet files", "scores.csv")
    fails(f"{source}, policy 0: expected policies as integers")
    source.write_text(f"{[99] * len(RunDirectory.existing(run).result()['policy'])}\n")
    fails("policy 0: site")
    directory = RunDirectory.existing(run)
    directory.complete("data", directory.record("data") | {"sha256": "of other images"})
    fails("the data set digits is not the one that")


@pytest.mark.slow
def test_latency_in_engines_is_measured_printed_kept_and_reported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished, run.path)
    config = (run.path / "config.json").read_bytes()
    assert latency_rows(run) == []
    assert "In engines" not in (run.path / "report.html").read_text()
    options = ["--engines", "xla,onnxruntime", "--threads", "1", "--batch", "1,3", "--repeats", "2"]
    assert main(["bench", "latency", "--run", str(run.path), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("onnxruntime ") >= 2 and "dense / compact" in printed
    rows = json.loads((run.path / "latency.json").read_text())["rows"]
    assert [(r["engine"], r["batch"], r["network"]) for r in rows] == [
        (engine, batch, network)
        for engine in ("xla", "onnxruntime")
        for batch in (1, 3)
        for network in ("dense", "compact")
    ]
    for row in rows:
        assert 0 < row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
        assert (row["n"], row["threads"], row["precision"]) == (2, 1, "float32")
    report = (run.path / "report.html").read_text()
    assert "latency, compact, onnxruntime, threads 1, batch 3" in report
    for engine, *cells in engine_cells(rows):
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        assert f"<td>{engine}</td>{numbers}" in report
    svg = (run.path / "plots" / "latency.svg").read_bytes()
    assert base64.b64encode(svg).decode() in report
    assert run.done("report")
    assert (run.path / "config.json").read_bytes() == config


def test_files_for_engines(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished, run.path)
    assert main(["export", "--run", str(run.path), "--format", "stablehlo,onnx,model"]) == 0
    files = ("compact.stablehlo", "compact.onnx", "model.json")
    assert capsys.readouterr().out.endswith("".join(f"{run.path / name}\n" for name in files))
    pipeline = Pipeline(run, {})
    x = pipeline.noise(5)
    expected = outputs(pipeline.small, x)
    assert distance(expected, run_onnx(run.path / "compact.onnx", x)) <= 1e-4
    assert distance(expected, sculpt.load_stablehlo(run.path / "compact.stablehlo")(x)) <= 1e-4
    loaded = sculpt.load_model(run.path / "model")
    assert distance(expected, outputs(loaded, x)) <= 1e-6
    assert loaded.describe() == pipeline.small.describe()

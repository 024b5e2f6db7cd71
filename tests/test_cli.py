"""Bad input at the command line: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import sculpt
from sculpt import nets
from sculpt.cli import main, make_parser
from sculpt.cli.console import print_any_text
from sculpt.pipeline import TrainSettings, stages
from sculpt.pruning.importance.scores import KINDS
from sculpt.report import RunDirectory
from sculpt.training.config import FinetuneConfig
from sculpt.training.finetuning import TrainingDiverged
from sculpt.training.recipes import RECIPES


def run_main(*arguments: object) -> int:
    """The exit code, whether returned or, by argparse, raised."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def fails(capsys: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    assert run_main(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sculpt: error: ")
    assert printed.count("\n") == 1
    assert re.search(message, printed), printed


NEW = ("--model", "resnet8", "--dataset", "digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet9", "--dataset", "digits"), "unknown model 'resnet9'.*did you mean 'resnet"),
        (("--model", "resnet8", "--dataset", "digit"), "unknown data set 'digit'.*did you mean 'digits'"),
        ((*NEW, "--families", "channels,rekt"), "unknown pattern family 'rekt'.*did you mean 'rect'"),
        ((*NEW, "--families", ""), "families must be distinct names"),
        ((*NEW, "--budget", "0"), r"budget.*\(0, 1\].*got 0"),
        ((*NEW, "--budget", "1.5"), r"budget.*\(0, 1\].*got 1.5"),
        ((*NEW, "--budget", "nan"), "budget"),
        ((*NEW, "--budget", "half"), "invalid float value: 'half'"),
        ((*NEW, "--budget", "0.0001"), r"budget 0.0001 cannot be reached.*can keep 0\.\d+ to 1"),
        ((*NEW, "--budget", "0.1", "--families", "rect"), "budget 0.1 cannot be reached"),
        ((*NEW, "--method", "luck"), "method must be one of agent, table, random"),
        (
            (*NEW, "--method", "evolutoin"),
            "--method must be one of .*got 'evolutoin'; did you mean 'evolution'",
        ),
        ((*NEW, "--importance", "enrgy"), "importance must be .*got 'enrgy'; did you mean 'energy'"),
        ((*NEW, "--resource", "latncy"), "resource must be .*got latncy; did you mean 'latency'"),
        ((*NEW, "--recipe", "mobil"), "recipe must be .*got 'mobil'; did you mean 'mobile'"),
        ((*NEW, "--evaluations", "0"), "error: --evaluations must be a whole number of at least 1, got 0"),
        ((*NEW, "--rerank", "-1"), "error: --rerank must be a whole number of at least 0, got -1"),
        ((*NEW, "--objective", "speed"), "objective must be one of accuracy, loss"),
        ((*NEW, "--importance", "luck"), "importance must be one of energy, .*got 'luck'"),
        (
            (*NEW, "--importance", "l1", "--families", "rect"),
            "leave out --importance l1.*rect removes no channels",
        ),
        ((*NEW, "--round-to", "8", "--families", "rect"), "leave out --round-to 8.*rect removes no channels"),
        (
            (*NEW, "--weights", "w", "--train-epochs", "3"),
            "leave out --train-epochs 3.*weights are not trained",
        ),
        ((*NEW, "--weights", "w", "--train-learning-rate", "1"), "leave out --train-learning-rate 1.0"),
        ((*NEW, "--weights", "w", "--train-clip-norm", "1"), "leave out --train-clip-norm 1.0"),
        ((*NEW, "--data-dir", "data"), "leave out --data-dir /.*/data,.*digits comes with the package"),
        ((*NEW, "--image-size", "16"), "leave out --image-size 16,.*digits is small and of one size"),
        (
            (*NEW, "--stream"),
            "leave out --stream, which would have no effect: digits is small and of one size",
        ),
        ((*NEW[:3], "folder", "--image-size", "0"), "size must be a whole number of pixels of at least 1"),
        ((*NEW, "--devices", "64"), r"--devices must be from 1 to 8, .*got 64"),
        ((*NEW, "--devices", "0"), r"--devices must be from 1 to 8, .*got 0"),
        ((*NEW, "--devices", "3"), "3 devices cannot share a batch of 64 images evenly"),
        ((*NEW, "--score-images", "0"), "error: --score-images must be a whole number of at least 1"),
        ((*NEW, "--score-images", "1000"), "need 1128 images of the train split of digits, which has 1097"),
        ((*NEW, "--calibration-images", "896"), "--calibration-images 896 need 1152 images"),
        ((*NEW, "--calibration-images", "65"), "--calibration-images must be .*got 65: take 64 or 128"),
        ((*NEW, "--latency-all-sizes"), "no latency is measured without --resource latency"),
        ((*NEW, "--repair", "mend"), "--repair must be one of recalibrate, reconstruct, got 'mend'"),
        (
            (*NEW, "--augment", "mirror"),
            "augment must be one of none, shift, crop_flip, resized_crop, got 'mirror'",
        ),
        ((*NEW, "--train-clip-norm", "0"), "error: --train-clip-norm must be above 0"),
        ((*NEW, "--finetune-clip-norm", "-1"), "error: --finetune-clip-norm must be above 0"),
        ((*NEW, "--round-to", "0"), "error: --round-to must be a whole number of at least 1"),
        ((*NEW, "--train-epochs", "0"), "error: --train-epochs must be"),
        ((*NEW, "--epochs", "0"), "error: --finetune-epochs must be"),
        ((*NEW, "--finetune-learning-rate", "-1"), "error: --finetune-learning-rate must be"),
        ((*NEW, "--seed", "-1"), "error: --seed must be from 0 to 4294967295"),
        ((*NEW, "--weights", "absent.safetensors"), "no weights at /.*/absent.safetensors"),
        ((*NEW[:3], "cifar10", "--data-dir", "absent"), "no such data directory: /.*/absent"),
        (("--model", "resnet8"), "a new run needs --dataset"),
        ((), "a new run needs --dataset and --model"),
        (
            (*NEW, "--bugdet", "0.5"),
            "unrecognized arguments: --bugdet 0.5; did you mean '--budget'.*sculpt prune",
        ),
        ((*NEW, "--bugdet=0.5"), "unrecognized arguments: --bugdet=0.5; did you mean '--budget'"),
        ((*NEW, "--evaluations", "1"), "error: --evaluations=1 is less than one update"),
        ((*NEW, "--batch-size", "2000"), "error: --batch-size is 2000, more than the 1097 images"),
        ((*NEW[:3], "folder"), "error: folder needs --data-dir, the folder that holds train"),
        ((*NEW, "--skip-unreadable"), "leave out --skip-unreadable, .*digits is small"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    fails(capsys, message, "prune", "--run", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_missing_and_foreign_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("prune", *NEW, "--run", tmp_path / "run", "--weights")
    other = tmp_path / "other.safetensors"
    sculpt.save_params({"conv1.weight": jnp.zeros((2, 2))}, other)
    fails(capsys, "does not fit resnet8 with 10 classes: missing", *run, other)
    other.write_bytes(b"nothing of use")
    fails(capsys, "not a readable safetensors file", *run, other)
    assert not (tmp_path / "run").exists()


def test_weights_for_images_of_another_shape(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shared_data / "weights" / "cifar10_resnet20.safetensors"
    arguments = (
        "prune",
        "--model",
        "resnet20",
        "--dataset",
        "digits",
        "--weights",
        weights,
        "--run",
        tmp_path / "run",
    )
    fails(capsys, r"does not take the images \[8, 8, 1\] of digits", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_data_folder_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--model",
        "resnet20",
        "--dataset",
        "cifar10",
        "--data-dir",
        tmp_path,
        "--run",
        tmp_path / "run",
    )
    fails(capsys, re.escape(str(tmp_path)), "prune", *arguments)
    assert not (tmp_path / "run").exists()


def test_no_command_and_no_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    fails(
        capsys,
        "required: train",
    )
    fails(capsys, "invalid choice: 'trim'", "trim")
    fails(capsys, "required: --run", "prune", *NEW)


@pytest.mark.parametrize("command", ["search", "finetune", "compact", "evaluate", "export", "report"])
def test_a_stage_before_its_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    fails(capsys, "is no run directory: it has no config.json", command, "--run", tmp_path)
    run = RunDirectory.open(tmp_path / "run")
    run.settle("train", TRAIN)
    fails(capsys, "has no finished stage 'train'", command, "--run", run.path)


TRAIN = dataclasses.asdict(TrainSettings("resnet8", "digits"))


def test_foreign_and_damaged_run_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.open(tmp_path / "run")
    run.settle("train", TRAIN | {"seed": 3})
    arguments = ("prune", *NEW, "--run", run.path)
    fails(
        capsys,
        "another configuration: seed is 3 there, 4 was asked for; choose another --run",
        *arguments,
        "--seed",
        4,
    )

    run.complete("data", {"sha256": "of other images", "parameters": 1})
    fails(capsys, "the data set digits is not the one", *arguments)

    config = json.loads((run.path / "config.json").read_text())
    config["sections"]["train"]["seed"] = 5
    (run.path / "config.json").write_text(json.dumps(config))
    fails(capsys, r"config.json is damaged .*choose another --run", *arguments)

    (run.path / "config.json").unlink()
    fails(capsys, "is not empty and is no run directory", *arguments)
    (tmp_path / "file").write_text("")
    fails(capsys, "is a file", "prune", *NEW, "--run", tmp_path / "file")


def test_a_run_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.open(tmp_path / "run")
    run.settle("train", {"model": "resnet8", "dataset": "digits", "colour": "red"})
    fails(capsys, r"another version, .*lack \['augment', .*unknown \['colour'\]", "prune", "--run", run.path)


def test_two_processes_on_one_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.open(tmp_path / "run")
    with run.locked():
        fails(capsys, f"another process is working on {run.path}: wait", "train", *NEW, "--run", run.path)
    assert [file.name for file in run.path.iterdir()] == [".lock"]


def test_an_absent_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise AssertionError  # what JAX_PLATFORMS=cuda ends in where jax has no CUDA

    monkeypatch.setattr(jax, "devices", absent)
    fails(capsys, r"no device for JAX_PLATFORMS=\w*: set it to", "prune", *NEW, "--run", tmp_path / "run")
    fails(capsys, r"no device for JAX_PLATFORMS=\w*: set it to .*JAX found none", "info")


def test_diverged_training_names_options_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[FinetuneConfig] = []

    def diverge(
        model: object, splits: object, config: FinetuneConfig, *more: object, **hooks: object
    ) -> None:
        asked.append(config)
        raise TrainingDiverged(2, 7, None)

    monkeypatch.setattr(stages, "train", diverge)
    run = ("train", *NEW, "--augment", "none", "--train-clip-norm", "3", "--run", tmp_path / "run")
    fails(capsys, "diverged in epoch 2, step 7.*--train-learning-rate.*--train-clip-norm 1", *run)
    assert (asked[0].augment, asked[0].clip_norm) == ("none", 3.0)


def test_debug_shows_where_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model"):
        main(["prune", "--model", "x", "--dataset", "digits", "--run", str(tmp_path / "run"), "--debug"])


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("info") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"networks {', '.join(nets.list_models())} families channels: faster on any engine rect:" in printed
    )
    assert "unstructured: faster on no engine (theoretical MACs only)" in printed
    assert run_main("info", *NEW, "--families", "rect") == 0
    printed = capsys.readouterr().out
    assert "stage1_block01/conv1" in printed
    assert "747,136 MACs per image" in printed
    assert "channels" not in printed.split("frozen")[0]
    assert run_main("info", *NEW, "--families", "channels,2:4") == 0
    assert "2:4: zeros stay in place; faster on GPUs with sparse tensor cores" in capsys.readouterr().out
    assert run_main("info", *NEW, "--exclude", "head,stage1_block01") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "frozen: excluded by you: " in printed and "stage1_block01/conv1 channels (16)" in printed
    fails(capsys, "did you mean 'stage1_block01'", "info", *NEW, "--exclude", "stage1_blok01")
    fails(capsys, "cannot be reached", "info", *NEW, "--budget", "0.00001")
    assert run_main("info", "vit_tiny_patch16") == 0
    assert "MACs per image of 224 x 224 x 3, 5,717,416 weights" in capsys.readouterr().out


def test_info_takes_no_option_without_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--seed", "--evaluations", "--rerank", "--method", "--weights"):
        fails(capsys, f"unrecognized arguments: {option}", "info", *NEW, option, "1")
    fails(capsys, "info about a network needs its name: sculpt info MODEL", "info", "--families", "rect")
    fails(capsys, "name the network once, got resnet20 and --model resnet8", "info", "resnet20", *NEW)
    fails(
        capsys, "info about a run goes without --data-dir", "info", "--run", tmp_path, "--data-dir", tmp_path
    )


def test_help_names_every_importance(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("search", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(KINDS[:-1])} or {KINDS[-1]} (energy)" in printed


def test_help_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("train", "--help") == 0
    assert ", ".join(RECIPES) in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--version") == 0
    assert capsys.readouterr().out == f"sculpt {sculpt.__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sculpt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"sculpt {sculpt.__version__}\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("folder needs data_dir, the folder", "folder needs --data-dir, the folder"),
        ("no file /data/data_dir/image_size.png", "no file /data/data_dir/image_size.png"),
        ("it lacks 'data_dir'", "it lacks 'data_dir'"),
        ("leave them out with skip_unreadable", "leave them out with --skip-unreadable"),
        ("size must be a whole number", "--image-size must be a whole number"),
        ("SearchConfig.score_images must be 1", "--score-images must be 1"),
        ("is no option of this: load_layers(my_data)", "is no option of this: load_layers(my_data)"),
    ],
)
def test_messages_name_options(message: str, expected: str) -> None:
    parser = vars(make_parser().parse_args(["prune", "--run", "r"]))["parser"]
    assert parser.in_options(message, ()) == expected


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_terminal_that_knows_ascii_only(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, "ascii", write_through=True))
    print_any_text()
    print("\u2501 policies \u00d7 64", file=getattr(sys, stream))
    assert raw.getvalue() == b"? policies ? 64\n"

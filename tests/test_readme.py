"""What the README says works: its Python runs, its commands parse (and, in the slow suite, run)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import sculpt
from sculpt.cli import main, make_parser
from sculpt.latency import layer_latency, layer_sizes
from tests.conftest import untrained_digits

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("sculpt ")]
TARGETS = re.findall(r"^make ([a-z-]+)", "\n".join(blocks("bash")), re.MULTILINE)


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    code, *_ = blocks("python")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "jax"), "PYTHONPATH": str(REPOSITORY)}
    optimised = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **cache, **optimised},
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"accuracy (\S+) -> (\S+) on", done.stdout)[0])
    assert before > 0.9
    assert after > before - 0.05
    dense, small = map(int, re.findall(r"\((\d+), \d+\)", done.stdout))
    assert small <= 0.5 * dense
    assert (tmp_path / "digits.stablehlo").stat().st_size > 0


@pytest.mark.slow
def test_the_reconstruction_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in blocks("python") if "sculpt.reconstruct" in block]
    model, splits = untrained_digits(), sculpt.load_data("digits")
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), model.params)
    names: dict[str, Any] = {"sculpt": sculpt, "model": model, "splits": splits, "masks": masks}
    monkeypatch.setattr(sculpt, "finetune", lambda *arguments: arguments[0])
    exec(compile(code, "README.md", "exec"), names | {"key": jax.random.key(0)})


@pytest.mark.slow
def test_the_importance_example_runs() -> None:
    (code,) = [block for block in blocks("python") if "sculpt.importance" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["space"].importance is names["scores"]


@pytest.mark.slow
def test_the_latency_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first example, of whose names it uses some; at fewer sizes of every layer, and whatever the machine does beside."""
    monkeypatch.setattr(layer_sizes, "_LEVELS", 2)
    monkeypatch.setattr(layer_latency, "_line", lambda sums, seconds: np.asarray([0.0, 1.0]))
    (code,) = [block for block in blocks("python") if "measure_layers" in block]
    model, splits = untrained_digits(), sculpt.load_data("digits")
    images = jax.numpy.asarray(splits.normalise(splits.test.images))
    space = sculpt.make_space(sculpt.trace(model, images[:1]), families=("channels",), round_to=8)
    found = SimpleNamespace(policy=np.zeros(space.num_sites, np.int32))
    names: dict[str, Any] = {
        "jax": jax,
        "sculpt": sculpt,
        "model": model,
        "space": space,
        "images": images,
        "found": found,
    }
    exec(compile(code, "README.md", "exec"), names)
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(1.0)
    assert names["both"].resource.name == "the largest of MACs, parameters"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    make_parser().parse_args(shlex.split(command)[1:])


def test_make_has_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert {"install", "quickstart", "test"} <= set(TARGETS)
    for target in TARGETS:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_quickstart_is_the_command_shown() -> None:
    # The tests may themselves run under make, whose flags and greetings are not wanted here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    dry = subprocess.run(
        ["make", "-n", "--no-print-directory", "quickstart"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        check=True,
    )
    (command,) = [line for line in COMMANDS if "runs/quickstart" in line]
    assert dry.stdout.splitlines()[-1].endswith(command)


def test_the_gate_runs_the_test_command() -> None:
    gate = REPOSITORY / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    assert "make test" in gate.read_text()


@pytest.mark.slow
def test_the_quickstart_and_the_chain_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    model, splits = untrained_digits(), sculpt.load_data("digits")
    space = sculpt.make_space(sculpt.trace(model, splits.normalise(splits.train.images[:1])))
    policies = sculpt.random_policies(space, jax.random.key(0), 4, budget=0.5)
    (tmp_path / "policies.jsonl").write_text("\n".join(map(str, policies.tolist())) + "\n")
    for command in COMMANDS:
        if "--data-dir" not in command:  # tests/test_prune.py runs the like on data that it makes
            assert main(shlex.split(command)[1:]) == 0
    quick, steps = (
        json.loads((tmp_path / "runs" / n / "result.json").read_text()) for n in ("quickstart", "steps")
    )
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4
    assert quick["policy"] == steps["policy"]
    assert quick["pruned"]["test_accuracy"] == steps["pruned"]["test_accuracy"]
    assert quick["pruned"]["test_accuracy"] >= quick["dense"]["test_accuracy"] - 0.02
    assert quick["pruned"]["macs_realised"] <= 0.52 * quick["dense"]["macs"]
    assert quick["compact_max_abs_diff"] <= 1e-4
    assert quick["pruned"]["latency_ms"] < quick["dense"]["latency_ms"]

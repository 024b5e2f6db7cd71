"""An interrupted run, resumed, gives the very bits of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import sculpt
from sculpt.data.splits import Split, Splits
from sculpt.model import Model
from sculpt.training.config import FinetuneConfig
from sculpt.training.finetuning import finetune, train
from tests.training.tiny import (
    BASE,
    KEY,
    OPTIMIZERS,
    Tiny,
    largest_masked,
    same_bits,
    tiny_masks,
    tiny_model,
    tiny_splits,
)

VARIANTS: dict[str, FinetuneConfig] = {
    **{name: OPTIMIZERS[name] for name in ("momentum", "adamw", "ema")},
    "augmented": dataclasses.replace(BASE, augment="shift"),
    "last": dataclasses.replace(BASE, select_best=False),
}


class Stop(Exception):
    """The interruption."""


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.slow
def test_correctness_01_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    masks, config = tiny_masks(model), VARIANTS[name]
    whole: list[dict[str, float]] = []
    expected = finetune(model, masks, splits, config, KEY, on_metrics=whole.append)

    rows: list[dict[str, float]] = []

    def stop_after_two(row: dict[str, float]) -> None:
        if len(rows) == 2:
            raise Stop
        rows.append(row)

    with pytest.raises(Stop):
        finetune(model, masks, splits, config, KEY, directory=tmp_path, on_metrics=stop_after_two)
    tuned = finetune(model, masks, splits, config, KEY, directory=tmp_path, on_metrics=rows.append)
    assert same_bits(tuned, expected)
    assert largest_masked(tuned.params, masks) == 0.0
    for mine, theirs in zip(rows, whole, strict=True):
        assert {k: v for k, v in mine.items() if k != "images_per_second"} == {
            k: v for k, v in theirs.items() if k != "images_per_second"
        }


@pytest.mark.slow
def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    config = dataclasses.replace(BASE, checkpoint_every=4)
    whole: list[dict[str, float]] = []
    expected = train(model, splits, config, KEY, on_metrics=whole.append)

    def stop(step: int, total: int) -> None:
        if step == 12:  # the last checkpoint is that of step 8, two steps into the second epoch of six
            raise Stop

    with pytest.raises(Stop):
        train(model, splits, config, KEY, directory=tmp_path, on_progress=stop)
    assert (tmp_path / "steps" / "8").exists()
    rows: list[dict[str, float]] = []
    assert same_bits(train(model, splits, config, KEY, directory=tmp_path, on_metrics=rows.append), expected)
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in whole[1:]]


def test_a_finished_run_is_only_read_back(tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    done = train(model, splits, BASE, KEY, directory=tmp_path)
    steps: list[int] = []
    again = train(
        model, splits, BASE, KEY, directory=tmp_path, on_progress=lambda step, _: steps.append(step)
    )
    assert same_bits(again, done)
    assert steps == []


def test_settings_that_change_no_number_may_change_on_resuming(tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    done = train(model, splits, BASE, KEY, directory=tmp_path)
    other = dataclasses.replace(BASE, checkpoint_every=2, steps_per_call=3)
    assert same_bits(train(model, splits, other, KEY, directory=tmp_path), done)


def test_another_run_s_directory_is_refused(tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    train(model, splits, BASE, KEY, directory=tmp_path)

    def other(split: Split) -> Splits:
        return dataclasses.replace(splits, train=split)

    shifted = jax.tree.map(lambda w: w + 1, model.params)
    labels = np.roll(splits.train.labels, 1)
    runs: list[tuple[Model, Splits, FinetuneConfig, jax.Array]] = [
        (model, splits, dataclasses.replace(BASE, epochs=4), KEY),
        (model, splits, BASE, jax.random.key(4)),
        (model.replace(params=shifted), splits, BASE, KEY),
        (model, other(Split(splits.train.images, labels)), BASE, KEY),
        (model, dataclasses.replace(splits, name="others"), BASE, KEY),
    ]
    # The same arrays, another function of them: what is dropped in training, and what is computed at any time.
    module = Tiny(dropout=0.7)
    runs.append((sculpt.from_linen(module, {"params": model.params, **model.state}), splits, BASE, KEY))
    runs.append((model.replace(apply=lambda *arguments: 2.0 * model.apply(*arguments)), splits, BASE, KEY))
    for arguments in runs:
        with pytest.raises(ValueError, match="holds checkpoints of another run"):
            train(*arguments, directory=tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        finetune(model, tiny_masks(model), splits, BASE, KEY, directory=tmp_path)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    train(model, splits, BASE, KEY, directory=tmp_path)
    largest = max(
        (p for p in (tmp_path / "steps" / "18").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(b"\0" * largest.stat().st_size)
    with pytest.raises(ValueError, match=r"the checkpoint .*steps/18 cannot be read .* delete that folder"):
        train(model, splits, BASE, KEY, directory=tmp_path)


SLOW_RUN = """
import sys, time
from tests.training.tiny import BASE, KEY, tiny_masks, tiny_model, tiny_splits
from sculpt.training.finetuning import finetune
model = tiny_model()
finetune(
    model, tiny_masks(model), tiny_splits(), BASE, KEY,
    directory=sys.argv[1], on_metrics=lambda _: time.sleep(0.3),
)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, splits = tiny_model(), tiny_splits()
    masks = tiny_masks(model)
    expected = finetune(model, masks, splits, BASE, KEY)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    child = subprocess.Popen([sys.executable, "-c", SLOW_RUN, tmp_path], cwd=root, env=environment)
    deadline = time.monotonic() + 120
    while child.poll() is None and not (tmp_path / "records" / "6.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "records" / "18.json").exists()
    rows: list[dict[str, float]] = []
    tuned = finetune(model, masks, splits, BASE, KEY, directory=tmp_path, on_metrics=rows.append)
    assert 1 <= len(rows) <= 2
    assert same_bits(tuned, expected)
    assert largest_masked(tuned.params, masks) == 0.0

"""Settings of a run: what is kept, what is refused, what the data decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sculpt.pipeline import FinetuneSettings, SearchSettings, TrainSettings
from sculpt.pipeline.settings import read_settings
from sculpt.report import RunDirectory
from sculpt.training import Splits, from_arrays

NETWORK: dict[str, Any] = {"model": "resnet8", "dataset": "digits"}


def splits(channels: int) -> Splits:
    images, labels = np.zeros((20, 4, 4, channels), np.uint8), np.arange(20, dtype=np.int32) % 2
    return from_arrays(images, labels, images[:2], labels[:2])


def test_paths_are_absolute_whatever_they_were_typed_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = {**NETWORK, "weights": "w/../w/net.safetensors", "data_dir": Path("data")}
    run = RunDirectory(tmp_path / "run")
    settings = read_settings(run, "train", typed)
    assert settings.weights == str(tmp_path / "w" / "net.safetensors")
    assert settings.data_dir == str(tmp_path / "data")
    run.settle("train", {**vars(settings)})
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert read_settings(run, "train", {"weights": "../w/net.safetensors"}) == settings
    assert read_settings(run, "train", {}) == settings
    with pytest.raises(ValueError, match=r"weights is .* there, .*below/w/net.safetensors' was asked for"):
        read_settings(run, "train", {"weights": "w/net.safetensors"})


def test_augmentation_is_by_the_data_unless_it_is_chosen() -> None:
    by_data, chosen = TrainSettings(**NETWORK), TrainSettings(**NETWORK, augment="none")
    assert [by_data.augmentation(splits(c)) for c in (1, 3)] == ["shift", "crop_flip"]
    assert [chosen.augmentation(splits(c)) for c in (1, 3)] == ["none", "none"]
    with pytest.raises(ValueError, match="augment must be one of"):
        TrainSettings(**NETWORK, augment="")


def test_every_search_setting_reaches_the_search() -> None:
    config = SearchSettings(objective="loss", score_images=7, calibration_images=0, evaluations=640).config()
    assert (config.objective, config.score_images, config.calibration_images) == ("loss", 7, 0)
    assert config.checkpoint_every == 2
    assert SearchSettings(families=["rect"]).families == ("rect",)  # type: ignore[arg-type]


def test_clipping_reaches_training() -> None:
    assert TrainSettings(**NETWORK, train_clip_norm=2.0).config("none").clip_norm == 2.0
    assert FinetuneSettings(finetune_clip_norm=3.0).config("none").clip_norm == 3.0


def test_images_to_score_on_are_counted() -> None:
    few = splits(1)
    have = len(few.train.labels)
    SearchSettings(score_images=have - 1, calibration_images=1).check_images(few)
    with pytest.raises(ValueError, match=f"--score-images {have} and --calibration-images 1 need {have + 1}"):
        SearchSettings(score_images=have, calibration_images=1).check_images(few)

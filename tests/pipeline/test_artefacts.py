"""Data and pretrained weights in a run: read as they were asked for, and images scaled as the weights expect; heads for other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import sculpt
from sculpt import nets
from sculpt.cli import main
from sculpt.data.stream import StreamedImages
from sculpt.pipeline import artefacts
from sculpt.pipeline.artefacts import Artefacts
from sculpt.report import RunDirectory
from tests.architectures.architecture import draw

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize(("name", "mean"), [("resnet8", 0.485), ("efficientnet_lite0", 127 / 255)])
@pytest.mark.fast("resnet8-0.485")
def test_images_are_scaled_as_the_weights_expect(
    name: str, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0)
    images, labels = noise.integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60) % 10

    def load(*arguments: Any, **options: Any) -> sculpt.Splits:
        return sculpt.from_arrays(images, labels, images[:20], labels[:20])

    monkeypatch.setattr(artefacts, "load_data", load)
    module = nets.create(name, 10)
    variables = draw(
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)),
        jax.random.key(1),
    )
    nets.save(module, variables, tmp_path / "w.safetensors")
    given = {"model": name, "dataset": "cifar10", "weights": str(tmp_path / "w.safetensors")}
    found = Artefacts(RunDirectory.open(tmp_path / "run"), given)
    assert found.splits.mean[0] == mean != load().mean[0]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (found.untrained.params, variables["params"])), strict=True)
    )


def test_images_are_brought_to_a_size_and_left_on_disk_where_that_is_asked_for(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("ant", "bee"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(10):
                image = Image.new("RGB", (9 + number, 12), (20 * number, 0, 0))
                image.save(tmp_path / part / label / f"{number}.png")
    given = {"model": "resnet8", "dataset": "folder", "data_dir": str(tmp_path), "image_size": 8}
    kept, left = (
        Artefacts(RunDirectory.open(tmp_path / f"run{stream}"), {**given, "stream": stream}).splits
        for stream in (False, True)
    )
    assert isinstance(kept.train.images, np.ndarray) and isinstance(left.train.images, StreamedImages)
    np.testing.assert_array_equal(left.train.images[:], kept.train.images)
    assert kept.test.images.shape == (20, 8, 8, 3)


def test_a_run_on_a_stream_knows_its_data_again(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for number in range(20):
            file = tmp_path / part / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(file)
    given = {"model": "resnet8", "dataset": "folder", "data_dir": str(tmp_path), "stream": True}
    run = RunDirectory.open(tmp_path / "run")
    run.complete("data", Artefacts(run, given).data)
    assert len(Artefacts(run, given).splits.train.labels) == 18
    file.rename(tmp_path / "test" / "a" / "moved.png")
    assert len(Artefacts(run, given).splits.test.labels) == 20  # the test split is left alone
    (tmp_path / "train" / "a" / "0.png").rename(tmp_path / "train" / "b" / "0.png")
    with pytest.raises(ValueError, match="the data set folder is not the one that"):
        _ = Artefacts(run, given).splits


@pytest.mark.slow
def test_weights_for_other_classes_are_given_a_new_head_and_trained(tmp_path: Path) -> None:
    splits = sculpt.load_data("digits")
    for part in ("train", "test"):
        split = getattr(splits, part)
        for row in np.flatnonzero(split.labels < 3)[:100]:
            folder = tmp_path / "data" / part / str(split.labels[row])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat(split.images[row], 3, axis=-1)).save(folder / f"{row}.png")
    module = nets.create("resnet8", 10)
    variables = jax.jit(module.init)(jax.random.key(5), jnp.zeros((1, 8, 8, 3)))
    nets.save(module, variables, tmp_path / "w.safetensors")
    begin = [
        *("train", "--model", "resnet8", "--dataset", "folder", "--data-dir", str(tmp_path / "data")),
        *("--weights", str(tmp_path / "w.safetensors"), "--augment", "none", "--batch-size", "16"),
    ]
    assert main([*begin, "--run", str(tmp_path / "other")]) == 2, "a head for ten classes does not fit three"
    assert main([*begin, "--new-head", "--epochs", "4", "--run", str(tmp_path / "run")]) == 0
    record = RunDirectory.existing(tmp_path / "run").record("train")
    assert record["validation_accuracy"] > 0.6
    assert record["recipe"] == "residual"
    assert record["config"]["learning_rate"] == pytest.approx(0.3 * 0.1 * 16 / 128)
    dense = load_file(tmp_path / "run" / "dense.safetensors")
    assert dense["params/head/kernel"].shape == (64, 3)


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 512, 2), (2, 512, 4), (15, 64, 100)])
def test_the_trial_fine_tuning_of_the_search_is_no_longer_than_the_one_that_follows(
    epochs: int, batch: int, steps: int, tmp_path: Path
) -> None:
    given = {"model": "resnet8", "dataset": "digits", "finetune_epochs": epochs, "batch_size": batch}
    found = Artefacts(RunDirectory.open(tmp_path / "run"), given)
    assert found.search_config.rerank_finetune.max_steps == steps
    final = found.finetune_settings.config(found.train_settings, found.splits)
    assert final.steps(len(found.splits.train.labels)) >= steps


def test_layers_that_are_excluded_are_no_sites_of_a_run(tmp_path: Path) -> None:
    given = {"model": "resnet8", "dataset": "digits", "exclude": ["head", "*/conv1"]}
    found = Artefacts(RunDirectory.open(tmp_path / "run"), given)
    assert found.search_settings.exclude == ("head", "*/conv1")
    assert found.space.excluded and not any(site.name.endswith("conv1") for site in found.space.sites)

"""Settings of a run: what is kept, what is refused, what the data decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.data.splits import Splits, from_arrays
from sculpt.pipeline import FinetuneSettings, SearchSettings, TrainSettings
from sculpt.pipeline.policies import PolicyOptions
from sculpt.pipeline.settings import read_settings
from sculpt.repair.recalibration import images_used, into_batches
from sculpt.report import RunDirectory
from sculpt.scoring.plan import EvaluationPlan
from sculpt.training.config import FinetuneConfig
from sculpt.training.recipes import RECIPES

NETWORK: dict[str, Any] = {"model": "resnet8", "dataset": "digits"}


def splits(channels: int, side: int = 4) -> Splits:
    images, labels = np.zeros((20, side, side, channels), np.uint8), np.arange(20, dtype=np.int32) % 2
    return from_arrays(images, labels, images[:2], labels[:2])


def test_paths_are_absolute_whatever_they_were_typed_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = {**NETWORK, "dataset": "cifar10", "weights": "w/../w/net.safetensors", "data_dir": Path("data")}
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
    assert by_data.augmentation(splits(3, 96)) == "resized_crop"
    assert [chosen.augmentation(splits(c)) for c in (1, 3)] == ["none", "none"]
    with pytest.raises(ValueError, match="augment must be one of"):
        TrainSettings(**NETWORK, augment="")


def test_every_search_setting_reaches_the_search() -> None:
    config = SearchSettings(objective="loss", score_images=7, calibration_images=0, evaluations=640).config()
    assert (config.objective, config.score_images, config.calibration_images) == ("loss", 7, 0)
    assert config.checkpoint_every == 2
    assert SearchSettings(families=["rect"]).families == ("rect",)  # type: ignore[arg-type]


def test_what_would_have_no_effect_is_refused_and_defaults_are_not() -> None:
    assert TrainSettings(**NETWORK, weights="w").train_epochs == 20
    with pytest.raises(ValueError, match=r"leave out --train-epochs 3 and --train-clip-norm 1\.0, which"):
        TrainSettings(**NETWORK, weights="w", train_epochs=3, train_clip_norm=1.0)
    with pytest.raises(
        ValueError, match=r"leave out --data-dir data, which .*: digits comes with the package"
    ):
        TrainSettings(**NETWORK, data_dir="data")
    assert SearchSettings(families=("rect",)).round_to == 1
    with pytest.raises(
        ValueError, match=r"leave out --round-to 8, which .*: families rect removes no channels"
    ):
        SearchSettings(families=("rect",), round_to=8)


def test_calibration_images_are_all_used() -> None:
    for number in (0, 1, 63, 64, 128, 1024):
        SearchSettings(calibration_images=number)
        PolicyOptions(Path("p.npy"), Path("s.jsonl"), calibration_images=number)
        assert number == 0 or into_batches(jnp.zeros((number, 1))).size == number
    # What a report of a small data set calls the number of calibration images is what was used.
    assert into_batches(jnp.zeros((300, 1))).size == images_used(300) == 256
    for number, take in ((65, "64 or 128"), (900, "896 or 960")):
        with pytest.raises(ValueError, match=f"a multiple of it.*got {number}: take {take}"):
            SearchSettings(calibration_images=number)
        with pytest.raises(ValueError, match=f"got {number}: take {take}"):
            PolicyOptions(Path("p.npy"), Path("s.jsonl"), calibration_images=number)


def test_a_plan_is_on_all_devices_unless_it_says_otherwise() -> None:
    def plan(**fields: Any) -> EvaluationPlan | None:
        return PolicyOptions(Path("p.npy"), Path("s.jsonl"), plan=fields).fixed_plan()

    assert plan() is plan(precision="bfloat16") is None
    assert plan(images_per_batch=32) == EvaluationPlan(images_per_batch=32, policy_shards=8)
    assert plan(image_shards=3) == EvaluationPlan(image_shards=3, policy_shards=2)
    assert plan(image_shards=9) == EvaluationPlan(image_shards=9)
    assert plan(policy_shards=2) == EvaluationPlan(policy_shards=2)
    with pytest.raises(ValueError, match="image_shards must be a whole number of at least 1"):
        plan(image_shards=0)


def test_an_explanation_needs_a_tuned_plan() -> None:
    files = Path("p.npy"), Path("s.jsonl")
    PolicyOptions(*files, plan={"precision": "bfloat16"}, explain=True)
    with pytest.raises(ValueError, match="--explain says how a plan was tuned, and this one is given"):
        PolicyOptions(*files, plan={"convolution": "lax"}, explain=True)
    with pytest.raises(ValueError, match=r"scores are written to .jsonl or .parquet files, got s.csv"):
        PolicyOptions(files[0], Path("s.csv"))


def test_clipping_reaches_training() -> None:
    train = TrainSettings(**NETWORK, train_clip_norm=2.0)
    assert train.config(splits(1)).clip_norm == 2.0
    assert FinetuneSettings(finetune_clip_norm=3.0).config(train, splits(1)).clip_norm == 3.0


def test_the_recipe_is_by_the_network_and_the_images_unless_it_is_chosen() -> None:
    def recipe(model: str, side: int, **settings: Any) -> FinetuneConfig:
        train = TrainSettings(model=model, dataset="x", **settings)
        return train.config(splits(3, side))

    assert recipe("resnet20", 32).learning_rate == pytest.approx(0.05)
    assert recipe("resnet20", 32, batch_size=128).learning_rate == pytest.approx(0.1)
    assert recipe("resnet20", 32, train_learning_rate=0.4).learning_rate == 0.4
    assert recipe("vit_tiny_patch4", 32).optimizer == "adamw"
    assert recipe("resnet20", 32, recipe="small_transformer").optimizer == "adamw"
    assert recipe("mobilenet_v2", 32).augment == "crop_flip"
    large = recipe("vit_tiny_patch16", 96)
    assert (large.augment, large.mixup, large.cutmix) == ("resized_crop", 0.8, 1.0)
    with pytest.raises(ValueError, match=r"recipe must be one of residual, plain.*got 'best'"):
        recipe("resnet20", 32, recipe="best")


def test_fine_tuning_goes_by_the_recipe_of_training() -> None:
    train = TrainSettings(**NETWORK, recipe="plain", batch_size=16, augment="none")
    config = FinetuneSettings(distillation=0.25, gradual=0.5).config(train, splits(1))
    assert config == RECIPES["plain"].finetune(batch_size=16, distillation=0.25, gradual=0.5)
    assert FinetuneSettings(finetune_learning_rate=0.5).config(train, splits(1)).learning_rate == 0.5
    with pytest.raises(ValueError, match=r"distillation must be in \[0, 1\]"):
        FinetuneSettings(distillation=2.0)


def test_weights_for_other_classes_are_trained_gently() -> None:
    loaded = TrainSettings(**NETWORK, weights="w", new_head=True, train_epochs=2)
    assert loaded.trains
    assert not TrainSettings(**NETWORK, weights="w").trains
    assert loaded.config(splits(1)).learning_rate == pytest.approx(0.3 * 0.05)
    with pytest.raises(ValueError, match="--new-head goes with --weights"):
        TrainSettings(**NETWORK, new_head=True)


def test_layers_are_fitted_only_where_weights_go_at_once() -> None:
    assert FinetuneSettings(reconstruct_images=64).reconstruct_images == 64
    with pytest.raises(ValueError, match="leave out --reconstruct-images 64"):
        FinetuneSettings(reconstruct_images=64, gradual=0.5)
    with pytest.raises(ValueError, match="reconstruct_images must be a whole number of at least 0"):
        FinetuneSettings(reconstruct_images=-1)


def test_networks_without_batchnorm_are_reconstructed() -> None:
    with_state, without = (
        sculpt.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}).replace(state=state)
        for state in ({"mean": jnp.zeros(2)}, {"dropout": jax.random.key(0), "count": jnp.uint32(0)})
    )
    assert [FinetuneSettings().images_to_reconstruct(m) for m in (with_state, without)] == [0, 512]
    assert [
        FinetuneSettings(reconstruct_images=7).images_to_reconstruct(m) for m in (with_state, without)
    ] == [7, 7]
    for none in (None, 0):
        assert FinetuneSettings(gradual=0.5, reconstruct_images=none).images_to_reconstruct(without) == 0
    for model, default in ((with_state, "recalibrate"), (without, "reconstruct")):
        assert SearchSettings().config().repair_of(model) == default
        assert SearchSettings(repair="recalibrate").config().repair_of(model) == "recalibrate"
        options = PolicyOptions(Path("p.npy"), Path("s.jsonl"), repair="reconstruct")
        assert options.search_config().repair_of(model) == "reconstruct"
    assert SearchSettings(repair="reconstruct", calibration_images=100).config().calibration_images == 100
    with pytest.raises(ValueError, match="repair='reconstruct' fits layers on calibration images"):
        PolicyOptions(Path("p.npy"), Path("s.jsonl"), calibration_images=0, repair="reconstruct")


def test_images_to_score_on_are_counted() -> None:
    few = splits(1)
    have = len(few.train.labels)
    SearchSettings(score_images=have - 1, calibration_images=1).check_images(few)
    with pytest.raises(ValueError, match=f"--score-images {have} and --calibration-images 1 need {have + 1}"):
        SearchSettings(score_images=have, calibration_images=1).check_images(few)


@pytest.mark.parametrize(
    ("option", "value", "method", "why"),
    [
        ("evaluations", 64, "magnitude", "proposes one policy"),
        ("agent", "a.safetensors", "random", "learns nothing that another could begin with"),
        ("front", (0.3,), "evolution", "looks for one budget only"),
    ],
)
def test_what_a_method_does_not_use_is_ignored_on_the_command_line_and_refused_in_python(
    tmp_path: Path, option: str, value: Any, method: str, why: str
) -> None:
    run, told = RunDirectory(tmp_path / "run"), []
    settings = read_settings(run, "search", {"method": method, option: value}, told)
    assert settings == SearchSettings(method=method)
    assert len(told) == 1 and told[0].startswith(f"--{option} ") and told[0].endswith(why)
    with pytest.raises(ValueError, match=rf"--{option} .*{why}|SearchConfig.{option}=.* has no use for it"):
        SearchSettings(method=method, **{option: value})
    asked: dict[str, Any] = {option: str(Path(value).resolve()) if option == "agent" else value}
    assert read_settings(run, "search", {option: value}, told) == SearchSettings(**asked)
    assert len(told) == 1


def test_image_counts_of_small_data_sets_are_lowered_unless_they_are_asked_for() -> None:
    usual = SearchSettings()
    assert [usual.image_counts(n) for n in (384, 383, 300, 60, 3)] == [
        (256, 128),
        (256, 64),
        (236, 64),
        (40, 20),
        (2, 1),
    ]
    config = usual.config_for(60)
    assert (config.score_images, config.calibration_images, config.rerank_finetune.batch_size) == (40, 20, 60)
    usual.check_images(splits(3))
    with pytest.raises(ValueError, match=r"--score-images 100 and --calibration-images 128 need 228 images"):
        SearchSettings(score_images=100).check_images(splits(3))

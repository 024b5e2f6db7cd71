"""Several devices that share a batch compute what one does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from sculpt.training.finetuning import finetune, train
from sculpt.training.run import TrainRun
from tests.training.tiny import BASE, KEY, largest_masked, same_bits, tiny_masks, tiny_model, tiny_splits

SPLITS = tiny_splits()
SHORT = dataclasses.replace(BASE, epochs=1, max_steps=2)


def vit_model() -> Model:
    module = sculpt.nets.VisionTransformer(num_classes=10, patch=4, width=16, depth=1, heads=2)
    return sculpt.from_linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))


def agree(one: Model, other: Model, atol: float) -> None:
    for a, b in zip(*(jax.tree.leaves((m.params, m.state)) for m in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (vit_model, {"momentum": 0.0}),
        # BatchNorm, dropout and everything random see the whole batch.
        (tiny_model, {"augment": "crop_flip", "mixup": 0.2, "ema": 0.5, "distillation": 0.5}),
        (tiny_model, {"accumulate": 2, "steps_per_call": 2, "rand_augment": 1}),
    ],
    ids=["vit", "augmented", "accumulated"],
)
@pytest.mark.slow
def test_eight_devices_compute_what_one_does(build: object, change: dict[str, object]) -> None:
    model: Model = build()  # type: ignore[operator]
    config = dataclasses.replace(SHORT, **change)  # type: ignore[arg-type]
    masks, teacher = tiny_masks(model), model if config.needs_teacher else None
    rows: list[dict[str, float]] = []
    one, eight = (
        finetune(model, masks, SPLITS, config, KEY, teacher=teacher, devices=n, on_metrics=rows.append)
        for n in (1, 8)
    )
    agree(one, eight, 2e-5)
    assert largest_masked(eight.params, masks) == 0.0
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-4)
    assert rows[0]["validation_accuracy"] == rows[1]["validation_accuracy"]
    # Single-device arrays, for whatever comes next.
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(eight.params)} == {1}


@pytest.mark.slow
def test_images_are_spread_and_weights_are_everywhere() -> None:
    model = tiny_model()
    run = TrainRun.begin(model, None, SPLITS, BASE, KEY, None, devices=4)
    run.advance(None, None)
    for leaf in jax.tree.leaves(run.train):
        assert leaf.sharding.num_devices == 4
        assert leaf.sharding.is_fully_replicated
    images = run.validation[0]
    assert images.shape == (2, 64, 8, 8, 1)
    assert {shard.data.shape for shard in images.addressable_shards} == {(2, 16, 8, 8, 1)}


@pytest.mark.slow
def test_few_validation_images_count_once_each() -> None:
    """Three images on eight devices: five of padding."""
    few = tiny_splits(validation=3)
    rows: list[dict[str, float]] = []
    for devices in (1, 8):
        train(tiny_model(), few, SHORT, KEY, devices=devices, on_metrics=rows.append)
    assert rows[0]["validation_accuracy"] == rows[1]["validation_accuracy"]


@pytest.mark.slow
def test_a_resumed_run_on_as_many_devices_gives_the_same_bits_and_on_others_nearly(tmp_path: Path) -> None:
    model = tiny_model()
    config = dataclasses.replace(BASE, ema=0.5)
    whole = train(model, SPLITS, config, KEY, devices=4)

    class Stop(Exception):
        pass

    def stop(_: object) -> None:
        raise Stop

    for folder, devices in ((tmp_path / "same", 4), (tmp_path / "other", 2)):
        rows: list[dict[str, float]] = []

        def stop_after_one(row: dict[str, float], rows: list[dict[str, float]] = rows) -> None:
            if rows:
                raise Stop
            rows.append(row)

        with pytest.raises(Stop):
            train(model, SPLITS, config, KEY, devices=4, directory=folder, on_metrics=stop_after_one)
        resumed = train(model, SPLITS, config, KEY, devices=devices, directory=folder)
        if devices == 4:
            assert same_bits(resumed, whole)
        else:
            agree(resumed, whole, 1e-3)


def test_what_cannot_be_shared_is_refused() -> None:
    for devices in (0, 9, True, 2.0):
        with pytest.raises(ValueError, match=r"devices must be a whole number from 1 to 8, .* got"):
            train(tiny_model(), SPLITS, BASE, KEY, devices=devices)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 devices cannot share a batch of 32 images evenly"):
        train(tiny_model(), SPLITS, BASE, KEY, devices=5)
    parts = dataclasses.replace(BASE, accumulate=8)
    with pytest.raises(
        ValueError, match="8 devices cannot share a batch of 32 images, computed in parts of 4, evenly"
    ):
        train(tiny_model(), SPLITS, parts, KEY, devices=8)

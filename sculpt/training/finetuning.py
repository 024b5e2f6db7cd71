"""`finetune` and `train`: training with masks held, or without masks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked
from sculpt.data.splits import Splits, add_examples
from sculpt.data.stream import StreamedImages
from sculpt.digest import add_arrays
from sculpt.inputs import as_text, check_finite, check_labels
from sculpt.ir.identity import add_model, add_task
from sculpt.model import Model
from sculpt.pruning.masks import apply_masks, check_masks
from sculpt.task import CLASSIFICATION
from sculpt.training.checkpoint import Checkpoints
from sculpt.training.config import FinetuneConfig
from sculpt.training.devices import check_devices
from sculpt.training.features import with_features
from sculpt.training.run import Metrics, TrainingDiverged, TrainRun

__all__ = ["FinetuneConfig", "Metrics", "TrainingDiverged", "finetune", "train"]


@checked
def finetune(
    model: Model,
    masks: Any,
    splits: Splits,
    config: FinetuneConfig,
    key: jax.Array,
    *,
    teacher: Model | None = None,
    devices: int = 1,
    directory: str | Path | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Trains a model while its masked weights stay exactly zero.

    The masks act in the forward pass and again after every update, so neither momentum nor weight decay revives a weight; with
    `config.gradual` pruned weights fade first.
    Trains on the train split and selects the epoch by the validation split; the test split is never read. All randomness
    comes from `key` and the number of the step, so that a resumed run equals an uninterrupted one. Images come raw
    to the device and are augmented and normalised there.

    Args:
      model: the network to start from.
      masks: pytree of booleans like `model.params`, False where a weight is pruned; None: nothing is.
      splits: data, whose labels are what `model.task` wants. Train images in memory must fit on the device as stored (uint8); those of a stream are brought batch by batch,
        in the same order (on CPUs the weights are the same bit for bit).
      config: settings.
      key: `jax.random.key`.
      teacher: a network for the same classes, such as the dense one, whose predictions are followed
        (`config.distillation`), or what its layers compute (`config.feature_match`); where one of the two is above 0 only.
      devices: how many of this process share every batch; each holds weights and data. A number that divides
        `config.batch_size` (the parts of it, where it is accumulated). The result is that of one device up to
        rounding, BatchNorm statistics included, which are those of the whole batch.
      directory: where to keep checkpoints (after each epoch), and to resume from if there are any; None keeps none.
        Another number of devices may resume them; the same number gives the bits of an uninterrupted run.
      on_metrics: called after every epoch with "epoch" (from 1), "step", "train_loss", "train_accuracy",
        "validation_accuracy" (mean scores, where the model has a task of its own), "learning_rate", "images_per_second" (of
        training, compilation left out where it can be).
      on_progress: called with (steps done, steps in all) about every 50 steps.

    Returns:
      The model with trained `params` and `state`.

    Raises:
      ValueError: if masks, splits and model do not fit together, `directory` holds another run or a damaged one, or an image of a
        stream cannot be read.
      TrainingDiverged: (a ValueError) if loss or weights are no longer finite.
    """
    check_request(model, splits, config, teacher)
    check_devices(devices, config)
    if masks is not None:
        masks = jax.tree.map(jnp.asarray, check_masks(model, masks))
    if config.gradual:
        check_fading(model, masks, config)
    elif masks is not None:
        model = apply_masks(model, masks)
    run = TrainRun.begin(model, masks, splits, config, key, teacher, devices)
    with open_checkpoints(directory, model, masks, splits, config, key, teacher) as keeper:
        run.complete(keeper, on_metrics, on_progress)
    return run.result()


@checked
def train(
    model: Model,
    splits: Splits,
    config: FinetuneConfig,
    key: jax.Array,
    *,
    devices: int = 1,
    directory: str | Path | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Trains a dense, freshly initialised model: `finetune` without masks and teacher; other arguments and errors are the same.

    Raises:
      ValueError: also for settings that need masks or a teacher: `gradual`, `distillation`, `feature_match`.
    """
    for name in ("gradual", "distillation", "feature_match"):
        if value := getattr(config, name):
            raise ValueError(
                f"FinetuneConfig.{name} is {value}, but train has no masks and no teacher: use finetune, or leave it at 0"
            )
    return finetune(
        model,
        None,
        splits,
        config,
        key,
        devices=devices,
        directory=directory,
        on_metrics=on_metrics,
        on_progress=on_progress,
    )


def open_checkpoints(
    directory: str | Path | None,
    model: Model,
    masks: Any,
    splits: Splits,
    config: FinetuneConfig,
    key: jax.Array,
    teacher: Model | None,
) -> contextlib.AbstractContextManager[Checkpoints | None]:
    """The checkpoints of this very run in a directory; None where there is no directory."""
    if directory is None:
        return contextlib.nullcontext()
    return contextlib.closing(
        Checkpoints(directory, _fingerprint(model, masks, splits, config, key, teacher))
    )


def check_request(model: Model, splits: Splits, config: FinetuneConfig, teacher: Model | None) -> None:
    """Raises ValueError unless model, data, settings and teacher fit together, and the networks are finite."""
    for network in (model, teacher):
        if network is not None:
            check_finite(network)
    _check(model, splits, config)
    _check_teacher(teacher, model, splits, config)


def check_fading(model: Model, masks: Any, config: FinetuneConfig) -> None:
    """Raises ValueError unless there are weights that masks prune and that can fade (`config.gradual`)."""
    request = f"FinetuneConfig.gradual is {config.gradual}, and"
    if masks is None:
        raise ValueError(f"{request} there are no masks to set in: pass masks, or leave it at 0")
    pairs = list(zip(jax.tree.leaves(model.params), jax.tree.leaves(masks), strict=True))
    if not all(mask.all() for _, mask in pairs) and not any(((w != 0) & ~mask).any() for w, mask in pairs):
        raise ValueError(
            f"{request} the weights that the masks prune are zero already: pass the dense model, or leave it at 0"
        )


def _check(model: Model, splits: Splits, config: FinetuneConfig) -> None:
    images, labels = splits.train.images, splits.train.labels
    if config.batch_size > len(labels):
        raise ValueError(
            f"FinetuneConfig.batch_size is {config.batch_size}, more than the {len(labels)} images of the train split of "
            f"{splits.name}: lower it"
        )
    if isinstance(images, StreamedImages) and config.steps_per_call not in (None, 1):
        raise ValueError(
            f"FinetuneConfig.steps_per_call is {config.steps_per_call}, but a stream brings the batch of one step at a time: leave it out"
        )
    if config.rand_augment and isinstance(images, np.ndarray) and jnp.issubdtype(images.dtype, jnp.floating):
        low, high = float(images.min()), float(images.max())
        if low < 0.0 or not 1.0 < high <= 255.0:
            raise ValueError(
                f"FinetuneConfig.rand_augment is {config.rand_augment}, which takes pixels from 0 to 255; those of {splits.name} go from "
                f"{low:.3g} to {high:.3g}: scale them, or leave it at 0"
            )
    _check_task(model, splits, config)
    x = splits.input(config.batch_size)
    if not splits.num_classes:
        for wanted in (labels, splits.validation.labels):
            check_labels(model, splits.input(len(wanted)), wanted)
        return
    try:
        logits = jax.eval_shape(model.apply, model.params, model.state, x)
    except Exception as error:  # each framework has its own
        raise ValueError(
            f"the model does not take the images of {splits.name}, {as_text(x)}: {error}"
        ) from error
    shapes = [list(output.shape) for output in jax.tree.leaves(logits)]
    if model.task != CLASSIFICATION:
        check_labels(model, x, labels[: config.batch_size])
    elif len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < splits.num_classes:
        raise ValueError(
            f"expected logits [{config.batch_size}, {splits.num_classes} or more] for {splits.name}, "
            f"the model gives {', '.join(map(str, shapes))}"
        )


def _check_task(model: Model, splits: Splits, config: FinetuneConfig) -> None:
    """Raises ValueError for settings that other than classifiers, or other than images, have no use for."""
    for name in ("label_smoothing", "mixup", "cutmix", "distillation"):
        if model.task != CLASSIFICATION and (value := getattr(config, name)):
            raise ValueError(
                f"FinetuneConfig.{name} is {value}, but the model has a task of its own instead of classes: leave it at 0"
            )
    for name in ("augment", "rand_augment", "mixup", "cutmix"):
        if not splits.mean and (value := getattr(config, name)) not in (0, "none"):
            raise ValueError(
                f"FinetuneConfig.{name} is {value!r}, but what {splits.name} holds is no images of one class each: leave it out"
            )


def _check_teacher(teacher: Model | None, model: Model, splits: Splits, config: FinetuneConfig) -> None:
    if (teacher is None) == config.needs_teacher:
        raise ValueError(
            f"FinetuneConfig.distillation is {config.distillation}, feature_match {config.feature_match}, and there is "
            f"{'no' if teacher is None else 'a'} teacher: pass teacher= and set one of them above 0, or neither"
        )
    if teacher is None:
        return
    x = splits.input(config.batch_size)
    shapes = []
    for network in (teacher, model):
        outputs = jax.tree.leaves(jax.eval_shape(network.apply, network.params, network.state, x))
        shapes.append([list(output.shape) for output in outputs])
    if shapes[0] != shapes[1]:
        raise ValueError(f"the teacher's logits {shapes[0]} are not of the shape of the model's {shapes[1]}")
    if config.feature_match:
        _check_features(teacher, model, x)


def _check_features(teacher: Model, model: Model, x: Any) -> None:
    train = with_features(model.apply_train)
    own = jax.eval_shape(train, model.params, model.state, x, jax.eval_shape(jax.random.key, 0))[1]
    others = jax.eval_shape(with_features(teacher.apply), teacher.params, teacher.state, x)[1]
    shapes = [[list(feature.shape) for feature in features] for features in (others, own)]
    if not own or shapes[0] != shapes[1]:
        differ = next(
            (pair for pair in itertools.zip_longest(*shapes) if pair[0] != pair[1]), ("none", "none")
        )
        raise ValueError(
            "feature_match compares networks whose convolutions and matrix products outside loops have the same results: "
            f"the teacher has {len(others)} of them, the model {len(own)}; the first that differ are {differ[0]} and {differ[1]}"
        )


def _fingerprint(
    model: Model, masks: Any, splits: Splits, config: FinetuneConfig, key: jax.Array, teacher: Model | None
) -> str:
    """Tells one run from another: settings, key, networks, masks and data; not how often it is saved, or its loops."""
    settings = dataclasses.replace(config, checkpoint_every=None, steps_per_call=None)
    digest = hashlib.sha256(repr((settings, splits.name, splits.mean, splits.std)).encode())
    add_arrays(digest, (key, masks))
    for network in (model, teacher):
        if network is not None:
            add_model(digest, network, splits.input(2))
    add_task(digest, model, splits.input(2), splits.wanted(2))
    add_examples(digest, splits)
    return digest.hexdigest()

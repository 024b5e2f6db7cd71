"""Small real tasks that benchmarks share: a data set, a network, and how both its forms are trained."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import sculpt
from benchmarks.stages import settle, stage, test_accuracy
from sculpt.data.named import load_parquet
from sculpt.data.splits import Splits
from sculpt.model import Model
from sculpt.pruning.space import Space

DISTILLATION, RECONSTRUCTION_IMAGES = 0.5, 512


@dataclasses.dataclass(frozen=True)
class BenchmarkTask:
    """A data set, a network and how both its forms are trained."""

    load: Callable[[Path], Splits]
    """Reads the data, given the folder of all data."""
    model: str
    train: sculpt.FinetuneConfig
    finetune: sculpt.FinetuneConfig
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of `nets.create`."""
    weights: str | None = None
    """File of pretrained weights under the folder of all data; the dense network is fine-tuned from them by `train`."""
    new_head: bool = False
    """Whether the weights' head is for other classes."""
    evaluations: int = 512

    @property
    def brief(self) -> sculpt.FinetuneConfig:
        """The fine-tuning that a re-rank does: its first 50 steps."""
        return dataclasses.replace(self.finetune, max_steps=50)


def _recipe(model: str, side: int) -> sculpt.Recipe:
    return sculpt.recipe_for(sculpt.nets.family(model), side)


def _tiny_imagenet(data: Path) -> Splits:
    folder = data / "tiny_imagenet"
    mean, std = sculpt.nets.colours("efficientnet_lite0")
    return load_parquet(
        "tiny-imagenet-100",
        folder / "train_100classes_100each.parquet",
        folder / "val_100classes_50each.parquet",
        num_classes=100,
        mean=mean,
        std=std,
    )


def _digits(_: Path) -> Splits:
    return sculpt.load_data("digits")


def _fashion(_: Path) -> Splits:
    return sculpt.load_data("fashion_mnist")


def _cifar(data: Path) -> Splits:
    return sculpt.load_data("cifar10-jpeg", data / "cifar10")


TASKS = {
    "digits-resnet8": BenchmarkTask(
        _digits,
        "resnet8",
        _recipe("resnet8", 8).train(epochs=20, augment="shift"),
        _recipe("resnet8", 8).finetune(augment="shift"),
    ),
    "digits-vit": BenchmarkTask(
        _digits,
        "vit_tiny_patch2",
        _recipe("vit_tiny_patch2", 8).train(epochs=100, batch_size=32, learning_rate=1e-3, augment="shift"),
        _recipe("vit_tiny_patch2", 8).finetune(epochs=20, batch_size=32, learning_rate=3e-4, augment="shift"),
        options={"depth": 4, "width": 64, "heads": 4, "hidden": 128},
        evaluations=256,
    ),
    "cifar10-jpeg-resnet20": BenchmarkTask(
        _cifar,
        "resnet20",
        _recipe("resnet20", 32).finetune(epochs=1, augment="crop_flip"),
        _recipe("resnet20", 32).finetune(epochs=1, augment="crop_flip"),
        weights="weights/cifar10_resnet20.safetensors",
    ),
    "cifar10-jpeg-resnet56": BenchmarkTask(
        _cifar,
        "resnet56",
        _recipe("resnet56", 32).finetune(epochs=1, augment="crop_flip"),
        _recipe("resnet56", 32).finetune(epochs=1, augment="crop_flip"),
        weights="weights/cifar10_resnet56.safetensors",
    ),
    "tiny-imagenet-100-efficientnet": BenchmarkTask(
        _tiny_imagenet,
        "efficientnet_lite0",
        _recipe("efficientnet_lite0", 64).finetune(epochs=2, augment="crop_flip"),
        _recipe("efficientnet_lite0", 64).finetune(epochs=2, augment="crop_flip"),
        weights="weights/imagenet_efficientnet_lite0.safetensors",
        new_head=True,
        evaluations=128,
    ),
    "tiny-imagenet-100-mobilenet_v2": BenchmarkTask(
        _tiny_imagenet,
        "mobilenet_v2",
        _recipe("mobilenet_v2", 64).train(epochs=4, augment="crop_flip"),
        _recipe("mobilenet_v2", 64).finetune(epochs=2, augment="crop_flip"),
        evaluations=128,
    ),
    "fashion-mnist-resnet20": BenchmarkTask(
        _fashion,
        "resnet20",
        _recipe("resnet20", 28).train(epochs=1, augment="shift"),
        _recipe("resnet20", 28).finetune(epochs=1, augment="shift"),
    ),
    "fashion-mnist-vgg": BenchmarkTask(
        _fashion,
        "vgg16_bn_cifar",
        _recipe("vgg16_bn_cifar", 28).train(epochs=2, augment="shift"),
        _recipe("vgg16_bn_cifar", 28).finetune(epochs=1, augment="shift"),
        options={"depths": (1, 1, 2, 2), "widths": (16, 32, 64, 64)},
    ),
}
"""Name -> task. VGG on fashion_mnist is a small one: six convolutions of 16 to 64 channels in four stages."""


def starting_model(task: BenchmarkTask, splits: Splits, seed: int, data: Path) -> Model:
    """The network before its dense training."""
    key, image = jax.random.key(seed), jnp.zeros((1, *splits.train.images.shape[1:]))
    if task.weights is None:
        module = sculpt.nets.create(task.model, splits.num_classes, **task.options)
        return sculpt.from_linen(module, jax.jit(module.init)(key, image))
    head_key = jax.random.fold_in(key, 1) if task.new_head else None
    loaded = sculpt.nets.load(
        task.model,
        data / task.weights,
        splits.num_classes,
        side=image.shape[1] if sculpt.nets.family(task.model) == "vit" else None,
        head_key=head_key,
        **task.options,
    )
    return sculpt.from_linen(*loaded)


def tuned(
    model: Model,
    splits: Splits,
    config: sculpt.FinetuneConfig,
    seed: int,
    directory: Path,
    teacher: Model | None = None,
) -> dict[str, Any]:
    """Trains, tests, and keeps the weights beside `directory`."""
    if teacher is not None:
        config = dataclasses.replace(config, distillation=DISTILLATION)
    progress: list[float] = []

    def log(row: dict[str, float]) -> None:
        progress.append(round(float(row["validation_accuracy"]), 4))
        print(directory, row, flush=True)

    trained = sculpt.finetune(
        model,
        None,
        splits,
        config,
        jax.random.key(seed),
        teacher=teacher,
        directory=directory,
        on_metrics=log,
    )
    sculpt.save_params(
        {"params": trained.params, "state": trained.state}, directory.with_suffix(".safetensors")
    )
    return {"test_accuracy": test_accuracy(trained, splits), "validation_accuracies": progress}


def dense_network(task: BenchmarkTask, splits: Splits, seed: int, folder: Path, data: Path) -> Model:
    """The network after its dense training, which is kept in `folder`."""
    start = starting_model(task, splits, seed, data)
    stage(folder / "dense.json", lambda: tuned(start, splits, task.train, seed, folder / "dense"))
    like = {"params": start.params, "state": start.state}
    return start.replace(**sculpt.load_params(folder / "dense.safetensors", like))


def to_reconstruct(model: Model, splits: Splits) -> Any:
    """Normalised train images on which a pruned network is reconstructed before it is fine-tuned; None where that is not the default."""
    if sculpt.SearchConfig().repair_of(model) == "recalibrate":
        return None
    return splits.normalise(splits.train.images[:RECONSTRUCTION_IMAGES])


def compacted(model: Model, space: Space, policy: Any, images: Any = None) -> Model:
    """What a policy leaves of a dense network, nothing fine-tuned; reconstructed on normalised images, if they are given."""
    masks = sculpt.make_masks(space, model.params, policy)
    left = sculpt.apply_masks(model, masks) if images is None else sculpt.reconstruct(model, masks, images)
    return sculpt.compact(left, space, policy, masks=masks)


def begin(name: str, folder: Path, data: Path, **settings: Any) -> tuple[BenchmarkTask, Splits, Model]:
    """A task, its data, and its dense network of seed 0; ends the program where `folder` was begun with other settings."""
    task = TASKS[name]
    settle(folder, {"train": repr(task.train), "finetune": repr(task.finetune), **settings})
    splits = task.load(data)
    return task, splits, dense_network(task, splits, 0, folder, data)


def parser_of(description: str | None, run: str, tasks: list[str]) -> argparse.ArgumentParser:
    """What benchmarks on tasks are told: where the data are, where to keep what is done, and which tasks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="holds cifar10/, tiny_imagenet/ and weights/"
    )
    parser.add_argument("--run", type=Path, default=Path("runs") / run)
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=list(TASKS))
    return parser

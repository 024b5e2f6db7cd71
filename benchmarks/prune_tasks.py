"""Small real tasks, dense against pruned to half of the MACs, with and without distillation and BatchNorm recalibration.

    python -m benchmarks.prune_tasks --data DATA --tasks digits-resnet8 digits-vit --seeds 0 1 2

Each task trains a dense network by its recipe (or fine-tunes given weights by it), searches channels to remove with the agent,
tests the pruned network before any training as it is and with its BatchNorm recalibrated, compacts it, and fine-tunes it
twice with the same key: on the labels alone, and on labels and the dense network's predictions alike. Every stage is kept
under --run and skipped when it is there already, so that a killed benchmark goes on where it was; the table holds whatever is
complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import in_words, settle, stage, test_accuracy
from benchmarks.timing import provenance, write_results
from sculpt.model import Model
from sculpt.training import Splits, load_parquet

BUDGET = 0.5
DISTILLATION = 0.5
RECALIBRATION_IMAGES = 1024
_FILES = ("dense", "search", "pruned", "labels", "taught")
"""Stages of a task, in order."""


@dataclasses.dataclass(frozen=True)
class Task:
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
    def search(self) -> sculpt.SearchConfig:
        """By the cross-entropy of 256 train images; the best four are fine-tuned for up to 50 steps before the last choice."""
        brief = dataclasses.replace(self.finetune, max_steps=50)
        return sculpt.SearchConfig(
            budget=BUDGET, evaluations=self.evaluations, objective="loss", rerank=4, rerank_finetune=brief
        )


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
    "digits-resnet8": Task(
        _digits,
        "resnet8",
        _recipe("resnet8", 8).train(epochs=20, augment="shift"),
        _recipe("resnet8", 8).finetune(augment="shift"),
    ),
    "digits-vit": Task(
        _digits,
        "vit_tiny_patch2",
        _recipe("vit_tiny_patch2", 8).train(epochs=100, batch_size=32, learning_rate=1e-3, augment="shift"),
        _recipe("vit_tiny_patch2", 8).finetune(epochs=20, batch_size=32, learning_rate=3e-4, augment="shift"),
        options={"depth": 4, "width": 64, "heads": 4, "hidden": 128},
        evaluations=256,
    ),
    "cifar10-jpeg-resnet56": Task(
        _cifar,
        "resnet56",
        _recipe("resnet56", 32).finetune(epochs=1, augment="crop_flip"),
        _recipe("resnet56", 32).finetune(epochs=1, augment="crop_flip"),
        weights="weights/cifar10_resnet56.safetensors",
    ),
    "tiny-imagenet-100-efficientnet": Task(
        _tiny_imagenet,
        "efficientnet_lite0",
        _recipe("efficientnet_lite0", 64).finetune(epochs=2, augment="crop_flip"),
        _recipe("efficientnet_lite0", 64).finetune(epochs=2, augment="crop_flip"),
        weights="weights/imagenet_efficientnet_lite0.safetensors",
        new_head=True,
        evaluations=128,
    ),
    "tiny-imagenet-100-mobilenet_v2": Task(
        _tiny_imagenet,
        "mobilenet_v2",
        _recipe("mobilenet_v2", 64).train(epochs=4, augment="crop_flip"),
        _recipe("mobilenet_v2", 64).finetune(epochs=2, augment="crop_flip"),
        evaluations=128,
    ),
    "fashion-mnist-resnet20": Task(
        _fashion,
        "resnet20",
        _recipe("resnet20", 28).train(epochs=1, augment="shift"),
        _recipe("resnet20", 28).finetune(epochs=1, augment="shift"),
    ),
    "fashion-mnist-vgg": Task(
        _fashion,
        "vgg16_bn_cifar",
        _recipe("vgg16_bn_cifar", 28).train(epochs=2, augment="shift"),
        _recipe("vgg16_bn_cifar", 28).finetune(epochs=1, augment="shift"),
        options={"depths": (1, 1, 2, 2), "widths": (16, 32, 64, 64)},
    ),
}
"""Name -> task. VGG on fashion_mnist is a small one: six convolutions of 16 to 64 channels in four stages."""


def starting_model(task: Task, splits: Splits, seed: int, data: Path) -> Model:
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


def searched(model: Model, space: Any, splits: Splits, task: Task, seed: int, folder: Path) -> dict[str, Any]:
    """The agent's policy."""
    key = jax.random.key(100 + seed)
    found = sculpt.search(model, space, splits, task.search, key, directory=folder / "search")
    return {"policy": found.policy.tolist(), "unique_evaluations": found.unique_evaluations}


def pruned(model: Model, small: Model, splits: Splits) -> dict[str, Any]:
    """What is left before any training."""
    image = jnp.zeros((1, *splits.train.images.shape[1:]))
    macs, params = sculpt.count_cost(small, image)
    dense_macs, dense_params = sculpt.count_cost(model, image)
    calibration = splits.normalise(splits.train.images[:RECALIBRATION_IMAGES])
    return {
        "untouched": test_accuracy(small, splits),
        "recalibrated": test_accuracy(sculpt.recalibrate(small, calibration), splits)
        if small.state
        else None,
        "macs": macs / dense_macs,
        "params": params / dense_params,
        "dense_macs": dense_macs,
        "dense_params": dense_params,
    }


def run(task: Task, splits: Splits, seed: int, folder: Path, data: Path) -> None:
    """All stages of a task for one seed."""
    start = starting_model(task, splits, seed, data)
    stage(folder / "dense.json", lambda: tuned(start, splits, task.train, seed, folder / "dense"))
    like = {"params": start.params, "state": start.state}
    dense = start.replace(**sculpt.load_params(folder / "dense.safetensors", like))
    trace = sculpt.trace(dense, jnp.zeros((1, *splits.train.images.shape[1:])))
    space = sculpt.make_space(trace, families=("channels",))
    found = stage(folder / "search.json", lambda: searched(dense, space, splits, task, seed, folder))
    policy = np.asarray(found["policy"], np.int32)
    masked = sculpt.apply_masks(dense, sculpt.make_masks(space, dense.params, policy))
    small = sculpt.compact(masked, space, policy)
    stage(folder / "pruned.json", lambda: pruned(dense, small, splits))
    for name, teacher in (("labels", None), ("taught", dense)):
        compute = functools.partial(tuned, small, splits, task.finetune, seed, folder / name, teacher)
        stage(folder / f"{name}.json", compute)


def rows_of(name: str, seeds: list[int], folder: Path) -> list[str]:
    """Rows of the table: those seeds of a task that are complete."""
    rows = []
    for seed in seeds:
        files = [folder / name / f"seed{seed}" / f"{part}.json" for part in _FILES]
        if not all(file.exists() for file in files):
            continue
        dense, search, left, labels, taught = (json.loads(file.read_text()) for file in files)
        untouched = f"{left['untouched']:.1f}"
        recalibrated = "-" if left["recalibrated"] is None else f"{left['recalibrated']:.1f}"
        minutes = " / ".join(f"{part['seconds'] / 60:.1f}" for part in (dense, search, labels, taught))
        rows.append(
            f"| {name} | {seed} | {left['dense_macs'] / 1e6:.2f} | {dense['test_accuracy']:.2f} | {untouched} | {recalibrated} | "
            f"{labels['test_accuracy']:.2f} | {taught['test_accuracy']:.2f} | {left['macs']:.3f} | {left['params']:.3f} | "
            f"{search['unique_evaluations']} | {minutes} |"
        )
    return rows


def report(names: list[str], seeds: list[int], folder: Path) -> None:
    """Prints the table as Markdown and keeps it in benchmarks/results/."""
    found = {name: rows for name in names if (rows := rows_of(name, seeds, folder))}
    if not found:
        return
    lines = [
        "# Small real tasks, pruned to half of their MACs by channels",
        "",
        *provenance(),
        f"MACs and parameters are realised (counted after compaction), accuracies measured on the test split, in percent. "
        f"Recalibrated: BatchNorm on {RECALIBRATION_IMAGES} train images. Taught: {DISTILLATION} of the loss is the divergence from "
        "the dense network. Minutes: dense / search / fine-tuning on labels / taught, of one process each on a shared machine.",
        "",
        "| task | seed | dense MMACs | dense | pruned, untouched | recalibrated | fine-tuned on labels | taught | MACs kept | "
        "params kept | distinct policies | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row for rows in found.values() for row in rows),
        "",
    ]
    for name in found:
        task = TASKS[name]
        about = json.loads((folder / name / "data.json").read_text())
        source = "from scratch" if task.weights is None else f"from {Path(task.weights).name}"
        head = " with a new head" if task.new_head else ""
        options = f" {task.options}" if task.options else ""
        lines += [
            f"- {name}: {task.model}{options}, {source}{head}; train {about['train']:,}, validation {about['validation']:,}, "
            f"test {about['test']:,} images (standard error of 90% on them {30 / about['test'] ** 0.5:.2f} points); "
            f"{task.evaluations} evaluations. Dense: {in_words(task.train)}. Pruned: {in_words(task.finetune)}.",
        ]
    write_results("prune_tasks", lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="holds cifar10/, tiny_imagenet/ and weights/"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/prune_tasks"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    for name in options.tasks:
        task, folder = TASKS[name], options.run / name
        about = {field.name: repr(getattr(task, field.name)) for field in dataclasses.fields(task)}
        settle(folder, {**about, "load": name, "search": repr(task.search), "distillation": DISTILLATION})
        splits = task.load(options.data)
        sizes = {part: len(getattr(splits, part).labels) for part in ("train", "validation", "test")}
        (folder / "data.json").write_text(json.dumps(sizes))
        for seed in options.seeds:
            run(task, splits, seed, folder / f"seed{seed}", options.data)
            report(list(TASKS), sorted({0, 1, 2, *options.seeds}), options.run)


if __name__ == "__main__":
    main()

"""Small real tasks, dense against pruned to half of the MACs, with and without distillation and BatchNorm recalibration.

    python -m benchmarks.prune_tasks --data DATA --tasks digits-resnet8 digits-vit --seeds 0 1 2

Each task trains a dense network by its recipe (or fine-tunes given weights by it), searches channels to remove with the agent,
tests the pruned network before any training as it is and with its BatchNorm recalibrated, compacts it, and fine-tunes it
twice with the same key: on the labels alone, and on labels and the dense network's predictions alike. Every stage is kept
under --run and skipped when it is there already, so that a killed benchmark goes on where it was; the table holds whatever is
complete.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import in_words, settle, stage, test_accuracy
from benchmarks.tasks import DISTILLATION, TASKS, BenchmarkTask, dense_network, parser_of, tuned
from benchmarks.timing import provenance, write_results
from sculpt.data.splits import Splits
from sculpt.model import Model

BUDGET = 0.5
RECALIBRATION_IMAGES = 1024
_FILES = ("dense", "search", "pruned", "labels", "taught")
"""Stages of a task, in order."""


def search_of(task: BenchmarkTask) -> sculpt.SearchConfig:
    """By the cross-entropy of 256 train images; the best four are fine-tuned briefly before the last choice."""
    return sculpt.SearchConfig(
        budget=BUDGET, evaluations=task.evaluations, objective="loss", rerank=4, rerank_finetune=task.brief
    )


def searched(
    model: Model, space: Any, splits: Splits, task: BenchmarkTask, seed: int, folder: Path
) -> dict[str, Any]:
    """The agent's policy."""
    key = jax.random.key(100 + seed)
    found = sculpt.search(model, space, splits, search_of(task), key, directory=folder / "search")
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


def run(task: BenchmarkTask, splits: Splits, seed: int, folder: Path, data: Path) -> None:
    """All stages of a task for one seed."""
    dense = dense_network(task, splits, seed, folder, data)
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
    parser = parser_of(__doc__, "prune_tasks", list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    for name in options.tasks:
        task, folder = TASKS[name], options.run / name
        about = {field.name: repr(getattr(task, field.name)) for field in dataclasses.fields(task)}
        settle(folder, {**about, "load": name, "search": repr(search_of(task)), "distillation": DISTILLATION})
        splits = task.load(options.data)
        sizes = {part: len(getattr(splits, part).labels) for part in ("train", "validation", "test")}
        (folder / "data.json").write_text(json.dumps(sizes))
        for seed in options.seeds:
            run(task, splits, seed, folder / f"seed{seed}", options.data)
            report(list(TASKS), sorted({0, 1, 2, *options.seeds}), options.run)


if __name__ == "__main__":
    main()

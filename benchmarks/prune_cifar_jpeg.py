"""ResNet-20 at half of its MACs, end to end, on cifar10-jpeg: dense and pruned fine-tuned alike, several seeds.

    python -m benchmarks.prune_cifar_jpeg --data-dir DATA/cifar10 --weights DATA/weights/cifar10_resnet20.safetensors

Both networks start from the same pretrained weights (trained on lossless CIFAR-10) and are fine-tuned for the same number
of epochs with the same recipe on the JPEG copy; both are tested on its 10,000 test images. The pruned network is searched
by the agent with channel removal only, so that its MACs are removed, not merely zero; it is compacted before fine-tuning
(the masked and the compacted network are one function, the smaller one trains faster), and learns from the labels and from
the dense network fine-tuned with the same seed (distillation; `--distillation 0` leaves that out). Every stage is kept under --run
and skipped when it is there already, so that a killed benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import in_words, settle, stage, test_accuracy
from benchmarks.timing import provenance, write_results
from sculpt.model import Model

RECIPE = sculpt.FinetuneConfig(
    epochs=5, batch_size=64, learning_rate=0.03, weight_decay=5e-4, augment="crop_flip"
)
EVALUATIONS = 2048
SCORE_IMAGES = 256
BRIEF = dataclasses.replace(RECIPE, learning_rate=0.02, max_steps=100)
"""How the best four policies of a search are fine-tuned before the last choice."""


def tuned(
    model: Model,
    splits: Any,
    seed: int,
    directory: Path,
    teacher: Model | None = None,
    distillation: float = 0.0,
) -> dict[str, Any]:
    """Fine-tunes by the common recipe, tests, and keeps the weights beside `directory`."""
    progress: list[dict[str, float]] = []

    def log(row: dict[str, float]) -> None:
        progress.append({k: round(float(v), 5) for k, v in row.items()})
        print(directory.name, progress[-1], flush=True)

    key = jax.random.key(seed)
    recipe = dataclasses.replace(RECIPE, distillation=distillation)
    trained = sculpt.finetune(
        model, None, splits, recipe, key, teacher=teacher, directory=directory, on_metrics=log
    )
    weights = {"params": trained.params, "state": trained.state}
    sculpt.save_params(weights, directory.with_suffix(".safetensors"))
    return {"test_accuracy": test_accuracy(trained, splits), "epochs": progress}


def searched(
    model: Model, space: Any, splits: Any, seed: int, budget: float, directory: Path
) -> dict[str, Any]:
    """The agent's policy at this budget."""
    config = sculpt.SearchConfig(
        budget=budget,
        evaluations=EVALUATIONS,
        objective="loss",
        score_images=SCORE_IMAGES,
        rerank=4,
        rerank_finetune=BRIEF,
    )
    result = sculpt.search(model, space, splits, config, jax.random.key(100 + seed), directory=directory)
    return {
        "policy": np.asarray(result.policy).tolist(),
        "score": float(result.score),
        "evaluations": result.evaluations,
        "unique_evaluations": result.unique_evaluations,
    }


def run_stage(
    name: str, seed: int, model: Model, space: Any, splits: Any, options: argparse.Namespace
) -> None:
    """One of the three stages for one seed."""
    folder = options.run / f"seed{seed}"
    if name == "dense":
        stage(folder / "dense.json", lambda: tuned(model, splits, seed, folder / "dense"))
    elif name == "search":
        stage(
            folder / "search.json",
            lambda: searched(model, space, splits, seed, options.budget, folder / "search"),
        )
    else:
        policy = np.asarray(json.loads((folder / "search.json").read_text())["policy"], np.int32)
        teacher = None
        if options.distillation:
            like = {"params": model.params, "state": model.state}
            teacher = model.replace(**sculpt.load_params(folder / "dense.safetensors", like))
        stage(
            folder / "pruned.json",
            lambda: pruned(
                model, space, splits, policy, seed, folder / "pruned", teacher, options.distillation
            ),
        )


def pruned(
    model: Model,
    space: Any,
    splits: Any,
    policy: np.ndarray,
    seed: int,
    directory: Path,
    teacher: Model | None,
    distillation: float,
) -> dict[str, Any]:
    """Masks, compacts, fine-tunes and tests one policy."""
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy)
    macs, params = sculpt.count_cost(small, jnp.zeros((1, 32, 32, 3)))
    recalibrated = sculpt.recalibrate(small, splits.normalise(splits.train.images[:1024]))
    before = test_accuracy(recalibrated, splits)
    result = tuned(small, splits, seed, directory, teacher, distillation)
    return {**result, "macs": macs, "params": params, "before_finetune": before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="holds train_jpeg.parquet and test_jpeg.parquet"
    )
    parser.add_argument("--weights", type=Path, required=True, help="cifar10_resnet20.safetensors")
    parser.add_argument("--run", type=Path, default=Path("runs/prune_cifar_jpeg"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument(
        "--distillation",
        type=float,
        default=0.5,
        help="share of the pruned network's loss that is its teacher's",
    )
    parser.add_argument("--stages", nargs="+", default=["dense", "search", "pruned"])
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    settle(
        options.run,
        {
            "weights": options.weights.name,
            "budget": options.budget,
            "distillation": options.distillation,
            "search": [EVALUATIONS, SCORE_IMAGES],
            "recipe": repr((RECIPE, BRIEF)),
        },
    )
    splits = sculpt.load_data("cifar10-jpeg", options.data_dir)
    model = sculpt.from_linen(*sculpt.nets.load("resnet20", options.weights, num_classes=10))
    image = jnp.zeros((1, 32, 32, 3))
    trace = sculpt.trace(model, image)
    space = sculpt.make_space(trace, families=("channels",))
    untuned = stage(options.run / "untuned.json", lambda: {"test_accuracy": test_accuracy(model, splits)})
    for name in options.stages:
        for seed in options.seeds:
            run_stage(name, seed, model, space, splits, options)
    rows = []
    for seed in options.seeds:
        folder = options.run / f"seed{seed}"
        files = [folder / f"{name}.json" for name in ("dense", "search", "pruned")]
        if all(file.exists() for file in files):
            rows.append([seed, *(json.loads(file.read_text()) for file in files)])
    report(rows, untuned, trace, len(splits.test.labels), options)


def report(
    rows: list[list[Any]], untuned: dict[str, Any], trace: Any, num_test: int, options: argparse.Namespace
) -> None:
    """Prints the table as Markdown and keeps it in benchmarks/results/."""
    if not rows:
        return
    lines = [
        "# ResNet-20 pruned to half of its MACs, cifar10-jpeg",
        "",
        *provenance(),
        f"Recipe of both: {in_words(RECIPE)}; the pruned network with distillation={options.distillation} besides.",
        f"Search: agent, channels only, budget {options.budget}, {EVALUATIONS} evaluations by the cross-entropy on "
        f"{SCORE_IMAGES} train images; the best 4 fine-tuned briefly ({in_words(BRIEF)}).",
        f"n = {num_test:,} JPEG test images, standard error about {100 * (0.13 * 0.87 / num_test) ** 0.5:.1f} points.",
        "Accuracies are measured, MACs realised (counted on the compacted network). A stage that was interrupted and "
        "resumed shows the seconds of its last process.",
        f"Pretrained network before any fine-tuning on JPEG: {untuned['test_accuracy']:.2f}%. "
        f"Dense: {trace.macs} MACs, {trace.num_params} parameters.",
        "",
        "| seed | dense % | pruned % | drop | pruned before fine-tuning % | MACs kept (realised) | params kept | dense s | search s | pruned s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seed, dense, search, pruned in rows:
        drop = dense["test_accuracy"] - pruned["test_accuracy"]
        lines.append(
            f"| {seed} | {dense['test_accuracy']:.2f} | {pruned['test_accuracy']:.2f} | {drop:.2f} | "
            f"{pruned['before_finetune']:.2f} | {pruned['macs'] / trace.macs:.4f} | {pruned['params'] / trace.num_params:.4f} | "
            f"{dense['seconds']:.0f} | {search['seconds']:.0f} | {pruned['seconds']:.0f} |"
        )
    drops = [dense["test_accuracy"] - pruned["test_accuracy"] for _, dense, _, pruned in rows]
    lines += [
        "",
        f"Mean drop {np.mean(drops):.2f} points over {len(drops)} seeds (largest {max(drops):.2f}).",
    ]
    write_results("prune_cifar_jpeg", lines)


if __name__ == "__main__":
    main()

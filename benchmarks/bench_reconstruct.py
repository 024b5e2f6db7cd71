"""What reconstruction is worth, before fine-tuning and after it.

    python -m benchmarks.bench_reconstruct --data DATA --tasks digits-resnet8 digits-vit cifar10-jpeg-resnet20

Tasks are those of `tasks`, their dense network trained once, with seed 0; other seeds draw other images and fine-tune otherwise.
Channels go by energy, by one threshold for the whole network (`magnitude_policy`; nothing is searched). The masked network and the
reconstructed one are tested as they are and with BatchNorm recalibrated, on the same train images; then both are fine-tuned alike, from
what they were before recalibration, with the dense network as their teacher, and tested. Everything is kept under --run and skipped when
it is there already.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import in_words, stage, test_accuracy
from benchmarks.tasks import TASKS, BenchmarkTask, begin, parser_of, tuned
from benchmarks.timing import provenance, write_results
from sculpt.data.splits import Splits
from sculpt.model import Model

IMAGES = 512
"""Of the train split, for recalibration and reconstruction."""


def untrained(model: Model, splits: Splits, budget: float, seed: int) -> tuple[dict[str, Model], Any]:
    """The networks that are compared before any training, by their columns; and how the masked one is made compact."""
    example = jnp.zeros((1, *splits.train.images.shape[1:]))
    space = sculpt.make_space(sculpt.trace(model, example), ("channels",))
    policy = np.asarray(sculpt.magnitude_policy(space, model.params, budget))
    masks = sculpt.make_masks(space, model.params, policy)
    drawn = np.random.default_rng(seed).permutation(len(splits.train.labels))[:IMAGES]
    images = splits.normalise(splits.train.images[np.sort(drawn)])
    found = {"dense": model, "masked": sculpt.apply_masks(model, masks)}
    found["reconstructed"] = sculpt.reconstruct(model, masks, images)
    if model.state:
        for name in ("masked", "reconstructed"):
            found[f"{name}, recalibrated"] = sculpt.recalibrate(found[name], images)
    return found, lambda masked: sculpt.compact(masked, space, policy, masks=masks)


def before(model: Model, splits: Splits, budget: float, seed: int) -> dict[str, Any]:
    """Test accuracies in percent, and the share of the MACs."""
    networks, compact = untrained(model, splits, budget, seed)
    example = jnp.zeros((1, *splits.train.images.shape[1:]))
    macs = [sculpt.count_cost(m, example)[0] for m in (compact(networks["masked"]), model)]
    accuracies = {name: test_accuracy(network, splits) for name, network in networks.items()}
    jax.clear_caches()
    return {"macs": macs[0] / macs[1], **accuracies}


def after(
    model: Model, splits: Splits, task: BenchmarkTask, budget: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Test accuracies in percent after fine-tuning."""
    networks, compact = untrained(model, splits, budget, seed)
    found = {}
    for name in ("masked", "reconstructed"):
        small = compact(networks[name])
        result = tuned(small, splits, task.finetune, seed, folder / f"{name}-{seed}", teacher=model)
        found[f"{name}, fine-tuned"] = result["test_accuracy"]
    jax.clear_caches()
    return found


COLUMNS = (
    "dense", "masked", "masked, recalibrated", "reconstructed", "reconstructed, recalibrated",
    "masked, fine-tuned", "reconstructed, fine-tuned",
)  # fmt: skip


def rows_of(folder: Path) -> list[str]:
    """A row for each budget: the seeds that are complete, apart by /."""
    rows = []
    for place in sorted(folder.glob("budget-*")):
        results = [
            json.loads(file.read_text()) | json.loads((place / f"untrained-{file.name}").read_text())
            for file in sorted(place.glob("seed*.json"))
        ]
        if results:
            cells = [
                " / ".join(f"{result[name]:.2f}" if name in result else "-" for result in results)
                for name in COLUMNS
            ]
            macs = " / ".join(f"{result['macs']:.3f}" for result in results)
            rows.append(f"| {place.name.removeprefix('budget-')} | {macs} | {' | '.join(cells)} |")
    return rows


def report(options: Any) -> None:
    """Prints the table as Markdown and keeps it in benchmarks/results/."""
    lines = [
        "# Reconstruction",
        "",
        *provenance(),
        f"Test accuracy in percent; channels by energy, seeds apart by /. Recalibration and reconstruction on {IMAGES} train images. "
        "Fine-tuned with the dense network as the teacher, seed and data alike.",
    ]
    for name in TASKS:
        if rows := rows_of(options.run / name):
            lines += [
                "",
                f"## {name}",
                "",
                f"{in_words(TASKS[name].finetune)}.",
                "",
                f"| budget | MACs | {' | '.join(COLUMNS)} |",
                f"| {' | '.join(['---'] * (len(COLUMNS) + 2))} |",
                *rows,
            ]
    write_results("bench_reconstruct", lines)


def main() -> None:
    parser = parser_of(__doc__, "bench_reconstruct", ["digits-resnet8", "digits-vit"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    for name in options.tasks:
        folder = options.run / name
        task, splits, dense = begin(name, folder, options.data)
        for seed in options.seeds:
            for budget in options.budgets:
                place = folder / f"budget-{budget}"
                place.mkdir(parents=True, exist_ok=True)
                stage(
                    place / f"untrained-seed{seed}.json",
                    functools.partial(before, dense, splits, budget, seed),
                )
                stage(
                    place / f"seed{seed}.json",
                    functools.partial(after, dense, splits, task, budget, seed, place),
                )
                report(options)


if __name__ == "__main__":
    main()

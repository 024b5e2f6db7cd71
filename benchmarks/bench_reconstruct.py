"""What reconstruction is worth, before fine-tuning and after it.

    python -m benchmarks.bench_reconstruct --data DATA --tasks digits-resnet8 digits-vit cifar10-jpeg-resnet20

Tasks are those of `tasks`, their dense network trained once, with seed 0; other seeds draw other images and fine-tune otherwise. Channels go by energy, by one threshold for the whole network
(`magnitude_policy`; nothing is searched). The masked network is tested as it is, with BatchNorm recalibrated, and reconstructed, on the
same train images; then the first and the last are fine-tuned alike with the dense network as their teacher, and tested. Everything is
kept under --run and skipped when it is there already.
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
from benchmarks.tasks import TASKS, Task, begin, parser_of, tuned
from benchmarks.timing import provenance, write_results
from sculpt.model import Model
from sculpt.training import Splits

IMAGES = 512
"""Of the train split, for recalibration and reconstruction."""


def compared(
    model: Model, splits: Splits, task: Task, budget: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Test accuracies in percent of one policy."""
    example = jnp.zeros((1, *splits.train.images.shape[1:]))
    space = sculpt.make_space(sculpt.trace(model, example), ("channels",))
    policy = np.asarray(sculpt.magnitude_policy(space, model.params, budget))
    masks = sculpt.make_masks(space, model.params, policy)
    masked = sculpt.apply_masks(model, masks)
    drawn = np.random.default_rng(seed).permutation(len(splits.train.labels))[:IMAGES]
    images = splits.normalise(splits.train.images[np.sort(drawn)])
    fitted = sculpt.reconstruct(model, masks, images)
    found = {
        "macs": float(sculpt.cost(space, policy).macs_ratio),
        "dense": test_accuracy(model, splits),
        "masked": test_accuracy(masked, splits),
        "recalibrated": test_accuracy(sculpt.recalibrate(masked, images), splits) if model.state else None,
        "reconstructed": test_accuracy(fitted, splits),
    }
    for name, start in (("masked", masked), ("reconstructed", fitted)):
        small = sculpt.compact(start, space, policy, masks=masks)
        after = tuned(small, splits, task.finetune, seed, folder / f"{name}-{seed}", teacher=model)
        found[f"{name}, fine-tuned"] = after["test_accuracy"]
    jax.clear_caches()
    return found


COLUMNS = (
    "dense", "masked", "recalibrated", "reconstructed", "masked, fine-tuned", "reconstructed, fine-tuned",
)  # fmt: skip


def rows_of(folder: Path) -> list[str]:
    """A row for each budget: the seeds that are complete, apart by /."""
    rows = []
    for place in sorted(folder.glob("budget-*")):
        results = [json.loads(file.read_text()) for file in sorted(place.glob("seed*.json"))]
        if results:
            cells = [
                " / ".join("-" if result[name] is None else f"{result[name]:.2f}" for result in results)
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
                compute = functools.partial(compared, dense, splits, task, budget, seed, place)
                stage(place / f"seed{seed}.json", compute)
                report(options)


if __name__ == "__main__":
    main()

"""Budgets of measured latency against budgets of MACs: the same search, engine and fine-tuning.

    python -m benchmarks.bench_resources --data DATA --tasks digits-resnet8 --seeds 0 1 2

Tasks are those of `tasks`, their dense network trained (or fine-tuned) once, with seed 0. The latency of every layer under every
option is measured first; then the agent searches channels and windows, for several budgets of either kind, and of both at
once. With `--engines xla onnxruntime` a budget of latency holds in each of them. What is found is compacted, its latency
measured beside the dense network's in the first, and fine-tuned alike and tested. Everything is kept under --run and skipped
when it is there already. `--also onnxruntime openvino litert` measures what was found in other engines too.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import in_words, stage
from benchmarks.tasks import TASKS, BenchmarkTask, begin, compacted, parser_of, tuned
from benchmarks.timing import provenance, write_results
from sculpt.data.splits import Splits
from sculpt.latency.engines import ENGINES
from sculpt.latency.layer_latency import LayerLatency, load_layers, save_layers
from sculpt.model import Model
from sculpt.pruning.space import Space

ALLOWANCE = 1.4
"""Where both are limited, the share of the latency may be so many times that of MACs."""


def layers_of(
    model: Model, space: Space, splits: Splits, engine: str, batch: int, file: Path
) -> LayerLatency:
    """The latency of the layers in an engine, measured unless it is kept already."""
    if not file.exists():
        x = splits.normalise(splits.train.images[:batch])
        save_layers(
            sculpt.measure_layers(
                model,
                space,
                x,
                jax.random.key(0),
                engine=engine,
                threads=1,
                networks=12,
                all_sizes=True,
            ),
            file,
        )
    return load_layers(file)


def searched(
    model: Model,
    space: Space,
    latencies: Sequence[LayerLatency],
    splits: Splits,
    task: BenchmarkTask,
    budget: float,
    seed: int,
    folder: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One search; what it found, measured and fine-tuned."""
    config = sculpt.SearchConfig(
        budget=budget, evaluations=options.evaluations, rerank=4, rerank_finetune=task.brief
    )
    found = sculpt.search(model, space, splits, config, jax.random.key(seed))
    small = compacted(model, space, found.policy)
    x = splits.normalise(splits.train.images[: options.batch])
    times = sculpt.compare_latency(
        {"dense": model, "small": small}, x, 60, engine=options.engines[0], threads=1
    )
    folder.mkdir(parents=True, exist_ok=True)
    after = tuned(small, splits, task.finetune, 0, folder / f"seed{seed}", teacher=model)
    jax.clear_caches()
    return {
        "macs": found.macs_ratio,
        "predicted": [
            float(latency.seconds(space, found.policy)) / latency.resource.total for latency in latencies
        ],
        "measured": times["small"].median / times["dense"].median,
        "quartiles": [second / times["dense"].median for second in times["small"].spread],
        "score": found.score,
        "test": after["test_accuracy"],
        "policy": found.policy.tolist(),
    }


def elsewhere(
    model: Model, space: Space, splits: Splits, file: Path, engine: str, batch: int
) -> dict[str, Any]:
    """How much faster than the dense network what a search has found is in another engine."""
    policy = np.asarray(json.loads(file.read_text())["policy"], np.int32)
    small = compacted(model, space, policy)
    x = splits.normalise(splits.train.images[:batch])
    times = sculpt.compare_latency({"dense": model, "small": small}, x, 30, engine=engine, threads=1)
    return {"speed_up": times["dense"].median / times["small"].median}


def rows_of(folder: Path, engines: Sequence[str]) -> list[str]:
    """A row for each kind and budget: means over the seeds that are complete."""
    rows = []
    for place in sorted(folder.glob("*-*")):
        results = [json.loads(file.read_text()) for file in sorted(place.glob("seed*.json"))]
        if not results:
            continue
        kind, budget = place.name.rsplit("-", 1)
        columns = [
            " / ".join(f"{result['macs']:.3f}" for result in results),
            " / ".join(", ".join(f"{share:.3f}" for share in result["predicted"]) for result in results),
            " / ".join(f"{result['measured']:.3f}" for result in results),
        ]
        tests = [result["test"] for result in results]
        for engine in engines:
            found = [json.loads(file.read_text()) for file in sorted(place.glob(f"{engine}-seed*.json"))]
            columns.append(" / ".join(f"{other['speed_up']:.2f}" for other in found) or "-")
        rows.append(
            f"| {kind} | {budget} | {' | '.join(columns[:3])} | {1 / np.mean([r['measured'] for r in results]):.2f} | "
            f"{''.join(f'{column} | ' for column in columns[3:])}"
            f"{' / '.join(f'{test:.2f}' for test in tests)} | {np.mean(tests):.2f} |"
        )
    return rows


def report(options: argparse.Namespace) -> None:
    """Prints the tables as Markdown and keeps them in benchmarks/results/."""
    lines = [
        "# Budgets of measured latency and of MACs",
        "",
        *provenance(),
        f"{options.evaluations} evaluations by the agent, families {' and '.join(options.families)}, the best 4 fine-tuned "
        "briefly before one is chosen, then fine-tuned with the dense network as its teacher. Latency: "
        f"{options.engines[0]}, batch {options.batch}, one thread, median of 60 interleaved samples, as a share of the dense "
        f"network's; predicted: from the layers, in {' and '.join(options.engines)}, each of which must keep the budget. "
        f"Budgets of both: MACs up to it, latency up to {ALLOWANCE} times it. Values of the seeds apart by /.",
    ]
    for name in TASKS:
        folder = options.run / name
        if rows := rows_of(folder, options.also):
            errors = []
            for engine in options.engines:
                latency = load_layers(folder / f"layers-{engine}.safetensors")
                errors.append(
                    f"{engine}: prediction of {len(latency.measured)} networks from the others off by "
                    f"{100 * np.median(latency.error):.1f}% in the median, {100 * latency.error.max():.1f}% at the most; dense "
                    f"{1e3 * latency.measured[0]:.2f} ms. "
                )
            lines += [
                "",
                f"## {name}",
                "",
                f"{''.join(errors)}Fine-tuning: {in_words(TASKS[name].finetune)}.",
                "",
                "| budget of | budget | MACs kept | latency predicted | latency measured | speed-up | "
                f"{''.join(f'in {engine} | ' for engine in options.also)}test accuracy | mean |",
                f"| --- | --- | --- | --- | --- | --- |{' --- |' * len(options.also)} --- | --- |",
                *rows,
            ]
    write_results("bench_resources", lines)


def main() -> None:
    parser = parser_of(__doc__, "bench_resources", ["digits-resnet8"])
    parser.add_argument("--engines", nargs="+", default=["xla"], choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--also", nargs="+", default=[], choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--latency", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    parser.add_argument("--macs", type=float, nargs="*", default=[0.2, 0.3, 0.5])
    parser.add_argument("--both", type=float, nargs="*", default=[0.5])
    parser.add_argument("--families", nargs="+", default=["channels", "rect"], choices=["channels", "rect"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=512)
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    for name in options.tasks:
        folder = options.run / name
        task, splits, dense = begin(
            name,
            folder,
            options.data,
            evaluations=options.evaluations,
            engines=options.engines,
            batch=options.batch,
            families=options.families,
        )
        trace = sculpt.trace(dense, jnp.zeros((1, *splits.train.images.shape[1:])))
        space = sculpt.make_space(trace, families=options.families)
        latencies = []
        for engine in options.engines:
            file = folder / f"layers-{engine}.safetensors"
            latencies.append(layers_of(dense, space, splits, engine, options.batch, file))
        resources = [latency.resource for latency in latencies]
        spaces = {
            "latency": sculpt.with_resource(space, resources),
            "both": sculpt.with_resource(space, {"macs": 1.0, **dict.fromkeys(resources, ALLOWANCE)}),
            "macs": space,
        }
        for kind, limited in spaces.items():
            for budget in getattr(options, kind):
                low = limited.reachable[0]
                if budget < low:
                    print(f"{name}: {kind} {budget} cannot be reached, {low:.3f} is the least", flush=True)
                    continue
                place = folder / f"{kind}-{budget}"
                for seed in options.seeds:
                    compute = functools.partial(
                        searched,
                        dense,
                        limited,
                        latencies,
                        splits,
                        task,
                        budget,
                        seed,
                        place,
                        options,
                    )
                    file = place / f"seed{seed}.json"
                    stage(file, compute)
                    for engine in options.also:
                        measure = functools.partial(
                            elsewhere, dense, space, splits, file, engine, options.batch
                        )
                        stage(place / f"{engine}-seed{seed}.json", measure)
                report(options)


if __name__ == "__main__":
    main()

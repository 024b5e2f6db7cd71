"""Latency predicted from layers, beside that of whole networks: random policies, compacted and measured.

    taskset -c 1 python -m benchmarks.bench_layer_latency --data DATA [--engines xla onnxruntime]

Half of the policies keep so much of the multiply-accumulates, half so much of the latency as predicted, whose errors are then in their
favour. They are other policies than those that the fit was made on. What is compared is the share of the dense network's latency, which is
what budgets are of.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.tasks import compacted
from benchmarks.timing import provenance, write_results
from sculpt.latency.engines import ENGINES
from sculpt.model import Model
from sculpt.pruning.space import Space

FAMILIES = ("channels", "rect")


def random_policies(space: Space, timed: Space, number: int) -> np.ndarray:
    """int32 `[number, sites]`, by turns of the one space and the other, of rising budgets."""
    lowest = max(space.reachable[0], timed.reachable[0]) + 0.02
    drawn = [
        sculpt.random_policies((space, timed)[i % 2], jax.random.key(i), 1, budget)[0]
        for i, budget in enumerate(np.linspace(lowest, 0.9, number))
    ]
    return np.stack([np.asarray(policy) for policy in drawn])


def row(
    model: Model, space: Space, x: np.ndarray, engine: str, all_sizes: bool, networks: int, repeats: int
) -> str:
    """One line of the table."""
    begun = time.perf_counter()
    latency = sculpt.measure_layers(
        model, space, x, jax.random.key(0), engine=engine, threads=1, all_sizes=all_sizes
    )
    took = time.perf_counter() - begun
    policies = random_policies(space, sculpt.with_resource(space, latency.resource), networks)
    models = {"dense": model} | {str(i): compacted(model, space, p) for i, p in enumerate(policies)}
    measured = sculpt.compare_latency(models, x, repeats, engine=engine, threads=1)
    dense = measured["dense"].median
    shares = np.asarray([measured[str(i)].median / dense for i in range(networks)])
    predicted = np.asarray(latency.seconds(space, policies)) / latency.resource.total
    error = predicted / shares - 1.0
    off = np.abs(error)
    line = (
        f"| {engine} | {'all' if all_sizes else 'fewer'} | {took:.0f} | {1e3 * dense:.2f} | {shares.min():.2f} to {shares.max():.2f} "
        f"| {np.median(off):.1%} | {np.quantile(off, 0.9):.1%} | {off.max():.1%} | {np.median(error):+.1%} "
        f"| {np.median(latency.error):.1%}, {latency.error.max():.1%} |"
    )
    told = (f"{share:.3f} ({off:+.1%})" for share, off in zip(shares, error))
    print(line, "measured (error of the prediction): " + ", ".join(told), sep="\n", file=sys.stderr)
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of all data")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56), help="of the CIFAR-10 ResNet")
    parser.add_argument("--engines", nargs="+", default=["xla"], choices=ENGINES)
    parser.add_argument("--sizes", nargs="+", default=["fewer", "all"], choices=("fewer", "all"))
    parser.add_argument("--batch", type=int, default=32, help="images per call")
    parser.add_argument("--networks", type=int, default=32, help="random policies")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    name = f"resnet{options.depth}"
    weights = options.data / "weights" / f"cifar10_{name}.safetensors"
    model = sculpt.from_linen(*sculpt.nets.load(name, weights, 10))
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 32, 32, 3))), FAMILIES)
    x = np.random.default_rng(0).normal(size=(options.batch, 32, 32, 3)).astype(np.float32)
    table = [
        row(model, space, x, engine, sizes == "all", options.networks, options.repeats)
        for engine in options.engines
        for sizes in options.sizes
    ]
    text = [
        f"# Latency predicted from layers: ResNet-{options.depth}, CIFAR-10",
        "",
        *provenance(),
        f"{options.networks} random policies of the families {' and '.join(FAMILIES)}, compacted, batch {options.batch}, one thread; "
        f"medians of {options.repeats} interleaved samples. The error is that of the predicted share of the dense network's latency, "
        "relative to the measured one; the last column is what `measure_layers` itself says of 8 other networks, each predicted from the "
        "rest: median, largest.",
        "",
        "| engine | sizes of layers | seconds to measure layers | dense, ms | shares measured | error, median | 90% below | largest "
        "| with its sign, median | told by itself |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *table,
    ]
    write_results(f"bench_layer_latency_{name}", text)


if __name__ == "__main__":
    main()

"""Convolutions whose filters keep windows of their own, computed in groups, beside the dense one: what `OVERHEAD` is taken from.

    python -m benchmarks.bench_filter_groups

Random kernels, pruned by the options of `rect_grouped`, one 3x3 convolution each. "every group": filters in multiples of 16 with no
regard to what a group costs by itself; "as compacted": groups put together, or the dense convolution kept, where that is
reckoned to cost less. Runs alternate after a warm-up; the outputs must agree, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.timing import interleaved, provenance, spread, write_results
from sculpt.ir.interpreter import as_written, execute
from sculpt.ir.program import flatten
from sculpt.pruning.compaction.filter_groups import (
    OVERHEAD,
    bind_in_groups,
    group_filters,
    split_convolutions,
)
from sculpt.pruning.compaction.rewriting import bind

SHAPES = ((32, 32), (64, 32), (128, 16), (256, 8), (512, 4))
"""Channels, and the side of the image."""
OPTIONS = (1, 2, 3, 4, 5)


def convolution(kernel: jax.Array, image: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def in_groups(
    kernel: jax.Array, image: jax.Array, mask: np.ndarray, overhead: int
) -> tuple[Callable[[], jax.Array], float, int]:
    """The convolution, its share of the dense MACs, and its number of groups."""
    groups = group_filters(np.transpose(mask.any(axis=2), (2, 0, 1)), overhead)
    program = flatten(convolution, kernel, image)
    executable = split_convolutions(as_written(program), {program.inputs[0]: groups} if groups else {})
    run = jax.jit(lambda k, x: execute(executable, [k, x], bind_in_groups(bind))[0])
    areas = [np.prod([stop - start for start, stop in group.window]) for group in groups]
    macs = sum(area * len(group.filters) for area, group in zip(areas, groups)) / (9 * mask.shape[-1])
    return lambda: run(kernel, image), float(macs) if groups else 1.0, len(groups) or 1


def rows(channels: int, side: int, batch: int, repeats: int) -> list[str]:
    """One line of the table per option."""
    keys = jax.random.split(jax.random.key(0))
    image = jax.random.normal(keys[0], (batch, side, side, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, channels))
    model = sculpt.from_function(lambda p, x: convolution(p, x).mean((1, 2)), kernel)
    space = sculpt.make_space(sculpt.trace(model, image[:1]), "rect_grouped")
    lines = []
    for option in OPTIONS:
        mask = np.asarray(sculpt.make_masks(space, kernel, [option]))
        masked = jnp.where(mask, kernel, 0.0)
        dense = jax.jit(convolution)
        every, every_macs, every_count = in_groups(masked, image, mask, 0)
        chosen, macs, count = in_groups(masked, image, mask, OVERHEAD)
        runs = {"dense": lambda k=masked, f=dense: f(k, image), "every": every, "chosen": chosen}
        outputs = [np.asarray(run()) for run in runs.values()]
        for output in outputs[1:]:
            np.testing.assert_allclose(output, outputs[0], atol=1e-4 * np.abs(outputs[0]).max())
        times = {name: [1e3 * t for t in ts] for name, ts in interleaved(runs, repeats).items()}
        ratios = [
            statistics.median(times[n]) / statistics.median(times["dense"]) for n in ("every", "chosen")
        ]
        lines.append(
            f"| {channels} x {side}x{side} | {space.sites[0].options[option].label} | {spread(times['dense'])} "
            f"| {every_count}, {every_macs:.2f} | {ratios[0]:.2f} | {count}, {macs:.2f} | {ratios[1]:.2f} |"
        )
        print(lines[-1], file=sys.stderr)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    table = [line for shape in SHAPES for line in rows(*shape, options.batch, options.repeats)]
    text = [
        "# Convolutions in groups of filters",
        "",
        *provenance(),
        f"Median of {options.repeats} runs (lowest to highest), {options.batch} images. Time is that of the dense convolution = 1.",
        "One group is the dense convolution itself: what its time differs by is the noise of the machine.",
        "",
        "| channels, image | option | dense, ms | every group: groups, MACs | time | as compacted: groups, MACs | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *table,
    ]
    write_results("bench_filter_groups", text)


if __name__ == "__main__":
    main()

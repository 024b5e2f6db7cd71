"""Depthwise convolutions on CPUs: XLA's own against a sum of shifted products, forwards and backwards.

python -m benchmarks.bench_depthwise
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.timing import interleaved, provenance, spread, write_results
from sculpt.ir.lowering import lowered

SHAPES = ((32, 32, 3, 1), (32, 96, 3, 1), (32, 96, 3, 2), (8, 240, 5, 1), (4, 672, 5, 2))
"""Side of the image, channels, side of the window, stride: layers of mobile networks on small images."""


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A depthwise convolution, for images `[n, side, side, channels]`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def gradients(function: Callable[..., jax.Array]) -> Callable[..., object]:
    """Of the sum of the squared results, with respect to both arguments."""
    return jax.jit(jax.grad(lambda x, kernel: jnp.square(function(x, kernel)).sum(), (0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    lines = [
        "# Depthwise convolutions on CPUs",
        "",
        *provenance(),
        f"Batch {options.batch}, float32, seed 0; milliseconds, median (lowest to highest) of {options.repeats} runs in turn; gradients "
        "are those of the image and the kernel.",
        "",
        "| image | window | XLA | shifts | ratio | XLA, gradients | shifts, gradients | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for side, channels, window, stride in SHAPES:
        x = jax.random.normal(jax.random.key(0), (options.batch, side, side, channels))
        kernel = jax.random.normal(jax.random.key(1), (window, window, 1, channels))

        def convolve(x: jax.Array, kernel: jax.Array, stride: int = stride) -> jax.Array:
            return depthwise(x, kernel, stride)

        shifted = lowered(convolve, "lax", "float32")
        cells = []
        for derive in (jax.jit, gradients):
            calls = {
                "xla": functools.partial(derive(convolve), x, kernel),
                "shifts": functools.partial(derive(shifted), x, kernel),
            }
            for call in calls.values():
                jax.block_until_ready(call())
            times = {
                name: [1e3 * t for t in row] for name, row in interleaved(calls, options.repeats).items()
            }
            middle = {name: sorted(row)[len(row) // 2] for name, row in times.items()}
            cells += [
                spread(times["xla"], 1),
                spread(times["shifts"], 1),
                f"{middle['xla'] / middle['shifts']:.1f}",
            ]
        lines.append(
            f"| {side} x {side} x {channels} | {window} x {window}, stride {stride} | {' | '.join(cells)} |"
        )
    write_results("bench_depthwise", lines)


if __name__ == "__main__":
    main()

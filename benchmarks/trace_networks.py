"""How long `sculpt.trace` takes on networks of real size, and how it grows with their depth.

    python -m benchmarks.trace_networks

Nothing is run or allocated: parameters are abstract. Times are the median and the spread of several calls after one that
warms up Python and jax; each call traces anew.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import linen as nn

import sculpt
from benchmarks.timing import provenance, write_results

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


class BottleneckNetwork(nn.Module):
    """ResNet with bottleneck blocks (He et al., arXiv 1512.03385); (3, 4, 6, 3) is ResNet-50."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def conv(x: jax.Array, width: int, size: int, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (size, size), strides=stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.max_pool(nn.relu(conv(x, 64, 7, 2)), (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            width = 64 * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                y = nn.relu(conv(nn.relu(conv(x, width, 1)), width, 3, stride))
                shortcut = x if block else conv(x, 4 * width, 1, stride)
                x = nn.relu(shortcut + conv(y, 4 * width, 1))
        return nn.Dense(1000)(x.mean((1, 2)))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., arXiv 2010.11929); the defaults are ViT-B/16."""

    depth: int = 12
    width: int = 768
    heads: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), strides=16, padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.zeros, (1, x.shape[1], self.width))
        head_width = self.width // self.heads
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            query, key, value = (nn.DenseGeneral((self.heads, head_width))(y) for _ in range(3))
            scores = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / head_width**0.5)
            y = jnp.einsum("bhqk,bkhd->bqhd", scores, value)
            x = x + nn.DenseGeneral(self.width, axis=(-2, -1))(y)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])


NETWORKS: dict[str, nn.Module] = {
    "ResNet-50": BottleneckNetwork(),
    "ResNet, 2x depth": BottleneckNetwork((6, 8, 12, 6)),
    "ResNet, 4x depth": BottleneckNetwork((12, 16, 24, 12)),
    "ViT-B/16": VisionTransformer(),
    "ViT, 2x depth": VisionTransformer(24),
    "ViT, 4x depth": VisionTransformer(48),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lines = [
        "# Tracing",
        "",
        *provenance(),
        f"Median of {options.repeats} calls (fastest to slowest), nothing allocated.",
        "",
        "| network | equations | parameters | GMACs | groups | frozen kernel widths | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, module in NETWORKS.items():
        model = sculpt.from_linen(module, jax.eval_shape(module.init, jax.random.key(0), IMAGE))
        sculpt.trace(model, IMAGE)
        seconds = []
        for _ in range(options.repeats):
            # Otherwise jax would answer the second call out of its cache.
            jax.clear_caches()
            begun = time.perf_counter()
            trace = sculpt.trace(model, IMAGE)
            seconds.append(time.perf_counter() - begun)
        widths = {(layer.leaf, axis) for layer in trace.layers for axis in layer.out_axes}
        frozen = [f.name for f in trace.frozen if (f.leaf, f.axis) in widths]
        lines.append(
            f"| {name} | {len(trace.program.equations)} | {trace.num_params:,} | {trace.macs / 1e9:.3f} | {len(trace.groups)} | "
            f"{', '.join(frozen)} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |"
        )
    write_results("trace_networks", lines)


if __name__ == "__main__":
    main()

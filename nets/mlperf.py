"""ResNet-8 of the MLPerf Tiny benchmark (Banbury et al., arXiv 2106.07597): projected shortcuts, TensorFlow's padding."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen as nn

from sculpt.nets.layers import ConvNorm, single


class MlperfResNet(nn.Module):
    """A stem and a residual block for each width; all but the first halve the resolution."""

    num_classes: int
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the blocks; the stem has the first."""
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv = functools.partial(
            ConvNorm, train=train, same=True, momentum=0.99, epsilon=1e-3, dtype=self.dtype
        )
        x = conv(self.widths[0], activation=nn.relu, name="stem")(x)
        for block, width in enumerate(self.widths, start=1):
            stride = 1 if block == 1 else 2
            y = conv(width, stride=stride, activation=nn.relu, name=f"block{block}_conv1")(x)
            y = conv(width, name=f"block{block}_conv2")(y)
            if block > 1:
                x = nn.Conv(
                    width,
                    (1, 1),
                    strides=stride,
                    padding="SAME",
                    dtype=self.dtype,
                    name=f"block{block}_shortcut",
                )(x)
            x = nn.relu(x + y)
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x.mean((1, 2))))


MODELS = {"resnet8_mlperf": (MlperfResNet, {}, 32)}
"""Name -> module, its fields, side of the images that it was published for."""

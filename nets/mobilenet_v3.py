"""MobileNet-V3 (Howard et al., arXiv 1905.02244), as in torchvision."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from sculpt.nets.layers import ConvNorm, divisible, single
from sculpt.nets.mobilenet import InvertedResidual


class BlockRow(NamedTuple):
    """A block of MobileNet-V3, as in the paper's tables."""

    kernel: int
    hidden: int
    width: int
    squeeze: bool
    hard: bool
    """Hard swish instead of ReLU."""
    stride: int


class MobileNetV3(nn.Module):
    """A stem, inverted residuals with hard activations, a 1x1 convolution, a global mean, a dense layer and a dense head."""

    rows: tuple[BlockRow, ...]
    num_classes: int
    hidden: int = 1280
    """Width of the dense layer."""
    same: bool = False
    """TensorFlow's padding."""
    momentum: float = 0.99
    epsilon: float = 1e-3
    dropout: float = 0.2
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv = functools.partial(
            ConvNorm,
            activation=nn.hard_swish,
            train=train,
            same=self.same,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        x = conv(16, stride=2, name="stem")(x)
        for index, row in enumerate(self.rows):
            styled = functools.partial(conv, activation=nn.hard_swish if row.hard else nn.relu)
            squeeze = divisible(row.hidden / 4) if row.squeeze else 0
            block = InvertedResidual(
                styled, row.hidden, row.width, row.kernel, row.stride, squeeze, name=f"block{index + 1:02d}"
            )
            x = block(x)
        x = conv(6 * x.shape[-1], kernel=1, name="last")(x).mean((1, 2))
        x = nn.hard_swish(nn.Dense(self.hidden, dtype=self.dtype, name="dense")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x))


_SMALL = (
    BlockRow(3, 16, 16, True, False, 2),
    BlockRow(3, 72, 24, False, False, 2),
    BlockRow(3, 88, 24, False, False, 1),
    BlockRow(5, 96, 40, True, True, 2),
    *[BlockRow(5, 240, 40, True, True, 1)] * 2,
    BlockRow(5, 120, 48, True, True, 1),
    BlockRow(5, 144, 48, True, True, 1),
    BlockRow(5, 288, 96, True, True, 2),
    *[BlockRow(5, 576, 96, True, True, 1)] * 2,
)
_LARGE = (
    BlockRow(3, 16, 16, False, False, 1),
    BlockRow(3, 64, 24, False, False, 2),
    BlockRow(3, 72, 24, False, False, 1),
    BlockRow(5, 72, 40, True, False, 2),
    *[BlockRow(5, 120, 40, True, False, 1)] * 2,
    BlockRow(3, 240, 80, False, True, 2),
    BlockRow(3, 200, 80, False, True, 1),
    *[BlockRow(3, 184, 80, False, True, 1)] * 2,
    BlockRow(3, 480, 112, True, True, 1),
    BlockRow(3, 672, 112, True, True, 1),
    BlockRow(5, 672, 160, True, True, 2),
    *[BlockRow(5, 960, 160, True, True, 1)] * 2,
)
MODELS = {
    "mobilenet_v3_small": (MobileNetV3, {"rows": _SMALL, "hidden": 1024}, 224),
    "mobilenet_v3_large": (MobileNetV3, {"rows": _LARGE}, 224),
}
"""Name -> module, its fields, side of the images that it was published for."""

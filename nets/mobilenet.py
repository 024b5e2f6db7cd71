"""MobileNets: V1 (Howard et al., arXiv 1704.04861, as in Keras), V2 (Sandler et al., arXiv 1801.04381, as in torchvision)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from sculpt.nets.layers import ConvNorm, divisible, single


class MobileNetV1(nn.Module):
    """A stem, thirteen depthwise convolutions each followed by a 1x1 convolution, a global mean and a dense head."""

    num_classes: int
    width_multiplier: float = 1.0
    """Of all channels: 0.25, 0.5, 0.75 and 1 are published."""
    blocks: tuple[tuple[int, int], ...] = (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
    )  # fmt: skip
    """Channels and stride of each block."""
    same: bool = True
    """TensorFlow's padding."""
    momentum: float = 0.99
    epsilon: float = 1e-3
    dropout: float = 0.001
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv = functools.partial(
            ConvNorm,
            activation=nn.relu6,
            train=train,
            same=self.same,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        x = conv(max(1, int(32 * self.width_multiplier)), stride=2, name="stem")(x)
        for index, (width, stride) in enumerate(self.blocks):
            name = f"block{index + 1:02d}"
            x = conv(x.shape[-1], stride=stride, depthwise=True, name=f"{name}_depthwise")(x)
            x = conv(max(1, int(width * self.width_multiplier)), kernel=1, name=f"{name}_pointwise")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x))


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, a depthwise one, perhaps squeeze-and-excitation (arXiv 1709.01507), a 1x1 convolution
    back; added to the input where shapes agree."""

    conv: Callable[..., ConvNorm]
    """Makes the convolutions, in the network's style."""
    hidden: int
    width: int
    kernel: int
    stride: int
    squeeze: int = 0
    """Width of the excitation's bottleneck; 0 for none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.hidden != x.shape[-1]:
            y = self.conv(self.hidden, kernel=1, name="expand")(y)
        y = self.conv(self.hidden, kernel=self.kernel, stride=self.stride, depthwise=True, name="depthwise")(
            y
        )
        if self.squeeze:
            gate = nn.relu(nn.Dense(self.squeeze, dtype=y.dtype, name="squeeze")(y.mean((1, 2))))
            gate = nn.hard_sigmoid(nn.Dense(self.hidden, dtype=y.dtype, name="excite")(gate))
            y = y * gate[:, None, None, :]
        y = self.conv(self.width, kernel=1, activation=None, name="project")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """A stem, stages of inverted residuals, a 1x1 convolution, a global mean and a dense head."""

    num_classes: int
    width_multiplier: float = 1.0
    stages: tuple[tuple[int, int, int, int, int], ...] = (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 3, 32, 3, 2), (6, 3, 64, 4, 2), (6, 3, 96, 3, 1), (6, 3, 160, 3, 2),
        (6, 3, 320, 1, 1),
    )  # fmt: skip
    """Expansion, kernel, channels, blocks and first stride of each stage."""
    last: int = 1280
    """Channels before the mean; a multiplier below one leaves them."""
    same: bool = False
    """TensorFlow's padding."""
    momentum: float = 0.9
    epsilon: float = 1e-5
    dropout: float = 0.2
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv = functools.partial(
            ConvNorm,
            activation=nn.relu6,
            train=train,
            same=self.same,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        x = conv(divisible(32 * self.width_multiplier), stride=2, name="stem")(x)
        for stage, (expansion, kernel, channels, blocks, stride) in enumerate(self.stages):
            width = divisible(channels * self.width_multiplier)
            for block in range(blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                hidden = expansion * x.shape[-1]
                x = InvertedResidual(conv, hidden, width, kernel, 1 if block else stride, name=name)(x)
        x = conv(divisible(self.last * max(1.0, self.width_multiplier)), kernel=1, name="last")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x))


MODELS = {"mobilenet_v1": (MobileNetV1, {}, 224), "mobilenet_v2": (MobileNetV2, {}, 224)}
"""Name -> module, its fields, side of the images that it was published for."""

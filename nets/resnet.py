"""ResNets (He et al., arXiv 1512.03385): for CIFAR with parameter-free option A shortcuts (section 4.2), and for ImageNet as
in torchvision, whose bottlenecks stride in their 3x3 convolution ("v1.5")."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sculpt.nets.layers import BatchNorm, single


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a wider or strided block pads the shortcut's channels with zeros."""

    width: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = _layers(train, self.dtype)
        y = nn.relu(norm(name="norm1")(conv(self.width, (3, 3), strides=self.stride, name="conv1")(x)))
        y = norm(name="norm2")(conv(self.width, (3, 3), name="conv2")(y))
        if self.stride != 1:
            x = x[:, :: self.stride, :: self.stride, :]
        missing = self.width - x.shape[-1]
        if missing:
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """`6 * blocks + 2` layers: a stem, three stages of `blocks` residual blocks, a global mean and a dense head."""

    blocks: int
    """Residual blocks in each stage."""
    num_classes: int
    widths: tuple[int, int, int] = (16, 32, 64)
    """Channels of the three stages."""
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    def __post_init__(self) -> None:
        widths = tuple(self.widths)
        if len(widths) != 3 or widths[0] < 1 or list(widths) != sorted(widths):
            raise ValueError(f"widths must be three positive channel counts that never fall, got {widths}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images float32 `[batch, height, width, channels]` to logits float32 `[batch, num_classes]`."""
        conv, norm = _layers(train, self.dtype)
        x = nn.relu(norm(name="stem_norm")(conv(self.widths[0], (3, 3), name="stem_conv")(x)))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(width, stride, self.dtype, name=_name(stage, block))(x, train)
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x.mean(axis=(1, 2))))


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1; a wider or strided block projects its shortcut."""

    width: int
    """Of the 3x3 convolutions; a bottleneck's output is four times that."""
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv, norm = _layers(train, self.dtype)
        out = 4 * self.width if self.bottleneck else self.width
        kernels = (1, 3, 1) if self.bottleneck else (3, 3)
        strided = kernels.index(3)
        y = x
        for index, kernel in enumerate(kernels):
            last = index == len(kernels) - 1
            stride = self.stride if index == strided else 1
            width = out if last else self.width
            y = conv(width, (kernel, kernel), strides=stride, name=f"conv{index + 1}")(y)
            y = norm(name=f"norm{index + 1}")(y)
            y = y if last else nn.relu(y)
        if x.shape != y.shape:
            x = norm(name="shortcut_norm")(conv(out, (1, 1), strides=self.stride, name="shortcut_conv")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 7x7 stem with max pooling, stages of residual blocks, a global mean and a dense head."""

    depths: tuple[int, ...]
    """Blocks in each stage; those published have four."""
    num_classes: int
    bottleneck: bool = False
    width: int = 64
    """Of the first stage's 3x3 convolutions; each stage doubles it."""
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]` to logits `[batch, num_classes]`."""
        conv, norm = _layers(train, self.dtype)
        x = nn.relu(norm(name="stem_norm")(conv(self.width, (7, 7), strides=2, name="stem_conv")(x)))
        x = nn.pool(x, -jnp.inf, jax.lax.max, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layer = ProjectedBlock(
                    self.width * 2**stage, stride, self.bottleneck, self.dtype, name=_name(stage, block)
                )
                x = layer(x, train)
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x.mean(axis=(1, 2))))


def _layers(train: bool, dtype: Any) -> tuple[Any, Any]:
    """Makers of convolutions and normalisations."""

    def conv(width: int, kernel: tuple[int, int], strides: int = 1, name: str | None = None) -> nn.Conv:
        padding = tuple((k // 2, k // 2) for k in kernel)
        return nn.Conv(width, kernel, strides, padding, use_bias=False, dtype=dtype, name=name)

    norm = functools.partial(BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
    return conv, norm


def _name(stage: int, block: int) -> str:
    return f"stage{stage + 1}_block{block + 1:02d}"


_CIFAR = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
MODELS = {name: (CifarResNet, {"blocks": blocks}, 32) for name, blocks in _CIFAR.items()} | {
    "resnet18": (ResNet, {"depths": (2, 2, 2, 2)}, 224),
    "resnet34": (ResNet, {"depths": (3, 4, 6, 3)}, 224),
    "resnet50": (ResNet, {"depths": (3, 4, 6, 3), "bottleneck": True}, 224),
    "resnet101": (ResNet, {"depths": (3, 4, 23, 3), "bottleneck": True}, 224),
}
"""Name -> module, its fields, side of the images that it was published for."""

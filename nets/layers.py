"""Layers that several network families share: normalisation, convolution with BatchNorm, rounded widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def single(x: jax.Array) -> jax.Array:
    """Half precision as float32; anything else as it is."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


class BatchNorm(nn.BatchNorm):
    """Computes in float32 at least and returns the dtype that it is given."""

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return super().__call__(single(x), *args, **options).astype(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Computes in float32 at least and returns the dtype that it is given."""

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return super().__call__(single(x), *args, **options).astype(x.dtype)


class ConvNorm(nn.Module):
    """A convolution, BatchNorm and an activation."""

    width: int
    """Channels of the output."""
    kernel: int = 3
    stride: int = 1
    depthwise: bool = False
    """Whether each channel is convolved by itself; `width` is then the input's."""
    activation: Callable[[jax.Array], jax.Array] | None = None
    train: bool = False
    bias: bool = False
    same: bool = False
    """TensorFlow's padding, whose odd pixel comes after; otherwise half the kernel on either side."""
    momentum: float = 0.9
    """Of the running statistics: the part of the old ones that stays."""
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        half = self.kernel // 2
        x = nn.Conv(
            self.width,
            (self.kernel, self.kernel),
            strides=self.stride,
            padding="SAME" if self.same else ((half, half), (half, half)),
            feature_group_count=self.width if self.depthwise else 1,
            use_bias=self.bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = BatchNorm(
            use_running_average=not self.train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            name="norm",
        )(x)
        return x if self.activation is None else self.activation(x)


def divisible(width: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is not more than a tenth below `width`."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded

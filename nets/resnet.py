"""CIFAR ResNets (He et al., arXiv 1512.03385, section 4.2) with parameter-free option A shortcuts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a wider or strided block pads the shortcut's channels with zeros."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, self.width, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        y = nn.relu(norm(name="norm1")(conv(strides=self.stride, name="conv1")(x)))
        y = norm(name="norm2")(conv(name="conv2")(y))
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

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images float32 `[batch, height, width, channels]` to logits float32 `[batch, num_classes]`."""
        x = nn.Conv(self.widths[0], (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="stem_conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="stem_norm")(x)
        x = nn.relu(x)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(width, stride, name=f"stage{stage + 1}_block{block + 1:02d}")(x, train)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))

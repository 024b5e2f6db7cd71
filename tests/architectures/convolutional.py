"""Convolutional classifiers: plain, residual, concatenating, pooling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import (
    CLASSES,
    Architecture,
    batch_norm,
    from_linen,
    from_nnx,
    mean_pool,
)


class Plain(nn.Module):
    """Convolutions with BatchNorm, global mean, dense head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for width in (8, 6):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(batch_norm(use_running_average=not train)(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class PlainNnx(nnx.Module):
    """The same in NNX, with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.first(x)))
        x = self.dropout(nnx.relu(self.second(x)))
        return self.head(x.mean((1, 2)))


class Vgg(nn.Module):
    """Max pooling, then height x width x channels flattened before dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (6, 8):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(10)(x)))


class Pooled(nn.Module):
    """Overlapping windows of max and of mean, a 5x5 kernel with stride and uneven padding, dilation, dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(6, (5, 5), strides=2, padding=((2, 1), (0, 2)))(x))
        x = nn.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
        x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME") / 4.0
        x = nn.relu(nn.Conv(7, (1, 3))(x))
        return nn.Dense(CLASSES)(x.max((1, 2)))


class BasicBlocks(nn.Module):
    """Residual blocks of two convolutions, the last with a stride and a projection."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(batch_norm, use_running_average=not train)
        x = nn.relu(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width, stride in ((8, 1), (8, 1), (10, 2)):
            y = nn.relu(bn()(nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)))
            y = bn()(nn.Conv(width, (3, 3), use_bias=False)(y))
            if stride > 1:
                x = bn()(nn.Conv(width, (1, 1), strides=stride, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 and the identity."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.reduce = nnx.Conv(8, 4, (1, 1), use_bias=False, rngs=rngs)
        self.spatial = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.expand = nnx.Conv(4, 8, (1, 1), use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in (4, 4, 8)])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norms[0](self.reduce(x)))
        y = nnx.relu(self.norms[1](self.spatial(y)))
        return nnx.relu(x + self.norms[2](self.expand(y)))


class Bottlenecks(nnx.Module):
    """Three of them on one stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Bottleneck(rngs) for _ in range(3)])
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Preactivation(nn.Module):
    """Normalisation and activation before each convolution; a raw residual stream."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(batch_norm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for _ in range(3):
            y = nn.Conv(6, (3, 3), use_bias=False)(nn.relu(bn()(x)))
            x = x + nn.Conv(8, (3, 3), use_bias=False)(nn.relu(bn()(y)))
        return nn.Dense(CLASSES)(nn.relu(bn()(x)).mean((1, 2)))


class OptionA(nn.Module):
    """Shortcuts without weights: every second pixel, new channels padded with zeros on both sides."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(batch_norm, use_running_average=not train)
        x = nn.relu(bn()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = nn.relu(bn()(nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)))
        y = bn()(nn.Conv(8, (3, 3), use_bias=False)(y))
        x = nn.relu(y + jnp.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (2, 2))))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Two blocks of concatenated features, a 1x1 transition with pooling between them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(batch_norm, use_running_average=not train)
        x = nn.Conv(6, (3, 3))(x)
        for block in range(2):
            for _ in range(2):
                y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(bn()(x)))
                x = jnp.concatenate([x, y], axis=-1)
            if block == 0:
                x = mean_pool(nn.Conv(7, (1, 1), use_bias=False)(nn.relu(bn()(x))))
        return nn.Dense(CLASSES)(nn.relu(bn()(x)).mean((1, 2)))


class Inception(nn.Module):
    """A fork into four branches, one of which pools, joined by concatenation and flattened."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        branches = [
            nn.Conv(3, (1, 1))(x),
            nn.Conv(5, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x))),
            nn.Conv(4, (3, 1))(nn.relu(nn.Conv(7, (1, 3))(x))),
            nn.Conv(2, (1, 1))(nn.max_pool(x, (3, 3), strides=(1, 1), padding="SAME")),
        ]
        x = mean_pool(nn.relu(jnp.concatenate(branches, axis=-1)))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


class Ensemble(nn.Module):
    """Two branches that share a stem; their logits are averaged."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        first = nn.Dense(CLASSES)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))
        second = nn.Dense(CLASSES)(nn.tanh(nn.Dense(10)(x.reshape(x.shape[0], -1))))
        return (first + second) / 2.0


class Film(nn.Module):
    """Features scaled and shifted by what the whole image says of them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        condition = nn.relu(nn.Dense(7)(x.mean((1, 2))))
        for width in (6, 8):
            x = nn.Conv(width, (3, 3))(x)
            scale, shift = jnp.split(nn.Dense(2 * width)(condition), 2, axis=-1)
            x = nn.relu(x * (1.0 + scale[:, None, None, :]) + shift[:, None, None, :])
        return nn.Dense(CLASSES)(x.mean((1, 2)))


ARCHITECTURES = {
    "plain": Architecture(from_linen(Plain()), groups=(6, 8)),
    "plain_nnx": Architecture(from_nnx(PlainNnx), groups=(6, 8), dropout=True),
    "vgg": Architecture(from_linen(Vgg()), groups=(6, 8, 10)),
    "pooled": Architecture(from_linen(Pooled()), groups=(6, 7, 8), dropout=True),
    "basic_blocks": Architecture(from_linen(BasicBlocks()), groups=(8, 8, 8, 10, 10)),
    "bottlenecks": Architecture(from_nnx(Bottlenecks), groups=(4, 4, 4, 4, 4, 4, 8)),
    "preactivation": Architecture(from_linen(Preactivation()), groups=(6, 6, 6, 8)),
    "option_a": Architecture(from_linen(OptionA()), groups=(2, 2, 4, 8)),
    "densenet": Architecture(from_linen(DenseNet()), groups=(4, 4, 4, 4, 6, 7)),
    "inception": Architecture(from_linen(Inception()), groups=(2, 3, 4, 4, 5, 6, 7)),
    "ensemble": Architecture(from_linen(Ensemble()), groups=(6, 8, 10)),
    "film": Architecture(from_linen(Film()), groups=(6, 7, 8)),
}

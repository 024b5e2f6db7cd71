"""Networks made to be small: depthwise and grouped convolutions, channel shuffle, squeeze-and-excitation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import CLASSES, Architecture, batch_norm, from_linen, from_nnx


def _excited(x: jax.Array, reduced: int) -> jax.Array:
    gate = nn.silu(nn.Dense(reduced)(x.mean((1, 2))))
    return x * nn.sigmoid(nn.Dense(x.shape[-1])(gate))[:, None, None, :]


class SqueezeExcitation(nn.Module):
    """A residual block whose channels are gated by a bottleneck of global means."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        y = nn.Conv(8, (3, 3), use_bias=False)(nn.relu(nn.Conv(6, (3, 3))(x)))
        y = batch_norm(use_running_average=not train)(y)
        return nn.Dense(CLASSES)(nn.relu(x + _excited(y, 4)).mean((1, 2)))


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, excitation, linear projection; hard activations as in MobileNetV3."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(batch_norm, use_running_average=not train)
        x = nn.hard_swish(bn()(nn.Conv(6, (3, 3), strides=2, use_bias=False)(x)))
        for hidden in (10, 8):
            y = nn.relu6(bn()(nn.Conv(hidden, (1, 1), use_bias=False)(x)))
            y = nn.hard_swish(bn()(nn.Conv(hidden, (3, 3), feature_group_count=hidden, use_bias=False)(y)))
            x = x + bn()(nn.Conv(6, (1, 1), use_bias=False)(_excited(y, 4)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class DepthwiseNnx(nnx.Module):
    """Two output channels for each input channel of a depthwise convolution."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(6, 12, (3, 3), feature_group_count=6, rngs=rngs)
        self.pointwise = nnx.Conv(12, 8, (1, 1), rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.depthwise(nnx.relu(self.stem(x))))
        return self.head(nnx.silu(self.pointwise(x)).mean((1, 2)))


class ResNeXt(nn.Module):
    """A bottleneck whose middle convolution has groups, with unequal widths before and after."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(batch_norm, use_running_average=not train)
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        y = nn.relu(bn()(nn.Conv(8, (1, 1), use_bias=False)(x)))
        y = nn.relu(bn()(nn.Conv(12, (3, 3), feature_group_count=4, use_bias=False)(y)))
        x = nn.relu(x + bn()(nn.Conv(6, (1, 1), use_bias=False)(y)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class ShuffleNet(nn.Module):
    """Half of the channels go through a branch; after the concatenation the halves are interleaved."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        for _ in range(2):
            kept, y = jnp.split(x, 2, axis=-1)
            y = nn.relu(nn.Conv(4, (1, 1))(y))
            y = nn.Conv(4, (3, 3), feature_group_count=4)(y)
            y = nn.relu(nn.Conv(4, (1, 1))(y))
            x = jnp.concatenate([kept, y], axis=-1)
            n, height, width, channels = x.shape
            x = x.reshape(n, height, width, 2, channels // 2).swapaxes(3, 4).reshape(x.shape)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class GroupedShuffle(nn.Module):
    """ShuffleNet's first version: grouped 1x1 convolutions with a shuffle between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        y = nn.relu(nn.Conv(8, (1, 1), feature_group_count=2)(x))
        n, height, width, channels = y.shape
        y = y.reshape(n, height, width, 2, channels // 2).swapaxes(3, 4).reshape(y.shape)
        y = nn.Conv(8, (3, 3), feature_group_count=8)(y)
        x = nn.relu(x + nn.Conv(8, (1, 1), feature_group_count=2)(y))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Ghost(nn.Module):
    """Half of the features are convolved, the other half come cheaply from the first by a depthwise convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (6, 8):
            primary = nn.relu(nn.Conv(width, (1, 1))(x))
            cheap = nn.relu(nn.Conv(width, (3, 3), feature_group_count=width)(primary))
            x = jnp.concatenate([primary, cheap], axis=-1)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm, a wide GELU layer, layer scale; a LayerNorm before downsampling."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm()(nn.Conv(6, (2, 2), strides=2)(x))
        for block in range(2):
            y = nn.Conv(6, (3, 3), feature_group_count=6)(x)
            y = nn.Dense(10)(nn.LayerNorm(epsilon=1e-3)(y))
            y = nn.Dense(6)(nn.gelu(y))
            scale = self.param(f"layer_scale{block}", nn.initializers.ones, (6,))
            x = x + y * scale[None, None, None, :]
        x = nn.Conv(8, (2, 2), strides=2)(nn.LayerNorm(epsilon=1e-3)(x))
        return nn.Dense(CLASSES)(nn.LayerNorm(epsilon=1e-3)(x.mean((1, 2))))


class ConvMixer(nnx.Module):
    """A residual depthwise convolution, then a pointwise one, on one isotropic stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, 8, (2, 2), strides=2, rngs=rngs)
        self.depthwise = nnx.List(
            [nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs) for _ in range(2)]
        )
        self.pointwise = nnx.List([nnx.Conv(8, 8, (1, 1), rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.BatchNorm(8, momentum=0.9, rngs=rngs) for _ in range(4)])
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.gelu(self.patches(x))
        for block in range(2):
            x = x + self.norms[2 * block](nnx.gelu(self.depthwise[block](x)))
            x = self.norms[2 * block + 1](nnx.gelu(self.pointwise[block](x)))
        return self.head(x.mean((1, 2)))


ARCHITECTURES = {
    "squeeze_excitation": Architecture(from_linen(SqueezeExcitation()), groups=(4, 6, 8)),
    "inverted_residual": Architecture(from_linen(InvertedResidual()), groups=(4, 4, 6, 8, 10)),
    "depthwise_multiplier": Architecture(from_nnx(DepthwiseNnx), groups=(2, 6, 8)),
    "resnext": Architecture(from_linen(ResNeXt()), groups=(2, 3, 4, 6)),
    "shufflenet": Architecture(from_linen(ShuffleNet()), groups=(2, 2, 4, 4, 4)),
    "grouped_shuffle": Architecture(from_linen(GroupedShuffle()), groups=(2, 2, 4)),
    "ghost": Architecture(from_linen(Ghost()), groups=(6, 8)),
    "convnext": Architecture(from_linen(ConvNeXt()), groups=(6, 8, 10, 10)),
    "convmixer": Architecture(from_nnx(ConvMixer), groups=(8, 8, 8)),
}

"""Outputs for every position: U-Net, pixel shuffle, causal convolutions over a sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import (
    CLASSES,
    SEQUENCE,
    Architecture,
    batch_norm,
    from_linen,
    from_nnx,
    mean_pool,
)


class UNet(nn.Module):
    """Two levels down by pooling, two up by transposed convolution, skips by concatenation; a class per pixel."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        fine = nn.relu(batch_norm(use_running_average=not train)(nn.Conv(6, (3, 3), use_bias=False)(x)))
        coarse = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(fine, (2, 2), strides=(2, 2))))
        x = nn.relu(nn.Conv(10, (3, 3))(mean_pool(coarse)))
        x = jnp.concatenate([nn.ConvTranspose(7, (2, 2), strides=(2, 2))(x), coarse], axis=-1)
        x = nn.relu(nn.Conv(9, (3, 3))(x))
        x = jnp.concatenate([nn.ConvTranspose(5, (3, 3), strides=(2, 2))(x), fine], axis=-1)
        return nn.Conv(CLASSES, (1, 1))(nn.relu(nn.Conv(4, (3, 3))(x)))


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions added to features enlarged by repetition; one head shared by both levels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fine = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        coarse = nn.relu(nn.Conv(8, (3, 3), strides=2)(fine))
        top = nn.Conv(7, (1, 1))(coarse)
        enlarged = jnp.repeat(jnp.repeat(top, 2, axis=1), 2, axis=2)
        levels = (nn.Conv(7, (1, 1))(fine) + enlarged, top)
        head = nn.Conv(CLASSES, (3, 3))
        return jnp.concatenate([head(level).reshape(x.shape[0], -1, CLASSES) for level in levels], axis=1)


class PixelShuffle(nnx.Module):
    """Space to depth, features, depth to space: the image at the same size, through a smaller one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.inner = nnx.Conv(24, 10, (3, 3), rngs=rngs)
        self.outer = nnx.Conv(10, 28, (3, 3), rngs=rngs)
        self.head = nnx.Conv(7, 3, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        n, height, width, channels = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        x = nnx.relu(self.inner(x.reshape(n, height // 2, width // 2, 4 * channels)))
        x = self.outer(x).reshape(n, height // 2, width // 2, 7, 2, 2)
        x = x.transpose(0, 1, 4, 2, 5, 3).reshape(n, height, width, 7)
        return self.head(nnx.relu(x))


class WaveNet(nn.Module):
    """Causal dilated convolutions over a sequence, gated, with a residual and a skip stream."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        skips = []
        for dilation in (1, 2):
            y = nn.Conv(12, (2,), kernel_dilation=dilation, padding="CAUSAL")(x)
            value, gate = jnp.split(y, 2, axis=-1)
            y = nn.tanh(value) * nn.sigmoid(gate)
            skips.append(nn.Dense(7)(y))
            x = x + nn.Dense(8)(y)
        return nn.Dense(CLASSES)(nn.relu(jnp.concatenate([skips[0] + skips[1], x], axis=-1)))


class Autoencoder(nn.Module):
    """A bottleneck of one code per image, decoded to all pixels; a loss compares it with the image."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        code = nn.relu(nn.Conv(6, (3, 3), strides=4)(x)).reshape(x.shape[0], -1)
        code = nn.Dense(8)(code)
        y = nn.relu(nn.Dense(2 * 2 * 7)(code)).reshape(x.shape[0], 2, 2, 7)
        y = nn.relu(nn.ConvTranspose(5, (4, 4), strides=(2, 2))(y))
        y = jax.image.resize(y, (*x.shape[:3], 5), "nearest")
        return nn.Conv(3, (3, 3))(y)


ARCHITECTURES = {
    "unet": Architecture(from_linen(UNet()), groups=(4, 5, 6, 7, 8, 9, 10)),
    "feature_pyramid": Architecture(from_linen(FeaturePyramid()), groups=(6, 7, 8)),
    "pixel_shuffle": Architecture(from_nnx(PixelShuffle), groups=(6, 7, 10)),
    "wavenet": Architecture(from_linen(WaveNet(), SEQUENCE), groups=(6, 6, 7, 8), example_input=SEQUENCE),
    "autoencoder": Architecture(from_linen(Autoencoder()), groups=(5, 6, 7, 8)),
}

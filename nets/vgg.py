"""VGG with BatchNorm (Simonyan and Zisserman, arXiv 1409.1556), laid out as in torchvision, and its usual CIFAR form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sculpt.nets.layers import ConvNorm, single


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each ended by max pooling; a mean to a fixed size, dense layers, a dense head."""

    depths: tuple[int, ...]
    """Convolutions in each stage."""
    num_classes: int
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Channels of each stage."""
    pool: int = 7
    """Side of the feature map that the dense layers see, whatever the size of the images."""
    hidden: tuple[int, ...] = (4096, 4096)
    """Widths of the dense layers before the head."""
    dropout: float = 0.5
    """Rate after each of them."""
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths must be as many as depths {self.depths}, got {self.widths}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]`, a side of 32 or more, to logits `[batch, num_classes]`."""
        least = 2 ** len(self.depths)
        if min(x.shape[1:3]) < least:
            raise ValueError(f"images must have sides of at least {least}, got {list(x.shape[1:3])}")
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for layer in range(depth):
                conv = ConvNorm(
                    width,
                    activation=nn.relu,
                    train=train,
                    bias=True,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_conv{layer + 1}",
                )
                x = conv(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = adaptive_mean(adaptive_mean(x, self.pool, axis=1), self.pool, axis=2)
        x = x.reshape(x.shape[0], -1)
        for layer, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"dense{layer + 1}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return single(nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x))


def adaptive_mean(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Means over `size` stretches of an axis that cover it evenly, overlapping where they must (PyTorch's adaptive pooling)."""
    length = x.shape[axis]
    if length == size:
        return x
    bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
    parts = [jax.lax.slice_in_dim(x, low, high, axis=axis).mean(axis, keepdims=True) for low, high in bounds]
    return jnp.concatenate(parts, axis)


_DEPTHS = {"vgg16_bn": (2, 2, 3, 3, 3), "vgg19_bn": (2, 2, 4, 4, 4)}
MODELS = {name: (VGG, {"depths": depths}, 224) for name, depths in _DEPTHS.items()} | {
    f"{name}_cifar": (VGG, {"depths": depths, "pool": 1, "hidden": ()}, 32)
    for name, depths in _DEPTHS.items()
}
"""Name -> module, its fields, side of the images that it was published for."""

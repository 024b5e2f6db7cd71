"""Vision transformers (ViT: Dosovitskiy et al., arXiv 2010.11929; DeiT: Touvron et al., arXiv 2012.12877)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sculpt.nets.layers import LayerNorm, single


class Encoder(nn.Module):
    """A pre-norm block: attention, then two dense layers, each added to the stream."""

    heads: int
    hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        y = LayerNorm(name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")(y)
        x = x + drop(y)
        y = LayerNorm(name="norm2")(x)
        y = drop(nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="dense1")(y), approximate=False))
        return x + drop(nn.Dense(width, dtype=self.dtype, name="dense2")(y))


class VisionTransformer(nn.Module):
    """Patches as tokens behind a class token; the logits are read from that token."""

    num_classes: int
    width: int = 192
    """Of the stream."""
    heads: int = 3
    """Of attention; they divide the width."""
    patch: int = 16
    """Side of a patch in pixels; it divides that of the images."""
    depth: int = 12
    """Blocks."""
    hidden: int | None = None
    """Width between the two dense layers of a block; None for four times that of the stream."""
    distilled: bool = False
    """Whether there is a distillation token with a head of its own (arXiv 2012.12877, section 4)."""
    dropout: float = 0.0
    dtype: Any = None
    """Of the activations; None for that of the parameters."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}, got {self.heads}")
        super().__post_init__()

    @nn.compact
    def predictions(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """Logits `[batch, num_classes]` of each head: the class token's, then the distillation token's, which learns from a
        teacher."""
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"images {list(x.shape[1:3])} do not divide into patches of side {self.patch}")
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        names = ("class_token", "distillation_token") if self.distilled else ("class_token",)
        tokens = [self.param(name, nn.initializers.zeros, (1, 1, self.width)) for name in names]
        rows = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], 1, self.width)) for t in tokens]
        x = jnp.concatenate([*rows, x], axis=1)
        position = self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x + position.astype(x.dtype))
        for block in range(self.depth):
            hidden = self.hidden or 4 * self.width
            x = Encoder(self.heads, hidden, self.dropout, self.dtype, name=f"block{block + 1:02d}")(x, train)
        x = LayerNorm(name="norm")(x)
        heads = ("head", "distillation_head")[: len(tokens)]
        return tuple(
            single(nn.Dense(self.num_classes, dtype=self.dtype, name=name)(x[:, token]))
            for token, name in enumerate(heads)
        )

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[batch, height, width, channels]` to logits `[batch, num_classes]`; the mean of two heads."""
        logits = self.predictions(x, train)
        return (logits[0] + logits[1]) / 2.0 if self.distilled else logits[0]


_SIZES = {
    "tiny": {"width": 192, "heads": 3},
    "small": {"width": 384, "heads": 6},
    "base": {"width": 768, "heads": 12},
}
MODELS = {
    f"vit_{size}_patch{patch}": (VisionTransformer, {**_SIZES[size], "patch": patch}, side)
    for sizes, patch, side in (
        (("tiny", "small", "base"), 16, 224),
        (("tiny", "small"), 4, 32),
        (("tiny", "small"), 2, 8),
    )
    for size in sizes
} | {
    f"deit_{size}{suffix}_patch16": (VisionTransformer, {**fields, "distilled": bool(suffix)}, 224)
    for suffix in ("", "_distilled")
    for size, fields in _SIZES.items()
}
"""Name -> module, its fields, side of the images that it was published for or that its patches suit."""

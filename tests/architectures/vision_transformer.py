"""Images as tokens: Mixer, ViT, DeiT, Swin."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import CLASSES, Architecture, from_linen, from_nnx

norm = functools.partial(nn.LayerNorm, epsilon=1e-3)


def patches(x: jax.Array, width: int) -> jax.Array:
    """Sixteen tokens of 2x2 pixels: `[n, 16, width]`."""
    x = nn.Conv(width, (2, 2), strides=2)(x)
    return x.reshape(x.shape[0], -1, width)


class Mixer(nn.Module):
    """Dense layers over tokens and over channels in turn. A bias for each token puts something into removed channels too, which
    the normalisation sums over: with it the stream stays whole."""

    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = patches(x, 8)
        for _ in range(2):
            y = norm()(x).swapaxes(1, 2)
            y = nn.gelu(nn.Dense(6, use_bias=self.bias)(y))
            x = x + nn.Dense(16, use_bias=self.bias)(y).swapaxes(1, 2)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(norm()(x))))
        return nn.Dense(CLASSES)(norm()(x).mean(1))


class Encoder(nn.Module):
    """A pre-norm block of attention and dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(norm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(10)(norm()(x))))


class ViT(nn.Module):
    """Class token, position embedding, separate projections per head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = patches(x, 8)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(), (1, 17, 8))
        for _ in range(2):
            x = Encoder()(x)
        return nn.Dense(CLASSES)(norm()(x)[:, 0])


class DeiT(nn.Module):
    """A class and a distillation token, each with a head of its own; their logits are averaged."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = patches(x, 8)
        tokens = self.param("tokens", nn.initializers.normal(), (2, 8))
        x = jnp.concatenate([jnp.broadcast_to(tokens[None], (x.shape[0], 2, 8)), x], axis=1)
        x = norm()(Encoder()(x + self.param("position", nn.initializers.normal(), (1, 18, 8))))
        return (nn.Dense(CLASSES)(x[:, 0]) + nn.Dense(CLASSES)(x[:, 1])) / 2.0


class ViTNnx(nnx.Module):
    """Attention of NNX, mean over the tokens."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = nnx.Conv(3, 8, (2, 2), strides=2, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-3, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 10, rngs=rngs)
        self.down = nnx.Linear(10, 8, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = x + self.attention(self.norm(x))
        return self.head((x + self.down(nnx.gelu(self.up(x)))).mean(1))


def _attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of `[n, tokens, heads, depth]`, merged to `[n, tokens, heads * depth]`."""
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / float(q.shape[-1]) ** 0.5
    mixed = jnp.einsum("nhts,nshd->nthd", nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


class FusedReshape(nn.Module):
    """Query, key and value of one dense layer, told apart by a reshape to (3, heads, depth)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = patches(x, 8)
        qkv = nn.Dense(3 * 2 * 5)(norm()(x)).reshape(x.shape[0], 16, 3, 2, 5)
        x = x + nn.Dense(8)(_attended(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
        return nn.Dense(CLASSES)(norm()(x).mean(1))


class FusedSplit(nn.Module):
    """The same told apart by a split, then reshaped to heads; the values are wider than the keys."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = patches(x, 8)
        parts = jnp.split(nn.Dense(2 * 4 + 2 * 4 + 2 * 6)(norm()(x)), (8, 16), axis=-1)
        q, k, v = (part.reshape(x.shape[0], 16, 2, -1) for part in parts)
        x = x + nn.Dense(8)(_attended(q, k, v))
        return nn.Dense(CLASSES)(norm()(x).mean(1))


def _relative_positions(side: int) -> np.ndarray:
    """Index into a table of (2 side - 1)^2 offsets for every pair of positions of a window."""
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
    offset = grid[:, None] - grid[None] + side - 1
    return offset[..., 0] * (2 * side - 1) + offset[..., 1]


def _shifted_apart(side: int, shift: int) -> np.ndarray:
    """Boolean `[windows, positions, positions]`: pairs of a 4x4 grid that only the cyclic shift has brought together."""
    region = np.zeros((4, 4), int)
    for i, rows in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * i + j
    windows = region.reshape(4 // side, side, 4 // side, side).transpose(0, 2, 1, 3).reshape(-1, side**2)
    return windows[:, :, None] != windows[:, None, :]


class Swin(nn.Module):
    """Attention within 2x2 windows, the second block on windows shifted cyclically; patch merging."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(8, (2, 2), strides=2)(x)
        for shift in (0, 1):
            x = x + self.attention(norm()(x), shift)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(norm()(x))))
        corners = [x[:, i::2, j::2, :] for i in (0, 1) for j in (0, 1)]
        x = nn.Dense(6)(jnp.concatenate(corners, axis=-1))
        return nn.Dense(CLASSES)(norm()(x).mean((1, 2)))

    def attention(self, x: jax.Array, shift: int) -> jax.Array:
        """Attention within windows with a bias for every relative position."""
        n, side, heads = x.shape[0], 2, 2
        if shift:
            x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        x = x.reshape(n, 2, side, 2, side, 8).transpose(0, 1, 3, 2, 4, 5).reshape(n * 4, side**2, 8)
        q, k, v = (nn.Dense(8)(x).reshape(n * 4, side**2, heads, 4) for _ in range(3))
        scores = jnp.einsum("nthd,nshd->nhts", q, k) / 2.0
        table = self.param(f"bias{shift}", nn.initializers.normal(), (9, heads))
        bias = jnp.take(table, _relative_positions(side), axis=0)
        scores = scores + bias.transpose(2, 0, 1)[None]
        if shift:
            apart = _shifted_apart(side, shift)[None, :, None]
            scores = scores.reshape(n, 4, heads, side**2, side**2)
            scores = jnp.where(apart, -1e9, scores).reshape(n * 4, heads, side**2, side**2)
        x = jnp.einsum("nhts,nshd->nthd", nn.softmax(scores), v).reshape(n * 4, side**2, 8)
        x = nn.Dense(8)(x).reshape(n, 2, 2, side, side, 8).transpose(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, 8)
        return jnp.roll(x, (shift, shift), axis=(1, 2)) if shift else x


class PooledHead(nn.Module):
    """Attention pooling: one learned query reads all tokens, keys and values straight from an einsum."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(patches(x, 8))
        query = self.param("query", nn.initializers.normal(), (2, 4))
        key = self.param("key", nn.initializers.normal(), (8, 2, 4))
        value = self.param("value", nn.initializers.normal(), (8, 2, 5))
        scores = jnp.einsum("hk,ntd,dhk->nth", query, x, key)
        mixed = jnp.einsum("nth,ntd,dhk->nhk", nn.softmax(scores, axis=1), x, value)
        out = self.param("out", nn.initializers.normal(), (2, 5, CLASSES))
        return jnp.einsum("nhk,hkc->nc", mixed, out)


TOKENS = "spatial axis of a convolution"
STREAM = "summed over while not zero"
MIXED = dict.fromkeys([f"Dense_{i}/kernel:{axis}" for i, axis in ((0, 0), (1, 1), (4, 0), (5, 1))], TOKENS)
ARCHITECTURES = {
    "mixer": Architecture(
        from_linen(Mixer(bias=True)),
        groups=(6, 6, 10, 10),
        frozen={
            **MIXED,
            **dict.fromkeys(("Dense_1/bias:0", "Dense_5/bias:0"), TOKENS),
            **dict.fromkeys(("Conv_0/kernel:3", "Conv_0/bias:0", "Dense_8/kernel:0"), STREAM),
            **dict.fromkeys(
                (f"LayerNorm_{i}/{part}:0" for i in range(5) for part in ("scale", "bias")), STREAM
            ),
            **dict.fromkeys((f"Dense_{i}/{part}" for i in (2, 6) for part in ("kernel:1", "bias:0")), STREAM),
            **dict.fromkeys((f"Dense_{i}/kernel:0" for i in (3, 7)), STREAM),
        },
    ),
    "mixer_without_bias": Architecture(from_linen(Mixer(bias=False)), groups=(6, 6, 8, 10, 10), frozen=MIXED),
    "vit": Architecture(
        from_linen(ViT()), groups=(2, 2, 4, 4, 4, 4, 8, 10, 10), frozen={"position:1": TOKENS}
    ),
    "vit_nnx": Architecture(from_nnx(ViTNnx), groups=(2, 4, 4, 8, 10)),
    "deit": Architecture(
        from_linen(DeiT()),
        groups=(2, 4, 4, 8, 10),
        frozen={"position:1": "reduced", "tokens:0": "reduced"},
    ),
    "fused_reshape": Architecture(from_linen(FusedReshape()), groups=(2, 5, 8)),
    "fused_split": Architecture(from_linen(FusedSplit()), groups=(2, 4, 6, 8)),
    "swin": Architecture(
        from_linen(Swin()),
        groups=(2, 2, 4, 4, 4, 4, 6, 8, 10, 10),
        frozen={"bias0:0": "gather", "bias1:0": "gather"},
    ),
    "pooled_head": Architecture(from_linen(PooledHead()), groups=(2, 4, 5, 8)),
}

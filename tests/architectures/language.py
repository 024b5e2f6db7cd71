"""Token models: embeddings, tied weights, rotary positions, grouped queries, gated layers, experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import (
    CLASSES,
    SEQUENCE,
    TOKENS,
    VOCABULARY,
    Architecture,
    from_function,
    from_linen,
    from_nnx,
)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Over the last axis."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * scale[None, None, :]


def causal(scores: jax.Array) -> jax.Array:
    """Softmax over the positions up to the own; scores `[..., tokens, tokens]`."""
    seen = np.tril(np.ones(scores.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(seen.reshape((1,) * (scores.ndim - 2) + seen.shape), scores, -1e9))


class TiedEmbedding(nn.Module):
    """One table embeds the tokens and reads the logits; learned positions; attention through a mask of Flax."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCABULARY, 8)
        mask = nn.make_causal_mask(x)
        x = embed(x) + self.param("position", nn.initializers.normal(), (1, 6, 8))
        y = nn.LayerNorm(epsilon=1e-3)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, mask=mask)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(nn.LayerNorm(epsilon=1e-3)(x))))
        return embed.attend(nn.LayerNorm(epsilon=1e-3)(x))


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions: the two halves of each head are the two sides of a rotation."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-jnp.arange(half, dtype=x.dtype) / float(half))
    angle = (jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * speed[None, :])[None, :, None, :]
    first, second = x[..., :half], x[..., half:]
    turned = [
        first * jnp.cos(angle) - second * jnp.sin(angle),
        second * jnp.cos(angle) + first * jnp.sin(angle),
    ]
    return jnp.concatenate(turned, axis=-1)


def _llama(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Rotary positions, RMSNorm, SwiGLU, two query heads for each key head (repeated keys), a table of its own."""
    x = jnp.take(params["embedding"], x, axis=0)
    y = rms_norm(x, params["first_scale"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", y, params[name]) for name in ("query", "key", "value"))
    q, k = _rotated(q), jnp.repeat(_rotated(k), 2, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / 2.0
    mixed = jnp.einsum("bhts,bshk->bthk", causal(scores), jnp.repeat(v, 2, axis=2))
    x = x + jnp.einsum("bthk,hkd->btd", mixed, params["output"])
    y = rms_norm(x, params["second_scale"])
    x = x + (jax.nn.silu(y @ params["gate"]) * (y @ params["up"])) @ params["down"]
    return rms_norm(x, params["last_scale"]) @ params["unembedding"]


LLAMA = {
    "embedding": (VOCABULARY, 8),
    "first_scale": (8,),
    "query": (8, 4, 4),
    "key": (8, 2, 4),
    "value": (8, 2, 5),
    "output": (4, 5, 8),
    "second_scale": (8,),
    "gate": (8, 10),
    "up": (8, 10),
    "down": (10, 8),
    "last_scale": (8,),
    "unembedding": (8, VOCABULARY),
}


def _grouped_queries(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The queries of one key head are an axis of their own."""
    n, length, _ = x.shape
    y = x @ params["embed"]
    q = (y @ params["query"]).reshape(n, length, 2, 3, 4)
    k = (y @ params["key"]).reshape(n, length, 2, 4)
    v = (y @ params["value"]).reshape(n, length, 2, 5)
    weights = causal(jnp.einsum("btgrk,bsgk->bgrts", q, k) / 2.0)
    mixed = jnp.einsum("bgrts,bsgk->btgrk", weights, v).reshape(n, length, 30)
    return (y + mixed @ params["output"]).mean(1) @ params["head"]


class TiedLayers(nnx.Module):
    """One block of weights applied three times to the same stream."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-3, rngs=rngs)
        self.up = nnx.Linear(8, 10, rngs=rngs)
        self.down = nnx.Linear(10, 8, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for _ in range(3):
            x = x + self.down(nnx.gelu(self.up(self.norm(x))))
        return self.head(self.norm(x).mean(1))


def _tied_transpose(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """An autoencoder whose decoder is its encoder transposed, between two square layers that share one kernel."""
    y = jnp.tanh(x @ params["square"]) @ params["square"]
    code = jax.nn.relu(y @ params["encode"] + params["bias"][None, None])
    return (code @ params["encode"].T).mean(1) @ params["head"]


class Experts(nn.Module):
    """Two experts stacked in one array, weighted by a softmax gate."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        up = self.param("up", nn.initializers.lecun_normal(), (2, 8, 10))
        down = self.param("down", nn.initializers.lecun_normal(), (2, 10, 8))
        gate = nn.softmax(nn.Dense(2, name="gate")(x))
        hidden = nn.gelu(jnp.einsum("ntd,edh->nteh", x, up))
        x = x + jnp.einsum("nteh,ehd,nte->ntd", hidden, down, gate)
        return nn.Dense(CLASSES)(x.mean(1))


class RoutedExperts(nn.Module):
    """Each token goes to the one expert of three that a router ranks first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        weight, chosen = jax.lax.top_k(nn.softmax(nn.Dense(3, name="router")(x)), 1)
        experts = [nn.Dense(8)(nn.relu(nn.Dense(width)(x))) for width in (6, 10, 7)]
        routed = jnp.take_along_axis(jnp.stack(experts, axis=2), chosen[..., None], axis=2)
        return nn.Dense(CLASSES)((x + routed[:, :, 0] * weight).mean(1))


TABLE = "gather"
CHOICE = "reduced over"
ARCHITECTURES = {
    "tied_embedding": Architecture(
        from_linen(TiedEmbedding(), TOKENS),
        groups=(2, 4, 4, 8, 10),
        example_input=TOKENS,
        frozen={"Embed_0/embedding:0": TABLE},
    ),
    "llama": Architecture(
        from_function(_llama, LLAMA),
        groups=(2, 2, 2, 5, 8, 10),
        example_input=TOKENS,
        frozen={"embedding:0": TABLE},
    ),
    "grouped_queries": Architecture(
        from_function(
            _grouped_queries,
            {
                "embed": (3, 8),
                "query": (8, 24),
                "key": (8, 8),
                "value": (8, 10),
                "output": (30, 8),
                "head": (8, CLASSES),
            },
        ),
        groups=(2, 3, 4, 5, 8),
        example_input=SEQUENCE,
    ),
    "tied_layers": Architecture(
        from_nnx(TiedLayers), groups=(8, 10), example_input=TOKENS, frozen={"embed/embedding:0": TABLE}
    ),
    "tied_transpose": Architecture(
        from_function(
            _tied_transpose, {"square": (3, 3), "encode": (3, 8), "bias": (8,), "head": (3, CLASSES)}
        ),
        groups=(8,),
        example_input=SEQUENCE,
    ),
    "experts": Architecture(
        from_linen(Experts(), SEQUENCE),
        groups=(8, 10),
        example_input=SEQUENCE,
        frozen={"gate/kernel:1": CHOICE, "gate/bias:0": CHOICE, "up:0": CHOICE, "down:0": CHOICE},
    ),
    "routed_experts": Architecture(
        from_linen(RoutedExperts(), SEQUENCE),
        groups=(6, 7, 8, 10),
        example_input=SEQUENCE,
        frozen={"router/kernel:1": "sorted", "router/bias:0": "sorted"},
    ),
}

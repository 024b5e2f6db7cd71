"""Code as it is found: odd letters and layouts, tables of positions, kernels of their own, what only training reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import CLASSES, SEQUENCE, Architecture, batch_norm, from_linen, from_nnx


class StackedEinsum(nn.Module):
    """Query, key and value as one leaf [3, heads, in, depth]; both sides of a gated layer as another."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        stacked = self.param("qkv", nn.initializers.normal(), (3, 2, 8, 4))
        q, k, v = jnp.einsum("SHDK,BTD->SBHTK", stacked, x)
        weights = nn.softmax(jnp.einsum("BHXK,BHYK->BHXY", q, k) / 2.0)
        out = self.param("out", nn.initializers.normal(), (2, 4, 8))
        x = x + jnp.einsum("BHXY,BHYK,HKD->BXD", weights, v, out)
        gated = jnp.einsum("BTD,NDF->NBTF", x, self.param("gated", nn.initializers.normal(), (2, 8, 10)))
        return nn.Dense(CLASSES)((x + nn.Dense(8)(nn.gelu(gated[0]) * gated[1])).mean(1))


class Sinusoidal(nn.Module):
    """Position embeddings computed in the network: sines written to even and cosines to odd channels, and a learnt table."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        length, dtype = x.shape[1], x.dtype
        x = nn.Dense(8)(x)
        speed = 100.0 ** (-jnp.arange(4, dtype=dtype) / 4.0)
        angle = jnp.arange(length, dtype=dtype)[:, None] * speed[None]
        table = jnp.zeros((length, 8), dtype).at[:, 0::2].set(jnp.sin(angle)).at[:, 1::2].set(jnp.cos(angle))
        x = x + table[None] + nn.Embed(length, 8)(jnp.arange(length))[None]
        return nn.Dense(CLASSES)((x + nn.Dense(8)(nn.relu(nn.Dense(10)(x)))).mean(1))


class InterleavedRotary(nnx.Module):
    """Rotary positions whose pairs are neighbours, stacked together again."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query, self.key = (nnx.LinearGeneral(3, (2, 6), rngs=rngs) for _ in range(2))
        self.value = nnx.LinearGeneral(3, (2, 4), rngs=rngs)
        self.head = nnx.LinearGeneral((2, 4), CLASSES, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        scores = jnp.einsum("bthd,bshd->bhts", self.turned(self.query(x)), self.turned(self.key(x)))
        mixed = jnp.einsum("bhts,bshd->bthd", nnx.softmax(scores), self.value(x))
        return self.head(mixed.mean(1))

    def turned(self, x: jax.Array) -> jax.Array:
        """Rotated by an angle for every position and pair."""
        pairs = x.reshape(*x.shape[:-1], 3, 2)
        speed = 10.0 ** (-jnp.arange(3, dtype=x.dtype) / 3.0)
        angle = (jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * speed[None])[None, :, None]
        first, second = pairs[..., 0], pairs[..., 1]
        turned = [
            first * jnp.cos(angle) - second * jnp.sin(angle),
            first * jnp.sin(angle) + second * jnp.cos(angle),
        ]
        return jnp.stack(turned, axis=-1).reshape(x.shape)


class OwnKernels(nn.Module):
    """Dynamic convolution: each image gets a mixture of four kernels; `vmap` makes of them one grouped convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        mixture = nn.softmax(nn.Dense(4)(nn.relu(nn.Dense(3)(x.mean((1, 2))))))
        kernels = self.param("kernels", nn.initializers.lecun_normal(), (4, 3, 3, 6, 8))
        own = jnp.einsum("bn,nhwio->bhwio", mixture, kernels)
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.vmap(
            lambda image, kernel: jax.lax.conv_general_dilated(
                image[None], kernel, (1, 1), "SAME", dimension_numbers=dims
            )[0]
        )(x, own)
        return nn.Dense(CLASSES)(nn.relu(x).mean((1, 2)))


class AuxiliaryHead(nn.Module):
    """A second classifier on inner features, in training only."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(batch_norm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        early = nn.Dense(CLASSES, name="early")(nn.relu(nn.Dense(7, name="hidden")(x.mean((1, 2)))))
        logits = nn.Dense(CLASSES)(nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)))
        return logits + 0.3 * early if train else logits


class StateSpace(nn.Module):
    """Selective state space: a causal depthwise convolution, a scanned state [channels, 3], a gate."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(6)(x)
        inner, gate = jnp.split(nn.Dense(16)(x), 2, axis=-1)
        inner = nn.silu(nn.Conv(8, (3,), feature_group_count=8, padding="CAUSAL")(inner))
        step, read, write = jnp.split(nn.Dense(2 + 3 + 3)(inner), (2, 5), axis=-1)
        step = nn.softplus(nn.Dense(8)(step))
        rate = -jnp.exp(self.param("rate", nn.initializers.normal(), (8, 3)))
        decay = jnp.exp(jnp.einsum("btd,dn->btdn", step, rate))
        drive = jnp.einsum("btd,btn,btd->btdn", step, write, inner)

        def advance(
            state: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            state = state * now[0] + now[1]
            return state, jnp.einsum("bdn,bn->bd", state, now[2])

        steps = decay.swapaxes(0, 1), drive.swapaxes(0, 1), read.swapaxes(0, 1)
        _, y = jax.lax.scan(advance, jnp.zeros(decay.shape[:1] + decay.shape[2:], x.dtype), steps)
        return nn.Dense(CLASSES)((x + nn.Dense(6)(y.swapaxes(0, 1) * nn.silu(gate))).mean(1))


class GroupedGates(nn.Module):
    """A gated linear unit whose two halves are the two groups of a convolution; reflected and circular borders."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.elu(nn.Conv(8, (3, 3), padding="REFLECT")(x))
        x = nn.glu(nn.Conv(6, (3, 3), padding="CIRCULAR", feature_group_count=2)(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class AcrossGroups(nn.Module):
    """Features of 7 and of 8 channels side by side, normalised in groups of three: one group lies across the boundary. A
    third input is one channel, with no unit to spare."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.GroupNorm(num_groups=5)(
            jnp.concatenate([nn.Conv(7, (1, 1))(x), nn.Conv(8, (1, 1))(x)], axis=-1)
        )
        means = jnp.stack([x.mean(-1), x[..., 0]], axis=-1)
        return nn.Dense(CLASSES)(nn.relu(nn.Conv(4, (3, 3))(means)).mean((1, 2)))


class Siamese(nn.Module):
    """Two views of each image through the same layers, compared by distance, product and maximum."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        encode, refine = nn.Dense(8), nn.SpectralNorm(nn.Dense(6))
        views = [nn.relu(encode(view)).mean((1, 2)) for view in (x, x[:, ::-1, ::-1])]
        first, second = (refine(view, update_stats=train) for view in views)
        largest = jnp.stack([first, second]).max(0)
        parts = [jnp.abs(first - second), largest, jnp.sum(first * second, axis=-1, keepdims=True)]
        return nn.Dense(CLASSES)(jnp.concatenate(parts, axis=-1))


ALONE = "single units side by side"
MEET = "axes of different structure meet"
TRAINED = "not read in evaluation"
ARCHITECTURES = {
    "stacked_einsum": Architecture(
        from_linen(StackedEinsum(), SEQUENCE),
        groups=(2, 4, 8, 10),
        example_input=SEQUENCE,
        frozen={"qkv:0": ALONE, "gated:0": ALONE},
    ),
    "sinusoidal": Architecture(
        from_linen(Sinusoidal(), SEQUENCE),
        groups=(8, 10),
        example_input=SEQUENCE,
    ),
    "interleaved_rotary": Architecture(from_nnx(InterleavedRotary), groups=(2, 3, 4), example_input=SEQUENCE),
    "own_kernels": Architecture(
        from_linen(OwnKernels()),
        groups=(3, 6, 8),
        frozen=dict.fromkeys(("Dense_0/kernel:1", "Dense_0/bias:0", "kernels:0"), "reduced over"),
    ),
    "auxiliary_head": Architecture(
        from_linen(AuxiliaryHead()),
        groups=(6, 8),
        frozen=dict.fromkeys(("hidden/kernel:1", "hidden/bias:0", "early/kernel:0"), TRAINED),
    ),
    "state_space": Architecture(
        from_linen(StateSpace(), SEQUENCE), groups=(2, 3, 6, 8), example_input=SEQUENCE
    ),
    "grouped_gates": Architecture(from_linen(GroupedGates()), groups=(3, 4)),
    "across_groups": Architecture(
        from_linen(AcrossGroups()),
        groups=(4, 6),
        frozen={
            **dict.fromkeys((f"Conv_{i}/{part}" for i in (1, 2) for part in ("kernel:3", "bias:0")), MEET),
            **dict.fromkeys((f"GroupNorm_0/{part}:0" for part in ("scale", "bias")), MEET),
            "Conv_3/kernel:2": ALONE,
        },
    ),
    "siamese": Architecture(from_linen(Siamese()), groups=(6, 8)),
}

"""Loops and branches: recurrent cells, stacked layers, conditions, rematerialisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from tests.architectures.architecture import (
    CLASSES,
    SEQUENCE,
    Architecture,
    from_function,
    from_linen,
    from_nnx,
)


class Lstm(nn.Module):
    """Linen's scanned cell, its last state read."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.RNN(nn.OptimizedLSTMCell(8))(nn.Dense(6)(x))  # pyright: ignore[reportAssignmentType]
        return nn.Dense(CLASSES)(x[:, -1])


class Gru(nnx.Module):
    """NNX's scanned cell, all states read."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.recurrent = nnx.RNN(nnx.GRUCell(3, 8, rngs=rngs))
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.recurrent(x))  # pyright: ignore[reportArgumentType]


def _lstm_function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The four gates in one kernel, split after the product; `lax.scan` over time, the final carry read."""

    def step(carry: tuple[jax.Array, jax.Array], now: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, cell = carry
        gates = now @ params["input"] + hidden @ params["hidden"] + params["bias"][None]
        take, forget, write, show = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(take) * jnp.tanh(write)
        return (jax.nn.sigmoid(show) * jnp.tanh(cell), cell), None

    start = jnp.zeros((x.shape[0], 8), x.dtype)
    (hidden, _), _ = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))
    return hidden @ params["head"]


class Block(nn.Module):
    """A residual pair of dense layers."""

    hidden: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(epsilon=1e-3)(x)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(y))), None


class ScannedLayers(nn.Module):
    """Three blocks whose parameters are stacked, run by `nn.scan`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(nn.Dense(8)(x), None)
        return nn.Dense(CLASSES)(x.mean(1))


class Rematerialised(nn.Module):
    """Blocks whose inner values are computed anew in the backward pass."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        for _ in range(2):
            x, _ = nn.remat(Block)()(x)
        return nn.Dense(CLASSES)(x.mean(1))


def _scan_function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Stacked layers [L, in, out] over which a carry runs; each layer's mean is a second output."""

    def layer(y: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = y + jnp.tanh(y @ weights[0]) @ weights[1]
        return y, y.mean(1)

    y, means = jax.lax.scan(layer, x @ params["embed"], (params["up"], params["down"]))
    return y.mean(1) @ params["head"] + jnp.einsum("lbd,dk->bk", means, params["side"])


def _cond(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One of two branches for the whole batch, and one of three activations."""
    y = jnp.tanh(x @ params["embed"])
    y = jax.lax.cond(
        jnp.sum(x) > 0.0,
        lambda y: y + jax.nn.relu(y @ params["up"]) @ params["down"],
        lambda y: y * params["gain"][None, None],
        y,
    )
    y = jax.lax.switch(2, [jax.nn.relu, jnp.tanh, jax.nn.silu], y)
    return y.mean(1) @ params["head"]


def _fori_loop(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One layer applied a fixed number of times."""

    def body(_: int, y: jax.Array) -> jax.Array:
        return y + jnp.tanh(y @ params["up"]) @ params["down"]

    y = jax.lax.fori_loop(0, 3, body, x @ params["embed"])
    return y.mean(1) @ params["head"]


def _while_loop(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One layer applied until the values are large or four steps are done: a number of times that the data decide."""
    y = x @ params["embed"]

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        step, y = carry
        return (step < 4) & (jnp.sum(jnp.square(y)) < 1e6)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, y = carry
        return step + 1, y + jnp.tanh(y @ params["up"]) @ params["down"]

    _, y = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), y))
    return y.mean(1) @ params["head"]


def _attention_over_carry(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A scan that writes its states into a buffer by position and reads one of them back."""
    n, length, _ = x.shape
    buffer = jnp.zeros((n, length, 8), x.dtype)

    def step(
        carry: tuple[jax.Array, jax.Array], position: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden, buffer = carry
        now = jax.lax.dynamic_index_in_dim(x, position, 1, keepdims=False)
        hidden = jnp.tanh(now @ params["input"] + hidden @ params["hidden"])
        return (hidden, jax.lax.dynamic_update_index_in_dim(buffer, hidden, position, 1)), None

    (hidden, buffer), _ = jax.lax.scan(
        step, (jnp.zeros((n, 8), x.dtype), buffer), jnp.arange(length, dtype=jnp.int32)
    )
    return hidden @ params["head"] + buffer.mean(1) @ params["side"]


LAYER = {"embed": (3, 8), "up": (8, 10), "down": (10, 8), "head": (8, CLASSES)}
STACK = {**LAYER, "up": (3, 8, 10), "down": (3, 10, 8), "side": (8, CLASSES)}
SCANNED = "scan"
ARCHITECTURES = {
    "lstm": Architecture(from_linen(Lstm(), SEQUENCE), groups=(6, 8), example_input=SEQUENCE, single=True),
    "gru": Architecture(from_nnx(Gru), groups=(8,), example_input=SEQUENCE, single=True),
    "lstm_function": Architecture(
        from_function(
            _lstm_function, {"input": (3, 32), "hidden": (8, 32), "bias": (32,), "head": (8, CLASSES)}
        ),
        groups=(8,),
        example_input=SEQUENCE,
    ),
    "scanned_layers": Architecture(
        from_linen(ScannedLayers(), SEQUENCE),
        groups=(8, 10),
        example_input=SEQUENCE,
        frozen={
            f"blocks/{part}:0": SCANNED
            for part in (
                "Dense_0/kernel",
                "Dense_0/bias",
                "Dense_1/kernel",
                "Dense_1/bias",
                "LayerNorm_0/scale",
                "LayerNorm_0/bias",
            )
        },
    ),
    "scan_function": Architecture(
        from_function(_scan_function, STACK),
        groups=(8, 10),
        example_input=SEQUENCE,
        frozen={"up:0": SCANNED, "down:0": SCANNED},
    ),
    "rematerialised": Architecture(
        from_linen(Rematerialised(), SEQUENCE), groups=(8, 10, 10), example_input=SEQUENCE
    ),
    "cond": Architecture(
        from_function(_cond, {**LAYER, "gain": (8,)}), groups=(8, 10), example_input=SEQUENCE
    ),
    "fori_loop": Architecture(from_function(_fori_loop, LAYER), groups=(8, 10), example_input=SEQUENCE),
    "while_loop": Architecture(
        from_function(_while_loop, LAYER), groups=(8, 10), example_input=SEQUENCE, differentiable=False
    ),
    "written_buffer": Architecture(
        from_function(
            _attention_over_carry,
            {"input": (3, 8), "hidden": (8, 8), "head": (8, CLASSES), "side": (8, CLASSES)},
        ),
        groups=(8,),
        example_input=SEQUENCE,
    ),
}

"""Networks spelled out as lists of steps, each on features that came before: the words of a random architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sculpt
from sculpt.model import Model
from tests.architectures.architecture import CLASSES, draw

SIDE = 4
Weight = Callable[..., jax.Array]
"""`weight(*shape)` is the next parameter."""
Operation = Callable[[Weight, jax.Array, jax.Array, int], jax.Array]
"""`(weight, features, other features, width) -> features`, all `[n, 4, 4, channels]`."""
OPERATIONS: dict[str, Operation] = {}


@dataclasses.dataclass(frozen=True)
class Step:
    """One word."""

    operation: str
    source: int
    """How many features back it reads."""
    other: int
    """Likewise, its second operand where it has one."""
    width: int


def build(steps: Sequence[Step], key: jax.Array, dtype: Any) -> Model:
    """The network of these steps, a plain JAX function of a list of arrays."""
    shapes: list[jax.ShapeDtypeStruct] = []

    def record(*shape: int) -> jax.Array:
        shapes.append(jax.ShapeDtypeStruct(shape, dtype))
        return jnp.zeros(shape, dtype)

    def apply(params: list[jax.Array], x: jax.Array) -> jax.Array:
        values = iter(params)
        return _network(steps, lambda *shape: next(values), x)

    jax.eval_shape(lambda x: _network(steps, record, x), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), dtype))
    return sculpt.from_function(apply, draw(shapes, key))


def _network(steps: Sequence[Step], weight: Weight, x: jax.Array) -> jax.Array:
    features = [_biased(weight, x @ weight(3, 6))]
    for step in steps:
        x, y = (features[-1 - back % len(features)] for back in (step.source, step.other))
        features.append(OPERATIONS[step.operation](weight, x, y, step.width))
    last = jnp.concatenate(features[-2:], axis=-1)
    return _biased(weight, last.mean((1, 2)) @ weight(last.shape[-1], CLASSES))


def operation(function: Operation) -> Operation:
    """Adds a word under the name of its function."""
    OPERATIONS[function.__name__] = function
    return function


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _biased(weight: Weight, x: jax.Array) -> jax.Array:
    return x + _along(weight(x.shape[-1]), x)


def _convolved(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _matched(weight: Weight, y: jax.Array, channels: int) -> jax.Array:
    return y if y.shape[-1] == channels else y @ weight(y.shape[-1], channels)


@operation
def conv(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return jax.nn.relu(_biased(weight, _convolved(x, weight(3, 3, x.shape[-1], width))))


@operation
def depthwise(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    channels = x.shape[-1]
    multiplier = 1 + width % 2
    return _biased(weight, _convolved(x, weight(3, 3, 1, channels * multiplier), channels))


@operation
def grouped(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    groups = 2 if x.shape[-1] % 2 == 0 else 1
    return _convolved(x, weight(3, 3, x.shape[-1] // groups, groups * width), groups)


@operation
def dense(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return jnp.tanh(_biased(weight, x @ weight(x.shape[-1], width)))


@operation
def tied(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    kernel = weight(x.shape[-1], width)
    return jax.nn.gelu(x @ kernel) @ kernel.T


@operation
def flattened(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    flat = x.reshape(x.shape[0], -1)
    hidden = jax.nn.relu(flat @ weight(flat.shape[1], width))
    return (hidden @ weight(width, SIDE * SIDE * 4)).reshape(-1, SIDE, SIDE, 4)


@operation
def add(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return x + _matched(weight, y, x.shape[-1])


@operation
def padded_add(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    small, large = sorted((x, y), key=lambda z: z.shape[-1])
    missing = large.shape[-1] - small.shape[-1]
    return large + jnp.pad(small, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


@operation
def gate(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return x * jax.nn.sigmoid(_matched(weight, y, x.shape[-1]))


@operation
def gated_linear(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    value, control = jnp.split(_biased(weight, x @ weight(x.shape[-1], 2 * width)), 2, axis=-1)
    return value * jax.nn.sigmoid(control)


@operation
def concat(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return jnp.concatenate([x, y], axis=-1)


@operation
def split(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    middle = x.shape[-1] // 2
    return x[..., middle:] if width % 2 else x[..., : middle + 1]


@operation
def shuffle(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    groups = next(n for n in (3, 2, 1) if x.shape[-1] % n == 0)
    return x.reshape(*x.shape[:3], groups, -1).swapaxes(3, 4).reshape(x.shape)


@operation
def repeat(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return jnp.repeat(x, 2, axis=-1) if width % 2 else jnp.concatenate([x, x], axis=-1)


@operation
def reverse(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return x[..., ::-1]


@operation
def layer_norm(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    if width % 2:
        variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
    else:
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
    normal = (x - mean) * jax.lax.rsqrt(variance + 0.1)
    return _biased(weight, normal * _along(weight(x.shape[-1]), x))


@operation
def group_norm(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    groups = 2 if x.shape[-1] % 2 == 0 else 1
    parts = x.reshape(x.shape[0], SIDE, SIDE, groups, -1)
    square = jnp.square(parts).mean((1, 2, 4), keepdims=True)
    return (parts * jax.lax.rsqrt(square + 0.1)).reshape(x.shape) * _along(weight(x.shape[-1]), x)


@operation
def batch_norm(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    mean, variance = _along(weight(x.shape[-1]), x), _along(weight(x.shape[-1]), x)
    return (x - mean) * jax.lax.rsqrt(jnp.square(variance) + 0.1) * _along(weight(x.shape[-1]), x)


@operation
def excite(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    hidden = jax.nn.relu(y.mean((1, 2)) @ weight(y.shape[-1], width))
    return x * jax.nn.sigmoid(_biased(weight, hidden @ weight(width, x.shape[-1])))[:, None, None, :]


@operation
def softmax(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return jax.nn.softmax(x, axis=-1)


@operation
def exponential(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return jnp.exp(jnp.tanh(x))


@operation
def maxout(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return (x @ weight(x.shape[-1], 2 * width)).reshape(*x.shape[:3], width, 2).max(-1)


@operation
def pooled(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    low = jnp.full((), -jnp.inf, x.dtype)
    return jax.lax.reduce_window(x, low, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


@operation
def rolled(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    return x + jnp.roll(x, width, axis=(1, 3)[width % 2])


@operation
def tokens_mixed(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    tokens = x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)
    mixed = jax.nn.gelu(tokens @ weight(SIDE * SIDE, width)) @ weight(width, SIDE * SIDE)
    return mixed.swapaxes(1, 2).reshape(x.shape)


@operation
def attention(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    heads, depth = 2, 2 + width % 2
    queries, keys = (z.reshape(z.shape[0], -1, z.shape[-1]) for z in (x, y))
    if width < 4:
        q = jnp.einsum("ntc,chd->nthd", queries, weight(x.shape[-1], heads, depth))
        k = jnp.einsum("ntc,chd->nthd", keys, weight(y.shape[-1], heads, depth))
        v = jnp.einsum("ntc,chd->nthd", keys, weight(y.shape[-1], heads, 3))
    else:
        fused = queries @ weight(x.shape[-1], 3 * heads * depth)
        q, k, v = jnp.moveaxis(fused.reshape(*fused.shape[:2], 3, heads, depth), 2, 0)
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / float(depth) ** 0.5)
    mixed = jnp.einsum("nhts,nshd->nthd", weights, v)
    mixed = mixed.reshape(*mixed.shape[:2], -1) @ weight(mixed.shape[2] * mixed.shape[3], x.shape[-1])
    return x + mixed.reshape(x.shape)


@operation
def correlated(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    """Attention over channels instead of tokens."""
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    scores = jnp.einsum("ntc,ntd->ncd", tokens, tokens) / float(SIDE * SIDE)
    return jnp.einsum("ncd,ntd->ntc", scores, tokens).reshape(x.shape) / float(x.shape[-1])


@operation
def scanned(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    def layer(z: jax.Array, kernels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return z + jnp.tanh(z @ kernels[0]) @ kernels[1], None

    stacked = weight(2, x.shape[-1], width), weight(2, width, x.shape[-1])
    return jax.lax.scan(layer, x, stacked)[0]


@operation
def either(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    one, other = weight(x.shape[-1], width), weight(x.shape[-1], width)
    return jax.lax.cond(x.sum() > 0.0, lambda z: jnp.tanh(z @ one), lambda z: z @ other, x)


@operation
def stacked(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    both = jnp.stack([x, _matched(weight, y, x.shape[-1])], axis=width % 5)
    first, second = jax.lax.unstack(both, axis=width % 5)
    return both.max(width % 5) + jnp.tanh(first) * second


@operation
def positioned(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    """Sines at even and cosines at odd channels, as position embeddings are written."""
    angle = jnp.arange(x.shape[-1], dtype=x.dtype) * float(width)
    table = jnp.zeros(x.shape[-1], x.dtype).at[0::2].set(jnp.sin(angle)[0::2])
    return x * _along(table.at[1::2].set(jnp.cos(angle)[1::2]), x)


@operation
def own_kernel(weight: Weight, x: jax.Array, y: jax.Array, width: int) -> jax.Array:
    """A kernel for every image, mixed of two by what is seen on it."""
    mixture = jax.nn.sigmoid(y.mean((1, 2)) @ weight(y.shape[-1], 2))
    kernels = jnp.einsum("nk,khwio->nhwio", mixture, weight(2, 3, 3, x.shape[-1], width))
    return jax.vmap(lambda image, kernel: _convolved(image[None], kernel)[0])(x, kernels)

"""Small networks that the contract suites run over: every structure that the tracer knows, in Linen, NNX and plain JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import sculpt
from sculpt.model import Model
from tests.architectures.architecture import from_linen

norm = functools.partial(nn.BatchNorm, momentum=0.9)


class Plain(nn.Module):
    """Convolutions with BatchNorm, global mean, dense head."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for width in (8, 12):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(norm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Biased(nn.Module):
    """No normalisation; pooling, flatten before two dense layers, a 5x5 kernel with stride and uneven padding."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(6, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(8, (3, 3), padding=((0, 1), (1, 2)))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5)(nn.tanh(nn.Dense(10)(x)))


class Residual(nn.Module):
    """Residual adds: identity, projection by a 1x1 convolution, and zero-padded option A."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(norm, use_running_average=not train)
        x = nn.relu(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = nn.relu(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + bn()(nn.Conv(8, (3, 3), use_bias=False)(y)))
        y = nn.relu(bn()(nn.Conv(12, (3, 3), strides=2, use_bias=False)(x)))
        y = bn()(nn.Conv(12, (3, 3), use_bias=False)(y))
        x = nn.relu(bn()(nn.Conv(12, (1, 1), strides=2, use_bias=False)(x)) + y)
        y = bn()(nn.Conv(20, (3, 3), strides=2, padding=((1, 1), (1, 1)), use_bias=False)(x))
        x = nn.relu(jnp.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (4, 4))) + y)
        return nn.Dense(5)(x.mean((1, 2)))


class Concatenated(nn.Module):
    """DenseNet's concatenation and an Inception-like fork."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(norm, use_running_average=not train)
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(bn()(x)))
            x = jnp.concatenate([x, y], axis=-1)
        x = jnp.concatenate([nn.Conv(6, (1, 1))(x), nn.Conv(4, (3, 3))(x)], axis=-1)
        x = nn.pool(nn.relu(bn()(x)), 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4.0
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Separable(nn.Module):
    """Inverted residual with a depthwise convolution, a grouped convolution, squeeze-and-excitation."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        bn = functools.partial(norm, use_running_average=not train)
        x = nn.relu6(bn()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = nn.relu6(bn()(nn.Conv(16, (1, 1), use_bias=False)(x)))
        y = nn.relu6(bn()(nn.Conv(16, (3, 3), feature_group_count=16, use_bias=False)(y)))
        gate = nn.relu(nn.Dense(4)(y.mean((1, 2))))
        y = y * nn.sigmoid(nn.Dense(16)(gate))[:, None, None, :]
        x = x + bn()(nn.Conv(8, (1, 1), use_bias=False)(y))
        x = nn.silu(nn.Conv(12, (3, 3), feature_group_count=4)(x))
        return nn.Dense(5)(x.mean((1, 2)))


class Dilated(nn.Module):
    """Dilation, a one-sided kernel, dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
        x = nn.relu(nn.Conv(8, (1, 5))(x))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(5)(x.mean((1, 2)))


class NnxResidual(nnx.Module):
    """The same kind of network in Flax NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.inner = nnx.Conv(8, 6, (3, 3), rngs=rngs)
        self.outer = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        x = x + self.outer(nnx.relu(self.inner(x)))
        return self.head(self.dropout(x.mean((1, 2))))


def _plain_function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["first"], (1, 1), "SAME", dimension_numbers=dims)
    y = jnp.maximum(y + params["bias"][None, None, None, :], 0.0)
    y = jax.lax.conv_general_dilated(y, params["second"], (1, 1), "SAME", dimension_numbers=dims)
    return jnp.einsum("nhwc,ck->nk", y, params["head"])


def _nnx(key: jax.Array) -> Model:
    return sculpt.from_nnx(NnxResidual(nnx.Rngs(key)))


def _function(key: jax.Array) -> Model:
    shapes = {"first": (3, 3, 3, 8), "bias": (8,), "second": (3, 3, 8, 6), "head": (6, 5)}
    keys = jax.random.split(key, len(shapes))
    params = {n: 0.3 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    return sculpt.from_function(_plain_function, params)


NETWORKS: dict[str, Callable[[jax.Array], Model]] = {
    "plain": from_linen(Plain()),
    "biased": from_linen(Biased()),
    "residual": from_linen(Residual()),
    "concatenated": from_linen(Concatenated()),
    "separable": from_linen(Separable()),
    "dilated": from_linen(Dilated()),
    "nnx": _nnx,
    "function": _function,
}
"""Name -> builder of a model for images `[n, 8, 8, 3]` and five classes."""


@functools.cache
def network(name: str) -> Model:
    """The network of that name, built once."""
    return NETWORKS[name](jax.random.key(7))


@functools.cache
def traced(name: str) -> sculpt.Trace:
    """Its trace."""
    return sculpt.trace(network(name), jnp.zeros((1, 8, 8, 3)))


def slow_but(*chosen: str, among: Iterable[str] = NETWORKS, argument: str = "name") -> pytest.MarkDecorator:
    """Parametrises over names of which all but a few are slow."""
    assert set(chosen) <= {*among}
    params = [n if n in chosen else pytest.param(n, marks=pytest.mark.slow) for n in among]
    return pytest.mark.parametrize(argument, params)

"""Normalisations: over groups, channels and kernels, with the fast and the slow variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import sculpt
from sculpt.model import Model
from tests.architectures.architecture import (
    CLASSES,
    SEQUENCE,
    Architecture,
    draw,
    from_function,
    from_linen,
    from_nnx,
)


class GroupNorms(nn.Module):
    """Group and instance normalisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.GroupNorm(num_groups=2, epsilon=1e-3)(nn.Conv(8, (3, 3))(x)))
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=1, epsilon=1e-3)(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class RmsNorms(nnx.Module):
    """A gated residual stream normalised by its root mean square."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, epsilon=1e-3, rngs=rngs)
        self.gate = nnx.Linear(8, 10, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(8, 10, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(10, 8, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.out(nnx.silu(self.gate(y)) * self.value(y))
        return self.head(self.norm(x).mean(1))


class LayerNorms(nn.Module):
    """A residual stream with LayerNorm; the slow variance sums over what is not zero, but equal at all pruned units."""

    fast: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        for _ in range(2):
            y = nn.LayerNorm(epsilon=1e-3, use_fast_variance=self.fast)(x)
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(y)))
        return nn.Dense(CLASSES)(nn.LayerNorm(epsilon=1e-3, use_fast_variance=self.fast)(x).mean(1))


class StandardisedConv(nn.Module):
    """A convolution whose kernel has mean zero and variance one for every output channel."""

    width: int
    fast: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.width))
        mean = kernel.mean((0, 1, 2), keepdims=True)
        if self.fast:
            variance = jnp.square(kernel).mean((0, 1, 2), keepdims=True) - jnp.square(mean)
        else:
            variance = jnp.square(kernel - mean).mean((0, 1, 2), keepdims=True)
        kernel = (kernel - mean) * jax.lax.rsqrt(variance + 1e-3) / float(kernel[..., 0].size) ** 0.5
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class WeightStandardised(nn.Module):
    """The kernel's statistics run over input channels."""

    fast: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (8, 6, 7):
            x = nn.relu(StandardisedConv(width, self.fast)(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class WeightNormed(nn.Module):
    """Flax's weight normalisation and spectral scale: every output channel of length one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.WeightNorm(nn.Conv(8, (3, 3)))(x))
        x = nn.relu(nn.WeightNorm(nn.Dense(6))(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def _whitened(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Frozen BatchNorm written out, and a norm that divides by the largest channel."""
    y = x @ params["first"]
    y = (y - params["mean"][None, None, :]) * jax.lax.rsqrt(params["var"][None, None, :] + 1e-3)
    y = y * params["scale"][None, None, :] + params["bias"][None, None, :]
    y = jnp.tanh(y) @ params["second"]
    y = y / (1.0 + jnp.abs(y).max(-1, keepdims=True))
    return jnp.einsum("btc,ck->bk", y, params["head"])


def _normalised(y: jax.Array, mean: jax.Array, var: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    scale = params["scale"] * jax.lax.rsqrt(var + 1e-3)
    return jax.nn.relu((y - mean[None, None]) * scale[None, None] + params["bias"][None, None])


def _convolved(image: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image[None], kernel, (1, 1), "SAME", dimension_numbers=layout)[0]


def _mapped(dropout: bool) -> Callable[[jax.Array], Model]:
    """Written for one image: BatchNorm takes its means over the mapped axis, as Equinox' does, and keeps sums that evaluation never reads,
    as Haiku's does."""

    def apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
        def one(image: jax.Array) -> jax.Array:
            y = _normalised(_convolved(image, params["first"]), state["mean"], state["var"], params)
            return jnp.tanh(_convolved(y, params["second"])).mean((0, 1)) @ params["head"]

        return jax.vmap(one)(x)

    def apply_train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        def one(image: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            y = _convolved(image, params["first"])
            mean, square = jax.lax.pmean((y.mean((0, 1)), jnp.square(y).mean((0, 1))), "batch")
            var = square - jnp.square(mean)
            y = _normalised(y, mean, var, params)
            if dropout:
                y = jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y, 0.0)
            return jnp.tanh(_convolved(y, params["second"])).mean((0, 1)) @ params["head"], {
                "mean": mean,
                "var": var,
            }

        keys = jax.random.split(key, len(x))
        outputs, new = jax.vmap(one, axis_name="batch", out_axes=(0, None))(x, keys)
        steps = state["steps"] + 1
        sums = {name: 0.9 * state["sums"][name] + 0.1 * new[name] for name in new}
        share = 1.0 - 0.9 ** steps.astype(x.dtype)
        return outputs, {"steps": steps, "sums": sums} | {name: sums[name] / share for name in sums}

    shapes = {
        "first": (3, 3, 3, 8),
        "scale": (8,),
        "bias": (8,),
        "second": (3, 3, 8, 6),
        "head": (6, CLASSES),
    }
    statistics = dict.fromkeys(("mean", "var"), jax.ShapeDtypeStruct((8,), jnp.float32))
    state = {"steps": jax.ShapeDtypeStruct((), jnp.int32), "sums": statistics, **statistics}

    def build(key: jax.Array) -> Model:
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return sculpt.from_function(apply, draw(arrays, key), draw(state, key), apply_train)

    return build


ARCHITECTURES = {
    "group_norm": Architecture(from_linen(GroupNorms()), groups=(2, 4, 6)),
    "rms_norm": Architecture(from_nnx(RmsNorms), groups=(8, 10), example_input=SEQUENCE),
    "layer_norm_fast": Architecture(
        from_linen(LayerNorms(True), SEQUENCE), groups=(8, 10, 10), example_input=SEQUENCE
    ),
    "layer_norm_slow": Architecture(
        from_linen(LayerNorms(False), SEQUENCE),
        groups=(8, 10, 10),
        example_input=SEQUENCE,
    ),
    "weight_standardised_fast": Architecture(from_linen(WeightStandardised(True)), groups=(6, 7, 8)),
    "weight_standardised_slow": Architecture(from_linen(WeightStandardised(False)), groups=(6, 7, 8)),
    "weight_norm": Architecture(from_linen(WeightNormed()), groups=(6, 8)),
    "mapped_batch_norm": Architecture(_mapped(dropout=False), groups=(6, 8)),
    "mapped_dropout": Architecture(_mapped(dropout=True), groups=(6, 8), dropout=True),
    "whitened": Architecture(
        from_function(
            _whitened,
            {
                "first": (3, 8),
                "mean": (8,),
                "var": (8,),
                "scale": (8,),
                "bias": (8,),
                "second": (8, 6),
                "head": (6, CLASSES),
            },
        ),
        groups=(6, 8),
        example_input=SEQUENCE,
    ),
}

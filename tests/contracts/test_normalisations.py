"""Normalisation layers of every library, with both forms of the variance: the widths that they normalise can be pruned, exactly.

Each network has a convolution with a standardised kernel and GroupNorm, one with InstanceNorm, and a dense layer with LayerNorm. Equinox
takes the variance in two passes in all its layers, and Haiku in LayerNorm; Linen and NNX let the user choose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import sculpt
from sculpt.model import Model
from tests.architectures.architecture import draw, from_linen, from_nnx
from tests.architectures.equality import drawn_importance, leanest_policy, prune

IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
GROUPS = [2, 4, 6, 8]
"""Two groups of four channels, six channels, eight features."""


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    """Not all libraries keep to strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def standardised(kernel: jax.Array, out_axis: int, fast: bool) -> jax.Array:
    """Mean zero and variance one for every output channel."""
    axes = tuple(d for d in range(kernel.ndim) if d != out_axis % kernel.ndim)
    mean = kernel.mean(axes, keepdims=True)
    if fast:
        variance = jnp.square(kernel).mean(axes, keepdims=True) - jnp.square(mean)
    else:
        variance = jnp.var(kernel, axes, keepdims=True)
    return (kernel - mean) * jax.lax.rsqrt(variance + 1e-3)


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def linen_network(fast: bool) -> Model:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 3, 8))
            x = convolved(x, standardised(kernel, -1, fast))
            x = nn.relu(nn.GroupNorm(2, use_fast_variance=fast)(x))
            x = nn.relu(nn.InstanceNorm(use_fast_variance=fast)(nn.Conv(6, (3, 3))(x)))
            x = nn.LayerNorm(use_fast_variance=fast)(nn.Dense(8)(x.mean((1, 2))))
            return nn.Dense(5)(nn.gelu(x))

    return from_linen(Network(), IMAGE)(jax.random.key(7))


def nnx_network(fast: bool) -> Model:
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
            self.group = nnx.GroupNorm(8, 2, use_fast_variance=fast, rngs=rngs)
            self.second = nnx.Conv(8, 6, (3, 3), rngs=rngs)
            self.instance = nnx.InstanceNorm(6, use_fast_variance=fast, rngs=rngs)
            self.dense = nnx.Linear(6, 8, rngs=rngs)
            self.layer = nnx.LayerNorm(8, use_fast_variance=fast, rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = convolved(x, standardised(self.first.kernel[...], -1, fast))
            x = nnx.relu(self.group(x))
            x = nnx.relu(self.instance(self.second(x)))
            return self.head(nnx.gelu(self.layer(self.dense(x.mean((1, 2))))))

    return from_nnx(Network)(jax.random.key(7))


def equinox_network(fast: bool) -> Model:
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        first: Any
        group: Any
        second: Any
        instance: Any
        dense: Any
        layer: Any
        head: Any

        def __init__(self, key: jax.Array) -> None:
            keys = jax.random.split(key, 4)
            self.first = eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0])
            self.group = eqx.nn.GroupNorm(2, 8)
            self.second = eqx.nn.Conv2d(8, 6, 3, padding=1, key=keys[1])
            self.instance = eqx.nn.GroupNorm(6, 6)
            self.dense = eqx.nn.Linear(6, 8, key=keys[2])
            self.layer = eqx.nn.LayerNorm(8)
            self.head = eqx.nn.Linear(8, 5, key=keys[3])

        def __call__(self, image: jax.Array) -> jax.Array:
            kernel = standardised(self.first.weight, 0, fast)
            x = eqx.tree_at(lambda conv: conv.weight, self.first, kernel)(jnp.moveaxis(image, -1, 0))
            x = jax.nn.relu(self.group(x))
            x = jax.nn.relu(self.instance(self.second(x)))
            return self.head(jax.nn.gelu(self.layer(self.dense(x.mean((1, 2))))))

    params, code = eqx.partition(eqx.filter_eval_shape(Network, jax.random.key(0)), _is_array)
    return sculpt.from_function(
        lambda params, images: jax.vmap(eqx.combine(params, code))(images), draw(params, jax.random.key(7))
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def haiku_network(fast: bool) -> Model:
    hk = pytest.importorskip("haiku")

    def forward(x: jax.Array) -> jax.Array:
        kernel = hk.get_parameter("kernel", (3, 3, 3, 8), init=hk.initializers.RandomNormal())
        x = hk.GroupNorm(2)(convolved(x, standardised(kernel, -1, fast)))
        x = hk.InstanceNorm(True, True)(hk.Conv2D(6, 3)(jax.nn.relu(x)))
        x = hk.LayerNorm(-1, True, True)(hk.Linear(8)(jax.nn.relu(x).mean((1, 2))))
        return hk.Linear(5)(jax.nn.gelu(x))

    network = hk.without_apply_rng(hk.transform(forward))
    shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGE)
    return sculpt.from_function(network.apply, draw(shapes, jax.random.key(7)))


def keras_network(fast: bool) -> Model:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    layers = keras.layers

    class Standardised(layers.Conv2D):
        def call(self, inputs: Any) -> Any:
            return convolved(inputs, standardised(self.kernel.value, -1, fast)) + self.bias.value

    network = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            Standardised(8, 3, padding="same"),
            layers.GroupNormalization(2),
            layers.ReLU(),
            layers.Conv2D(6, 3, padding="same"),
            layers.GroupNormalization(-1),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(8),
            layers.LayerNormalization(),
            layers.Activation("gelu"),
            layers.Dense(5),
        ]
    )
    shapes = [
        jax.ShapeDtypeStruct(variable.value.shape, jnp.float32) for variable in network.trainable_variables
    ]
    return sculpt.from_function(
        lambda params, images: network.stateless_call(params, [], images, training=False)[0],
        draw(shapes, jax.random.key(7)),
    )


LIBRARIES: dict[str, Callable[[bool], Model]] = {
    "linen": linen_network,
    "nnx": nnx_network,
    "equinox": equinox_network,
    "haiku": haiku_network,
    "keras": keras_network,
}
CASES = [
    pytest.param(name, fast, marks=[pytest.mark.slow] if name == "keras" and fast else [])
    for name in LIBRARIES
    for fast in (True, False)
]


@pytest.mark.parametrize(("name", "fast"), CASES)
@pytest.mark.fast("equinox-False")
def test_normalised_widths_are_pruned_exactly(name: str, fast: bool) -> None:
    model = LIBRARIES[name](fast)
    trace = sculpt.trace(model, IMAGE)
    assert sorted(group.size for group in trace.groups) == GROUPS
    space = sculpt.make_space(trace, importance=drawn_importance(trace, 3))
    pruned = prune(model, space, leanest_policy(space))
    x = jax.random.normal(jax.random.key(1), (3, *IMAGE.shape[1:]))
    pruned.assert_same_outputs(x)
    pruned.assert_same_gradients(x, training=False)

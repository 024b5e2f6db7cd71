"""What the zoo says of each network, and how its arrays are drawn."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import sculpt
from sculpt.model import Model

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((1, 6, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 6), jnp.int32)
VOCABULARY = 11
CLASSES = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """A small network and what must be found in it."""

    build: Callable[[jax.Array], Model]
    """`key -> model`, its arrays away from their initial zeros and ones."""
    groups: tuple[int, ...]
    """Sizes of the coupled groups that follow from the architecture, in ascending order."""
    example_input: jax.ShapeDtypeStruct = IMAGE
    frozen: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Parameter axes ("path:axis") without any prunable unit -> part of the reason. Network input and output, convolution
    windows and axes of size one go without saying."""
    dropout: bool = False
    """Whether training draws at random: the draws differ between shapes, as they must."""
    differentiable: bool = True
    """Whether reverse mode goes through it."""
    single: bool = False
    """Whether it makes float32 values of its own, whatever its parameters are."""

    def inputs(self, batch: int, seed: int = 11) -> jax.Array:
        """A batch of random images, sequences or tokens."""
        generator = np.random.default_rng(seed)
        shape, dtype = (batch, *self.example_input.shape[1:]), self.example_input.dtype
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.device_put(generator.integers(0, VOCABULARY, shape).astype(dtype))
        return jax.device_put(generator.standard_normal(shape).astype(dtype))


def draw(shapes: Any, key: jax.Array) -> Any:
    """Random arrays of these shapes, so that a forgotten bias or statistic shows. Drawn by numpy and put where they
    belong: nothing is compiled."""
    seed = np.asarray(jax.random.key_data(key)).tolist()

    def array(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(key, leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype))
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng([*seed, zlib.crc32(name.encode())]).standard_normal(leaf.shape)
        if "var" in name:
            noise = np.abs(1.0 + 0.3 * noise) + 0.1
        elif "scale" in name:
            noise = 1.0 + 0.3 * noise
        elif len(leaf.shape) < 2:
            noise = 0.3 * noise
        else:
            noise = noise * 1.2 / np.sqrt(np.prod(leaf.shape[:-1]))
        return jax.device_put(noise.astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(array, shapes)


def from_linen(
    module: nn.Module, example_input: jax.ShapeDtypeStruct = IMAGE
) -> Callable[[jax.Array], Model]:
    """Builder of a Linen network."""

    def build(key: jax.Array) -> Model:
        shapes = jax.eval_shape(module.init, jax.random.key(0), example_input)
        return sculpt.from_linen(module, draw(shapes, key))

    return build


def from_nnx(module: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[jax.Array], Model]:
    """Builder of an NNX network."""

    def build(key: jax.Array) -> Model:
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
        return sculpt.from_nnx(nnx.merge(graphdef, draw(shapes, key)))

    return build


def from_function(apply: Callable[..., jax.Array], shapes: Mapping[str, Any]) -> Callable[[jax.Array], Model]:
    """Builder of a plain JAX function of arrays in a dict, whose values are shapes or trees of them."""

    def of_numbers(node: Any) -> bool:
        return type(node) is tuple and all(isinstance(size, int) for size in node)

    def build(key: jax.Array) -> Model:
        tree = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), dict(shapes), is_leaf=of_numbers
        )
        return sculpt.from_function(apply, draw(tree, key))

    return build


batch_norm = functools.partial(nn.BatchNorm, momentum=0.9)


def mean_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Average pooling; Flax's own mixes ranks where they are strict."""
    total = nn.pool(x, 0.0, jax.lax.add, (window, window), (window, window), "VALID")
    return total / float(window**2)

"""Random inputs for comparing two networks, with outputs that are finite and not all zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DRAWS = 3
"""Seeds that are tried, each with numbers of both signs and with numbers between 0 and 1."""


def draw_inputs(inputs: Any, seed: int = 0, positive: bool = False) -> Any:
    """Random arrays in place of a tree of `ShapeDtypeStruct`s, all drawn independently.

    Floating-point numbers are normal, or uniform in (0.05, 0.95) if `positive`: inside the domain of log, sqrt, arcsin and the like.
    Integers are taken for token ids or the like: 0 and 1, which every network knows.
    """
    shapes, structure = jax.tree.flatten(inputs)
    keys = jax.random.split(jax.random.key(seed), max(len(shapes), 1))
    return jax.tree.unflatten(structure, [_draw(x, key, positive) for x, key in zip(shapes, keys)])


def _draw(array: jax.ShapeDtypeStruct, key: jax.Array, positive: bool) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, array.shape)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return jax.random.bernoulli(key, 0.5, array.shape).astype(array.dtype)
    if positive:
        return jax.random.uniform(key, array.shape, jnp.float32, 0.05, 0.95).astype(array.dtype)
    complex_numbers = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return jax.random.normal(key, array.shape, jnp.complex64 if complex_numbers else jnp.float32).astype(
        array.dtype
    )


def telling_inputs(outputs_of: Callable[[Any], Any], inputs: Any) -> tuple[Any, str]:
    """Inputs on which the outputs tell two networks apart, and what is wrong with them: nothing, if every output is finite and not all zero.

    Args:
      outputs_of: gives the outputs of the network.
      inputs: tree of `ShapeDtypeStruct`s.
    """
    best: tuple[int, Any, str] | None = None
    for x in _candidates(inputs):
        faults = [fault for fault in map(_fault, jax.tree.leaves(outputs_of(x))) if fault]
        weight = sum(2 if fault == _NO_NUMBER else 1 for fault in faults)
        if best is None or weight < best[0]:
            best = weight, x, faults[0] if faults else ""
        if not faults:
            break
    assert best is not None
    return best[1:]


def _candidates(inputs: Any) -> Iterator[Any]:
    for seed in range(_DRAWS):
        yield draw_inputs(inputs, seed)
        yield draw_inputs(inputs, seed, positive=True)


_NO_NUMBER, _ALL_ZERO = "not finite", "all zero"


def _fault(output: Any) -> str:
    if not jnp.issubdtype(output.dtype, jnp.inexact):
        return ""
    values = np.asarray(output).astype(
        np.complex128 if jnp.issubdtype(output.dtype, jnp.complexfloating) else np.float64
    )
    if np.isnan(values).any() or not (np.isfinite(values).any() or not values.size):
        return _NO_NUMBER
    return "" if np.any(values) or not values.size else _ALL_ZERO

"""Feature matching: distance between the layer outputs of a network and its teacher's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.ir.interpreter import as_written, execute
from sculpt.ir.program import CONTRACTIONS, Equation, FlatProgram, flatten

Features = tuple[jax.Array, ...]


def with_features(function: Callable[..., Any]) -> Callable[..., tuple[Any, Features]]:
    """`function(params, state, images, ...)` that gives `(results, features)`.

    Features are what its convolutions and matrix products of the images give, in the order of the program; those inside loops
    and branches, of rematerialised regions, and of functions with derivatives of their own are not seen. To be traced
    (jit, grad, vmap): each call flattens the function for the shapes that it is given.
    """

    @functools.wraps(function)
    def observed(*arguments: Any) -> tuple[Any, Features]:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.result_type(x)), arguments
        )
        program = flatten(function, *abstract)
        seen = _products_of(program, range(*_place(abstract, 2)))
        features: list[jax.Array] = []

        def observe(eqn: Equation, results: Sequence[Any]) -> None:
            if id(eqn) in seen:
                features.append(results[0].astype(jnp.float32))

        results = execute(as_written(program), jax.tree.leaves(arguments), observe=observe)
        structure = jax.tree.structure(jax.eval_shape(function, *abstract))
        return jax.tree.unflatten(structure, results), tuple(features)

    return observed


def distance(found: Features, wanted: Features) -> jax.Array:
    """`mean_k |s_k - t_k|^2 / |t_k|^2` over the layers k, of the student's features s and the teacher's t; float32 scalar.

    The hints of Romero et al. 2014, FitNets, arXiv 1412.6550, equation 3, without its regressor, since a masked network's
    features have the shapes of the dense one's; of all layers instead of one, each measured by the size of the teacher's. What
    masks remove adds a constant.
    """
    apart = [
        jnp.square(s - t).sum() / jnp.maximum(jnp.square(t).sum(), jnp.finfo(jnp.float32).tiny)
        for s, t in zip(found, wanted, strict=True)
    ]
    return jnp.stack(apart).mean()


def _place(arguments: Sequence[Any], position: int) -> tuple[int, int]:
    """First and last (exclusive) of an argument's leaves among those of all."""
    first = len(jax.tree.leaves(arguments[:position]))
    return first, first + len(jax.tree.leaves(arguments[position]))


def _products_of(program: FlatProgram, images: Sequence[int]) -> frozenset[int]:
    """`id(equation)` of the convolutions and matrix products that depend on the inputs at these positions."""
    reached = {program.inputs[position] for position in images}
    products = set()
    for eqn in program.equations:
        if reached.intersection(operand for operand in eqn.inputs if isinstance(operand, int)):
            reached.update(eqn.outputs)
            if eqn.name in CONTRACTIONS:
                products.add(id(eqn))
    return frozenset(products)

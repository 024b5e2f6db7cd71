"""Flat programs with an open batch size, for export, where the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sculpt.inputs import arrays_of, as_text, check_finite
from sculpt.ir.program import FlatProgram, ImpureProgram, flatten, with_derivatives
from sculpt.model import Model
from sculpt.trees import leaf_paths, shapes_of

BATCH = "batch"
"""Name of the open size."""


def open_batch() -> Any:
    """A new open batch size."""
    return export.symbolic_shape(BATCH)[0]


def example_batch(example_input: Any) -> Any:
    """An example input on the host, an array or a pytree of them, in the dtypes that JAX computes in: float32 where NumPy has float64.

    Raises:
      ValueError: if it is no batch of one image or more.
    """
    x = jax.tree.map(np.asarray, arrays_of(example_input))
    _check_batch(x)
    return jax.tree.map(lambda a: a.astype(jax.dtypes.canonicalize_dtype(a.dtype)), x)


def _check_batch(x: Any) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if not shapes or not all(shapes) or any(shape[0] == 0 for shape in shapes):
        raise ValueError(f"expected an example input [batch, ...] of one image or more, got {as_text(x)}")


def input_names(x: Any, single: str) -> tuple[str, ...]:
    """What inputs are called in a file: `single` where there is one array, else their paths."""
    return (single,) if jax.tree_util.all_leaves([x]) else tuple(leaf_paths(x))


def flatten_open(
    function: Callable[..., Any],
    before: Sequence[Any],
    example_input: Any,
    *after: Any,
    derivatives: bool = False,
) -> FlatProgram:
    """The program of `function(*before, x, *after)`. Its batch size is open where the model's code allows it, and is that of the
    example otherwise.

    Args:
      function: `apply` or `apply_train` of a model.
      before: its first arguments, pytrees of arrays or `ShapeDtypeStruct`s.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]`, or a pytree of them. Where they are of different batch sizes none is open.
      after: its last arguments.
      derivatives: note the derivatives of functions with rules of their own (`with_derivatives`): for a program to be trained.

    Raises:
      ValueError: if the example is no such array, or the function does not take it.
    """
    x = shapes_of(arrays_of(example_input))
    _check_batch(x)
    problems = []
    for images in (*with_open_batch(x), x):
        # What an open batch size trips over is up to the model's code: any exception may come out of it.
        try:
            program = flatten(function, *map(shapes_of, before), images, *after)
            return with_derivatives(program) if derivatives else program
        except ImpureProgram:
            raise
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"the model does not take the example input {as_text(x)}: {problems[-1]}")


def with_open_batch(x: Any) -> tuple[Any, ...]:
    """The shapes of an example input with an open batch size; nothing where arrays are of different batch sizes."""
    if len({leaf.shape[0] for leaf in jax.tree.leaves(x)}) > 1:
        return ()
    size = open_batch()
    return (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), x),)


def flatten_model(model: Model, example_input: Any, derivatives: bool = False) -> FlatProgram:
    """The program of a model's evaluation function, as `flatten_open` gives it.

    Raises:
      ValueError: if the model does not take the input, returns other than one array, or has arrays that are not finite.
    """
    check_finite(model)
    arrays = (model.params, model.state)
    program = flatten_open(model.apply, arrays, example_input, derivatives=derivatives)
    if len(program.outputs) != 1:
        raise ValueError(f"expected a model that returns one array, this one returns {len(program.outputs)}")
    return program


def batch_size(who: str, expected: Any, x: Any) -> Any:
    """The batch size of inputs `x`, an array or a pytree of them, which may be symbolic.

    Args:
      who: "the folded model" or the like.
      expected: shapes and dtypes of the inputs of a program.
      x: the inputs.

    Raises:
      ValueError: if they are of another structure, shape or dtype.
    """
    leaves, wanted = jax.tree.leaves(x), jax.tree.leaves(expected)
    first = jnp.shape(leaves[0])[:1] if leaves else ()
    size = first[0] if export.is_symbolic_dim(wanted[0].shape[0]) and first else wanted[0].shape[0]
    fits = jax.tree.structure(x) == jax.tree.structure(expected) and all(
        jnp.shape(leaf) == (size if export.is_symbolic_dim(e.shape[0]) else e.shape[0], *e.shape[1:])
        and jax.dtypes.result_type(leaf) == e.dtype
        for leaf, e in zip(leaves, wanted)
    )
    if not fits:
        raise ValueError(f"{who} takes {as_text(expected)}, got {as_text(x)}")
    return size

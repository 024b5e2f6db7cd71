"""Programs whose batch size is open, where the code of a model allows it: what leaves for engines and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sculpt.model import Model
from sculpt.tracing.program import ImpureProgram, Program, flatten, with_derivatives
from sculpt.tracing.trace import shapes_of

BATCH = "batch"
"""Name of the open size."""


def open_batch() -> Any:
    """A new open batch size."""
    return export.symbolic_shape(BATCH)[0]


def example_batch(example_input: Any) -> np.ndarray:
    """An example input on the host, in the dtype that JAX computes in: float32 where NumPy has float64.

    Raises:
      ValueError: if it is no batch of one image or more.
    """
    x = np.asarray(example_input)
    _check_batch(x)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype))


def _check_batch(x: Any) -> None:
    if not x.shape or x.shape[0] == 0:
        raise ValueError(
            f"expected an example input [batch, ...] of one image or more, got {x.dtype}{list(x.shape)}"
        )


def flatten_open(
    function: Callable[..., Any],
    before: Sequence[Any],
    example_input: Any,
    *after: Any,
    derivatives: bool = False,
) -> Program:
    """The program of `function(*before, x, *after)`. Its batch size is open where the model's code allows it, and is that of the
    example otherwise.

    Args:
      function: `apply` or `apply_train` of a model.
      before: its first arguments, pytrees of arrays or `ShapeDtypeStruct`s.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]`.
      after: its last arguments.
      derivatives: note the derivatives of functions with rules of their own (`with_derivatives`): for a program to be trained.

    Raises:
      ValueError: if the example is no such array, or the function does not take it.
    """
    x = shapes_of(example_input)
    if not hasattr(x, "shape"):
        raise ValueError("expected an example input [batch, ...], one array")
    _check_batch(x)
    problems = []
    for size in (open_batch(), x.shape[0]):
        images = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
        # What an open batch size trips over is up to the model's code: any exception may come out of it.
        try:
            program = flatten(function, *map(shapes_of, before), images, *after)
            return with_derivatives(program) if derivatives else program
        except ImpureProgram:
            raise
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"the model does not take the example input {x.dtype}{list(x.shape)}: {problems[-1]}")


def flatten_model(model: Model, example_input: Any, derivatives: bool = False) -> Program:
    """The program of a model's evaluation function, as `flatten_open` gives it.

    Raises:
      ValueError: if the model does not take the input, or returns other than one array.
    """
    arrays = (model.params, model.state)
    program = flatten_open(model.apply, arrays, example_input, derivatives=derivatives)
    if len(program.outputs) != 1:
        raise ValueError(f"expected a model that returns one array, this one returns {len(program.outputs)}")
    return program


def batch_size(who: str, expected: Any, x: Any) -> Any:
    """The batch size of images `x`, which may be symbolic.

    Args:
      who: "the folded model" or the like.
      expected: shape and dtype of the images of a program.
      x: the images.

    Raises:
      ValueError: if they are of another shape or dtype.
    """
    shape, dtype = jnp.shape(x), jax.dtypes.result_type(x)
    size = shape[0] if export.is_symbolic_dim(expected.shape[0]) and shape else expected.shape[0]
    if shape != (size, *expected.shape[1:]) or dtype != expected.dtype:
        wanted = f"{expected.dtype}[{', '.join(map(str, expected.shape))}]"
        raise ValueError(f"{who} takes {wanted}, got {dtype}{list(shape)}")
    return size

"""StableHLO export: one portable file with parameters, which runs in JAX or a PJRT engine without this library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sculpt.arguments import checked
from sculpt.files import require_folder, written_whole
from sculpt.inputs import as_text
from sculpt.ir.any_batch import batch_size, example_batch, flatten_model, with_open_batch
from sculpt.model import Model
from sculpt.trees import shapes_of

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5
"""Largest difference between the model's logits and the reloaded program's, relative to the largest logit."""


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A program read from a file. Called with images it gives logits; parameters are part of it."""

    program: export.Exported
    """The deserialised program."""

    @property
    def batch(self) -> int | None:
        """The batch size that it takes, or None for any."""
        size = self.program.in_avals[0].shape[0]
        return size if isinstance(size, int) else None

    @property
    def inputs(self) -> Any:
        """Shapes and dtypes of what it takes, an array or a pytree of them."""
        arguments, _ = jax.tree.unflatten(self.program.in_tree, self.program.in_avals)
        return arguments[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image.

        Raises:
          ValueError: if the program takes several arrays.
        """
        if len(self.program.in_avals) != 1:
            raise ValueError(f"expected a program of one input array, this one takes {as_text(self.inputs)}")
        return tuple(self.program.in_avals[0].shape[1:])

    def __call__(self, x: Any) -> jax.Array:
        """Logits `[batch, classes]` of `x` `[batch, ...]`, an array or a pytree of them.

        Raises:
          ValueError: if `x` has another structure, shape or dtype than the program takes.
        """
        batch_size("the exported program", self.inputs, x)
        return self.program.call(x)


@checked
def export_stablehlo(
    model: Model, path: str | Path, example_input: Any, *, fixed_batch: bool = False
) -> ExportedModel:
    """Writes a model as a serialised StableHLO program (`jax.export`) for CPU, CUDA and TPU.

    Parameters and state are constants of the program. The batch size stays open where the model's own code allows it, and
    is that of `example_input` otherwise (`ExportedModel.batch` tells). The program is read back and compared with the
    model before the file gets its name.

    Args:
      model: the model, dense or compact.
      path: the file; in a folder that exists.
      example_input: array `[batch, ...]` that the model takes, or a pytree of them.
      fixed_batch: whether the program takes the batch size of `example_input` only.

    Returns:
      The program as read back.

    Raises:
      ValueError: if the model cannot be exported, or the reloaded program's logits differ; no file is left then.
    """
    require_folder(path)
    x = jax.tree.map(jnp.asarray, example_batch(example_input))
    flatten_model(model, x)  # or an error that says what is wrong with the model
    with written_whole(path) as temporary:
        temporary.write_bytes(_export(model, x, fixed_batch).serialize())
        loaded = load_stablehlo(temporary)
        expected = np.asarray(jax.jit(model.apply)(model.params, model.state, x))
        difference = np.abs(np.asarray(loaded(x)) - expected).max() / max(1.0, np.abs(expected).max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the exported program differs from the model by {difference:.2e} of the largest logit (at most "
                f"{TOLERANCE} expected); nothing was written to {path}"
            )
    return loaded


def _export(model: Model, x: Any, fixed_batch: bool) -> export.Exported:
    program = jax.jit(lambda images: model.apply(model.params, model.state, images))
    problems = []
    for argument in (*(() if fixed_batch else with_open_batch(x)), shapes_of(x)):
        # What an open batch size trips over is up to the model's code: any exception may come out of it.
        try:
            return export.export(program, platforms=PLATFORMS)(argument)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"this model cannot be exported: {problems[-1]}")


def load_stablehlo(path: str | Path) -> ExportedModel:
    """Reads a program that `export_stablehlo` wrote.

    Raises:
      ValueError: if the file is absent or is no such program.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        program = export.deserialize(bytearray(path.read_bytes()))
    # The flatbuffer reader raises whatever the damaged bytes lead it to (struct.error, AssertionError, TypeError, ...).
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable StableHLO program ({type(error).__name__}: {error})"
        ) from error
    return ExportedModel(program)

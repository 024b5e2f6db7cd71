"""The functions of a loaded model: check the inputs, then run the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.export.model_file.json_values import generator_of, shaped
from sculpt.ir.any_batch import batch_size
from sculpt.ir.interpreter import execute_at
from sculpt.ir.program import FlatProgram
from sculpt.model import Params, State
from sculpt.trees import leaf_parts, leaf_paths


@dataclasses.dataclass(frozen=True)
class LoadedFunction:
    """A program read from a file. Equal to what was read from another file of the same programs and constants."""

    digest: str
    """Of both programs and their constants."""
    program: FlatProgram = dataclasses.field(compare=False, repr=False)
    """Takes the leaves of the parameters and the state in the order of `order`, then images, then a key if it is for training."""
    structure: Any = dataclasses.field(compare=False, repr=False)
    """Of (parameters, state)."""
    order: tuple[int, ...] = dataclasses.field(compare=False, repr=False)
    """For every array that the program takes, which leaf of (parameters, state) it is."""
    inputs: tuple[tuple[str | int, ...], ...] = dataclasses.field(compare=False, repr=False)
    """The paths of the images: `((),)` for one array."""

    def run(self, params: Params, state: State, x: Any, *key: jax.Array, observe: Any = None) -> list[Any]:
        leaves, structure = jax.tree.flatten((params, state))
        if structure != self.structure:
            expected = leaf_paths(jax.tree.unflatten(self.structure, range(self.structure.num_leaves)))
            found = leaf_paths((params, state))
            raise ValueError(
                f"the model takes (parameters, state) as load_model gave them, with {_other(expected, found)}; got {_other(found, expected)}"
            )
        avals = [self.program.avals[i] for i in self.program.inputs]
        arrays = [leaves[leaf] for leaf in self.order]
        for leaf, array, aval in zip(self.order, arrays, avals):
            if np.shape(array) != aval.shape or jax.dtypes.result_type(array) != aval.dtype:
                found = f"{jax.dtypes.result_type(array)}{list(np.shape(array))}"
                path = leaf_paths((params, state))[leaf].partition("/")[2] or "parameters"
                raise ValueError(f"the model takes {shaped(aval)} for {path}, got {found}")
        named = dict(zip(leaf_parts(x), jax.tree.leaves(x)))
        expected = dict(zip(self.inputs, avals[len(arrays) :]))
        size = batch_size("the model", _by_path(expected), _by_path(named))
        images = [named[path] for path in self.inputs]
        return execute_at(self.program, size, [*arrays, *images, *key], observe)


def _by_path(arrays: dict[tuple[str | int, ...], Any]) -> Any:
    """One array, or several by path, whatever mappings and sequences they came in."""
    return arrays[()] if list(arrays) == [()] else {"/".join(map(str, path)): a for path, a in arrays.items()}


@dataclasses.dataclass(frozen=True)
class LoadedApply(LoadedFunction):
    """The evaluation function of a model read from a file."""

    rows: tuple[str, ...] = dataclasses.field(compare=False, repr=False, default=())

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        (logits,) = self.run(params, state, x)
        return logits

    def describe(self) -> tuple[str, ...]:
        """What compaction did to the model that was saved (`Model.describe`)."""
        return self.rows


@dataclasses.dataclass(frozen=True)
class LoadedTrain(LoadedFunction):
    """The training function of a model read from a file."""

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        expected = self.program.avals[self.program.inputs[-1]].dtype
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key, impl=generator_of(expected))
        if key.dtype != expected:
            raise ValueError(f"the model draws from keys {expected}, got {key.dtype}")
        logits, *new = self.run(params, state, x, key)
        leaves = jax.tree.leaves((params, state))
        for leaf, array in zip(self.order[len(self.order) - len(new) :], new, strict=True):
            leaves[leaf] = array
        return logits, jax.tree.unflatten(self.structure, leaves)[1]


@dataclasses.dataclass(frozen=True)
class NoTraining:
    """Stands for the training function of a model that was saved without one."""

    reason: str

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        raise ValueError(f"the model file has no training mode: {self.reason}")


def _other(paths: Sequence[str], others: Sequence[str]) -> str:
    """The first of some paths that are not among others."""
    first = [path for path in paths if path not in others][:3]
    return ", ".join(first) or "nothing else but in other mappings or sequences"

"""Moves scales and shifts from behind a concatenation to before it, where `chains` finds them.

A convolution in groups (`filter_groups`) is several layers whose outputs are concatenated and perhaps put in another order; BatchNorm
follows. Per channel, `scale(concatenate(a, b))` is `concatenate(scale_a(a), scale_b(b))`, and the same holds of any permutation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sculpt.export.folding.chains import FOLDED_DTYPES, is_step, kernel_of
from sculpt.ir.program import Equation, FlatProgram, Literal, Operand


def before_joins(
    program: FlatProgram,
    constants_of: Callable[[FlatProgram], set[int]],
    values_of: Callable[[Sequence[int]], Mapping[int, Any]],
) -> FlatProgram:
    """The same program with scales and shifts by constants brought before the concatenations and permutations of layers that they
    follow.

    Args:
      program: a flat program without bodies.
      constants_of: the ids of the values of a program that depend on no image.
      values_of: works such values of this program out.
    """
    constants = constants_of(program)
    indices = [eqn.inputs[1] for eqn in program.equations if eqn.name == "gather"]
    known = values_of([i for i in indices if not isinstance(i, Literal) and i in constants])
    while True:
        joins = _Joins(program, constants_of(program), known)
        pairs = [pair for place in range(len(program.equations)) if (pair := joins.step_behind(place))]
        if not pairs:
            return program
        program = joins.swapped(pairs)


class _Joins:
    """The concatenations and permutations of a program."""

    def __init__(self, program: FlatProgram, constants: set[int], known: Mapping[int, Any]) -> None:
        self._program = program
        self._constants = constants
        self._known = known
        self._made = {o: place for place, eqn in enumerate(program.equations) for o in eqn.outputs}
        self._readers: dict[int, list[int]] = {}
        for place, eqn in enumerate(program.equations):
            for value in eqn.inputs:
                if not isinstance(value, Literal):
                    self._readers.setdefault(value, []).append(place)
        self._results = {o for o in program.outputs if not isinstance(o, Literal)}

    def step_behind(self, place: int) -> tuple[int, int] | None:
        """The positions of a join and of the scale or shift behind it, if this is one of layers and is followed by one."""
        eqn = self._program.equations[place]
        axis, value = self._axis(eqn), eqn.outputs[0]
        if self._program.avals[value].dtype not in FOLDED_DTYPES or value in self._constants:
            return None
        if axis is None or not self._of_layers(value, axis):
            return None
        step = self._only_reader(value)
        if step is None:
            return None
        after = self._program.equations[step]
        return (place, step) if is_step(self._program, after, value, (axis,), self._constants) else None

    def swapped(self, pairs: Sequence[tuple[int, int]]) -> FlatProgram:
        """The program with these scales and shifts before these joins."""
        new = _Additions(self._program)
        equations: list[Sequence[Equation]] = [(eqn,) for eqn in self._program.equations]
        for place, step in pairs:
            # All that the step reads is there where the step was.
            equations[place], equations[step] = (), self._before(new, place, step)
        return dataclasses.replace(
            self._program,
            equations=tuple(itertools.chain.from_iterable(equations)),
            avals=tuple(new.avals),
            constants=new.constants,
        )

    def _before(self, new: _Additions, place: int, step: int) -> list[Equation]:
        """The equations of a scale or shift of every part of a join, and of the join."""
        join, after = (self._program.equations[i] for i in (place, step))
        (value,), axis = join.outputs, self._axis(join)
        assert axis is not None
        constant = next((i for i in after.inputs if i != value), None)
        begun = len(new.equations)
        if join.name == "concatenate":
            parts, constants, stop = join.inputs, [], 0
            for part in parts:
                start, stop = stop, stop + self._program.shape(part)[axis]
                constants.append(self._cut(new, constant, axis, start, stop))
        else:
            parts, constants = join.inputs[:1], [self._put_back(new, constant, axis, join)]
        scaled = []
        for part, own in zip(parts, constants, strict=True):
            inputs = tuple(part if i == value else own for i in after.inputs)
            scaled.append(new.add(after, inputs, self._program.shape(part), value, after.params))
        inputs = (*scaled, *join.inputs[len(parts) :])
        return [*new.equations[begun:], dataclasses.replace(join, inputs=inputs, outputs=after.outputs)]

    def _cut(
        self, new: _Additions, constant: Operand | None, axis: int, start: int, stop: int
    ) -> Operand | None:
        """What of a constant goes with one part of a concatenation."""
        if not isinstance(constant, int) or not self._varies(constant, axis):
            return constant
        limits = list(self._program.shape(constant))
        starts = [0] * len(limits)
        starts[axis], limits[axis] = start, stop
        params = {"start_indices": tuple(starts), "limit_indices": tuple(limits), "strides": None}
        shape = tuple(limit - first for first, limit in zip(starts, limits))
        eqn = Equation(jax.lax.slice_p, (constant,), (), params, "")
        return new.add(eqn, (constant,), shape, constant, params)

    def _put_back(
        self, new: _Additions, constant: Operand | None, axis: int, permutation: Equation
    ) -> Operand | None:
        """A constant in the order that there was before a permutation."""
        if not isinstance(constant, int) or not self._varies(constant, axis):
            return constant
        indices, shape = permutation.inputs[1], self._program.shape(constant)
        assert isinstance(indices, int)
        inverse = new.constant(np.argsort(np.asarray(self._known[indices]), axis=0), indices)
        params = {**permutation.params, "slice_sizes": (*shape[:axis], 1, *shape[axis + 1 :])}
        return new.add(permutation, (constant, inverse), shape, constant, params)

    def _axis(self, eqn: Equation) -> int | None:
        """The axis along which an equation joins or permutes; None where it does not."""
        if eqn.name == "concatenate":
            literal = any(isinstance(i, Literal) for i in eqn.inputs)
            return None if literal else eqn.params["dimension"]
        if eqn.name != "gather" or eqn.inputs[1] not in self._known or isinstance(eqn.inputs[0], Literal):
            return None
        numbers, indices = eqn.params["dimension_numbers"], np.asarray(self._known[eqn.inputs[1]])  # type: ignore[index]
        shape = self._program.shape(eqn.inputs[0])
        if (
            indices.ndim != 2
            or len(numbers.start_index_map) != 1
            or shape != self._program.shape(eqn.outputs[0])
        ):
            return None
        (axis,) = numbers.start_index_map
        offsets = tuple(d for d in range(len(shape)) if d != axis)
        whole = (numbers.offset_dims, numbers.collapsed_slice_dims) == (offsets, (axis,))
        return axis if whole and np.array_equal(np.sort(indices[:, 0]), np.arange(shape[axis])) else None

    def _of_layers(self, value: int, axis: int) -> bool:
        """Whether a value that nothing else reads is made of layers of constant kernels, by joins, scales and shifts."""
        if value in self._constants:
            return True
        if value not in self._made:
            return False
        eqn = self._program.equations[self._made[value]]
        if all(isinstance(i, Literal) or i in self._constants for i in eqn.inputs):
            return True  # the zeros, for any batch size, of filters that keep nothing
        kernel = kernel_of(self._program, eqn, self._constants)
        if kernel is not None:
            return axis in kernel[1]
        if self._axis(eqn) == axis:
            parts = eqn.inputs if eqn.name == "concatenate" else eqn.inputs[:1]
            return all(self._of_part(part, axis) for part in parts)
        before = [i for i in eqn.inputs if not isinstance(i, Literal) and i not in self._constants]
        if len(before) != 1 or not is_step(self._program, eqn, before[0], (axis,), self._constants):
            return False
        return self._of_part(before[0], axis)

    def _of_part(self, value: Operand, axis: int) -> bool:
        alone = isinstance(value, int) and (value in self._constants or self._only_reader(value) is not None)
        return alone and self._of_layers(value, axis)  # type: ignore[arg-type]

    def _only_reader(self, value: int) -> int | None:
        readers = self._readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self._results else None

    def _varies(self, constant: Operand, axis: int) -> bool:
        shape = self._program.shape(constant)
        return bool(shape) and shape[axis] != 1


class _Additions:
    """Equations and values that a program gets."""

    def __init__(self, program: FlatProgram) -> None:
        self.equations: list[Equation] = []
        self.avals = list(program.avals)
        self.constants = dict(program.constants)

    def add(
        self,
        eqn: Equation,
        inputs: tuple[Operand | None, ...],
        shape: Sequence[Any],
        like: int,
        params: dict[str, Any],
    ) -> int:
        """Another equation of that operation; its value, of the dtype of the value `like`."""
        self.avals.append(self.avals[like].update(shape=tuple(shape)))
        value = len(self.avals) - 1
        self.equations.append(
            dataclasses.replace(eqn, inputs=inputs, outputs=(value,), params=params)  # type: ignore[arg-type]
        )
        return value

    def constant(self, array: np.ndarray, like: int) -> int:
        """An array that the program holds, of the shape and dtype of the value `like`."""
        self.avals.append(self.avals[like])
        self.constants[len(self.avals) - 1] = array.astype(self.avals[like].dtype)
        return len(self.avals) - 1

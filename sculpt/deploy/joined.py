"""Scales and shifts behind a concatenation of layers, brought before it, so that `chains` finds them.

A convolution in groups (`filter_groups`) is several layers whose outputs are concatenated and perhaps put in another order; BatchNorm
follows. Per channel, `scale(concatenate(a, b))` is `concatenate(scale_a(a), scale_b(b))`, and the same holds of any permutation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sculpt.deploy.chains import is_step, kernel_of
from sculpt.tracing.program import Equation, Literal, Operand, Program


def before_joins(
    program: Program,
    constants_of: Callable[[Program], set[int]],
    values_of: Callable[[Program, Sequence[int]], Mapping[int, Any]],
) -> Program:
    """The same program with scales and shifts by constants brought before the concatenations and permutations of layers that they
    follow.

    Args:
      program: a flat program without bodies.
      constants_of: the ids of the values that depend on no image.
      values_of: works such values out.
    """
    while True:
        constants = constants_of(program)
        indices = [eqn.inputs[1] for eqn in program.equations if eqn.name == "gather"]
        known = values_of(program, [i for i in indices if not isinstance(i, Literal) and i in constants])
        joins = _Joins(program, constants, known)
        found = next(filter(None, map(joins.step_behind, range(len(program.equations)))), None)
        if found is None:
            return program
        program = joins.swapped(*found)


class _Joins:
    """The concatenations and permutations of a program."""

    def __init__(self, program: Program, constants: set[int], known: Mapping[int, Any]) -> None:
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
        if axis is None or value in self._constants or not self._of_layers(value, axis):
            return None
        step = self._only_reader(value)
        if step is None:
            return None
        after = self._program.equations[step]
        return (place, step) if is_step(self._program, after, value, (axis,), self._constants) else None

    def swapped(self, place: int, step: int) -> Program:
        """The program with the scale or shift before the join."""
        program, join, after = self._program, *(self._program.equations[i] for i in (place, step))
        value, avals, constants = join.outputs[0], list(program.avals), dict(program.constants)
        axis = self._axis(join)
        assert axis is not None
        new: list[Equation] = []

        def fresh(shape: Sequence[Any], dtype: Any) -> int:
            avals.append(program.avals[value].update(shape=tuple(shape), dtype=dtype))
            return len(avals) - 1

        def scaled(part: int, other: Operand | None) -> int:
            aval = program.avals[part]
            out = fresh(aval.shape, aval.dtype)
            inputs = tuple(part if i == value else other for i in after.inputs)
            new.append(dataclasses.replace(after, inputs=inputs, outputs=(out,)))
            return out

        other = next((i for i in after.inputs if i != value), None)
        along = other is not None and self._varies(other, axis)
        if join.name == "concatenate":
            parts, start = [], 0
            for part in join.inputs:
                assert isinstance(part, int)
                stop = start + program.shape(part)[axis]
                own = other
                if along:
                    assert isinstance(other, int)
                    shape = program.shape(other)
                    starts = [start if d == axis else 0 for d in range(len(shape))]
                    limits = [stop if d == axis else n for d, n in enumerate(shape)]
                    own = fresh(np.subtract(limits, starts).tolist(), program.avals[other].dtype)
                    params = {"start_indices": tuple(starts), "limit_indices": tuple(limits), "strides": None}
                    new.append(Equation(jax.lax.slice_p, (other,), (own,), params, after.source))
                parts.append(scaled(part, own))
                start = stop
            inputs = tuple(parts)
        else:
            own = other
            if along:
                assert isinstance(other, int)
                indices = np.asarray(self._known[join.inputs[1]])  # type: ignore[index]
                shape, dtype = program.shape(other), program.avals[other].dtype
                inverse = fresh(indices.shape, indices.dtype)
                constants[inverse] = np.argsort(indices[:, 0]).astype(indices.dtype)[:, None]
                own = fresh(shape, dtype)
                sizes = tuple(1 if d == axis else n for d, n in enumerate(shape))
                new.append(
                    dataclasses.replace(
                        join,
                        inputs=(other, inverse),
                        outputs=(own,),
                        params={**join.params, "slice_sizes": sizes},
                    )
                )
            assert isinstance(join.inputs[0], int)
            inputs = (scaled(join.inputs[0], own), *join.inputs[1:])
        new.append(dataclasses.replace(join, inputs=inputs, outputs=after.outputs))
        # All that the step reads is there where the step was.
        equations = list(program.equations)
        equations[step : step + 1] = new
        del equations[place]
        return dataclasses.replace(
            program, equations=tuple(equations), avals=tuple(avals), constants=constants
        )

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

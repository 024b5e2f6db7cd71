"""Removes branches whose output is the same for every image.

A layer that sums over nothing, or whose kernel is all zero, gives zeros, and so do filters that keep nothing; BatchNorm makes them one
number for each channel. Such values have size one along every axis that they do not vary along, which is how those that read them get them, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.program import CONTRACTIONS, Equation, FlatProgram, Literal, Operand, live_equations
from sculpt.tracing.rules import ELEMENTWISE

_BROADCASTING = tuple(name for name in ELEMENTWISE if name not in ("select_n", "clamp"))
"""Operations whose operands may have size one where others have more."""


def without_dead_branches(
    program: FlatProgram, constants: set[int], values_of: Callable[[Sequence[int]], Mapping[int, Any]]
) -> FlatProgram:
    """The same program without what is worked out where its value is known to be the same for every image.

    Args:
      program: a flat program, without own derivatives.
      constants: the ids of its values that depend on no image.
      values_of: works such values out.
    """
    return _Search(program, constants, values_of).rewritten()


class _Search:
    """The values of a program that are the same for every image, small: of size one along the axes that they do not vary along."""

    def __init__(
        self,
        program: FlatProgram,
        constants: set[int],
        values_of: Callable[[Sequence[int]], Mapping[int, Any]],
    ) -> None:
        self._program = program
        self._constants = constants
        read = [i for eqn in program.equations if eqn.name in CONTRACTIONS for i in eqn.inputs]
        kernels = {i for i in read if isinstance(i, int) and i in constants}
        empty = {i for i in kernels if 0 in program.shape(i)}
        self._zero = empty | {
            i for i, array in values_of(sorted(kernels - empty)).items() if not np.any(array)
        }
        self._known = values_of(sorted(self._read_with_dead_values()))
        self._small: dict[int, np.ndarray] = {}

    def rewritten(self) -> FlatProgram:
        program = self._program
        avals, constants = list(program.avals), dict(program.constants)
        renamed: dict[int, Operand] = {}
        equations: list[Equation] = []

        def small(value: int) -> int:
            """The small value, as a constant of the program."""
            avals.append(avals[value].update(shape=self._small[value].shape))
            constants[len(avals) - 1] = self._small[value]
            return len(avals) - 1

        for eqn in program.equations:
            found = self._worked_out(eqn)
            if found is not None:
                (value,) = eqn.outputs
                self._small[value] = found
                shape = tuple(avals[value].shape)
                whole = {"shape": shape, "broadcast_dimensions": tuple(range(len(shape))), "sharding": None}
                equations.append(
                    Equation(jax.lax.broadcast_in_dim_p, (small(value),), eqn.outputs, whole, eqn.source)
                )
                continue
            inputs = tuple(i if isinstance(i, Literal) else renamed.get(i, i) for i in eqn.inputs)
            passed = self._passed_on(eqn)
            if passed is not None:
                renamed[eqn.outputs[0]] = inputs[passed]
                continue
            if eqn.name in _BROADCASTING and self._has_whole_operand(eqn):
                inputs = tuple(
                    small(before) if isinstance(before, int) and before in self._small else now
                    for before, now in zip(eqn.inputs, inputs)
                )
            equations.append(dataclasses.replace(eqn, inputs=inputs))
        if not self._small:
            return program
        outputs = tuple(o if isinstance(o, Literal) else renamed.get(o, o) for o in program.outputs)
        live = tuple(live_equations(equations, outputs))
        read = {i for eqn in live for i in eqn.inputs} | set(outputs)
        return dataclasses.replace(
            program,
            equations=live,
            avals=tuple(avals),
            outputs=outputs,
            constants={i: array for i, array in constants.items() if i in read},
        )

    def _dead_layer(self, eqn: Equation, dead: Any) -> bool:
        """Whether an operand is zero everywhere; `dead` are the values known to be the same for every image."""
        return eqn.name in CONTRACTIONS and any(
            i in self._zero or (i in dead and not np.any(dead[i])) or 0 in self._program.shape(i)
            for i in eqn.inputs
            if isinstance(i, int)
        )

    def _read_with_dead_values(self) -> set[int]:
        """The constants that may be needed to work dead values out."""
        dead: set[Operand] = set()
        found: set[int] = set()
        for eqn in self._program.equations:
            if eqn.outputs[0] in self._constants or eqn.bodies:
                continue
            # It is not known yet which of them are zero, and so whether layers behind them are dead.
            if _gives_one_number(eqn) or self._dead_layer(eqn, {}):
                dead.add(eqn.outputs[0])
            elif eqn.name in CONTRACTIONS and not dead.isdisjoint(eqn.inputs):
                dead.add(eqn.outputs[0])
            elif eqn.name in ELEMENTWISE and not dead.isdisjoint(eqn.inputs):
                others = {i for i in eqn.inputs if isinstance(i, int) and i not in dead}
                if others <= self._constants:
                    found |= others
                    dead.add(eqn.outputs[0])
        return found

    def _worked_out(self, eqn: Equation) -> np.ndarray | None:
        """The small value of an equation's result, if it is the same for every image."""
        if eqn.outputs[0] in self._constants or eqn.bodies:
            return None
        aval = self._program.avals[eqn.outputs[0]]
        if self._dead_layer(eqn, self._small):
            return np.zeros((1,) * len(aval.shape), aval.dtype)
        if _gives_one_number(eqn):
            return np.full((1,) * len(aval.shape), self._value(eqn.inputs[0]), aval.dtype)
        if eqn.name not in ELEMENTWISE or not any(i in self._small for i in eqn.inputs):
            return None
        operands = [self._value(i) for i in eqn.inputs]
        if any(operand is None for operand in operands):
            return None
        arrays = [np.asarray(operand) for operand in operands]
        shape = np.broadcast_shapes(*(a.shape for a in arrays if a.ndim == len(aval.shape)))
        alike = [np.broadcast_to(a, shape) if a.ndim == len(shape) else a for a in arrays]
        return np.asarray(eqn.primitive.bind(*map(jnp.asarray, alike), **eqn.params))

    def _value(self, operand: Operand) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        return self._small.get(operand, self._known.get(operand))

    def _passed_on(self, eqn: Equation) -> int | None:
        """Which operand the result is, where the other is zero."""
        if eqn.name not in ("add", "add_any", "sub"):
            return None
        result = self._program.avals[eqn.outputs[0]]
        for place, other in ((0, 1), (1, 0)) if eqn.name != "sub" else ((0, 1),):
            stays, goes = eqn.inputs[place], eqn.inputs[other]
            if isinstance(stays, Literal) or isinstance(goes, Literal):
                continue
            if goes not in self._small or np.any(self._small[goes]):
                continue
            aval = self._program.avals[stays]
            if (aval.shape, aval.dtype) == (result.shape, result.dtype):
                return place
        return None

    def _has_whole_operand(self, eqn: Equation) -> bool:
        """Whether an operand that is not small has the shape of the result."""
        shape = self._program.shape(eqn.outputs[0])
        return any(
            self._program.shape(i) == shape for i in eqn.inputs if isinstance(i, int) and i not in self._small
        )


def _gives_one_number(eqn: Equation) -> bool:
    """Whether an equation repeats a number that is written into the program."""
    (first, *_), name = eqn.inputs or (None,), eqn.name
    return name == "broadcast_in_dim" and isinstance(first, Literal) and np.ndim(first.value) == 0

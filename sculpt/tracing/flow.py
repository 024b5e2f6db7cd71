"""The flow of axes through a program: the axes of all values, and the table of rules.

A rule gets the flow so far and one equation, unifies what the operation ties together, freezes what it cannot follow,
and returns one term per result. A primitive without a rule freezes everything it touches, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sculpt.ir.program import Equation, FlatProgram, Literal, Operand
from sculpt.tracing.axes import Axes, Axis, Term

Rule = Callable[["Flow", Equation], list[Term]]
RULES: dict[str, Rule] = {}
"""Primitive name -> rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


class Flow:
    """The terms of all values of a program, its bodies included. Complete once constructed."""

    def __init__(
        self, program: FlatProgram, axes: Axes, inputs: Sequence[Term], with_derivatives: bool = True
    ) -> None:
        self.program = program
        self.axes = axes
        self.with_derivatives = with_derivatives
        """Whether a function's own derivative is followed too. Inside derivatives it is not: a rule may well call the
        function that it differentiates."""
        self.terms: dict[int, Term] = dict(zip(program.inputs, inputs, strict=True))
        self.bodies: dict[int, tuple[Flow, ...]] = {}
        """Flows of an equation's bodies, by `id(equation)`."""
        self.derivatives: dict[int, Flow] = {}
        """Flow of an equation's own derivative, by `id(equation)`."""
        self.picks: dict[int, dict[int, np.ndarray]] = {}
        """By `id(equation)`: axis of its first operand -> the units of it that the result has, in that order, where these are known."""
        for value in program.constants:
            self.terms[value] = self.fresh(program.shape(value))
        for eqn in program.equations:
            self._step(eqn)

    def term(self, operand: Operand) -> Term:
        if isinstance(operand, Literal):
            return self.fresh(self.program.shape(operand))
        return self.terms[operand]

    @property
    def results(self) -> list[Term]:
        """Terms of the program's outputs."""
        return [self.term(o) for o in self.program.outputs]

    def fresh(self, shape: tuple[int, ...], frozen: str | None = None) -> Term:
        return tuple(self.axes.fresh(n, frozen) for n in shape)

    def out_shapes(self, eqn: Equation) -> list[tuple[int, ...]]:
        return [self.program.shape(o) for o in eqn.outputs]

    def body(self, eqn: Equation, index: int, inputs: Sequence[Term]) -> list[Term]:
        """Follows the axes through one body of an equation and returns the terms of its results."""
        flow = Flow(eqn.bodies[index], self.axes, inputs, self.with_derivatives)
        self.bodies[id(eqn)] = (*self.bodies.get(id(eqn), ()), flow)
        return flow.results

    def pick(self, eqn: Equation, dim: int, units: np.ndarray, reason: str) -> Axis:
        """The axis that has these units of an axis of the first operand, in this order; another may have others."""
        self.picks.setdefault(id(eqn), {})[dim] = units
        return self.axes.take(self.term(eqn.inputs[0])[dim], units, reason)

    def unify(self, x: Term, y: Term, reason: str) -> None:
        """Makes two terms of one shape one, axis by axis."""
        for a, b in zip(x, y, strict=True):
            self.axes.unify(a, b, reason)

    def freeze(self, term: Term, reason: str) -> None:
        for axis in term:
            self.axes.freeze(axis, reason)

    def unknown(self, eqn: Equation, what: str = "no rule for this operation") -> list[Term]:
        """Freezes all that an equation reads and gives."""
        reason = because(eqn, what)
        for operand in eqn.inputs:
            self.freeze(self.term(operand), reason)
        return [self.fresh(shape, reason) for shape in self.out_shapes(eqn)]

    def _step(self, eqn: Equation) -> None:
        rule = RULES.get(eqn.name)
        if self.program.is_table(eqn):
            # Computed whole, whatever the operation: what is pruned is left out where the table is read.
            results = [self.fresh(shape) for shape in self.out_shapes(eqn)]
        else:
            results = self.unknown(eqn) if rule is None else rule(self, eqn)
        for output, term in zip(eqn.outputs, results, strict=True):
            sizes = tuple(map(self.axes.size, term))
            if sizes != self.program.shape(output):
                raise AssertionError(
                    f"rule of {eqn.name} gave {sizes}, expected {self.program.shape(output)}"
                )
            self.terms[output] = term


def because(eqn: Equation, what: str) -> str:
    """A reason for freezing, with the operation and the line it comes from."""
    return f"{what} ({eqn.name} at {eqn.source})"

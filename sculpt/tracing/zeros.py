"""The zero pass: which values are exactly zero at the pruned units of an axis, and where that matters.

Coupling alone is unsound: a sum over an axis equals the sum over the kept units only if the summand is zero at the
pruned ones. Parameters are (masks zero them); `exp(x)` or a BatchNorm mean is not. Every prunable axis that is summed
over while no operand is zero there is reported, to be frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from sculpt.ir.jax_calls import scan_parts, scan_results, while_parts
from sculpt.ir.program import OWN_DERIVATIVES, Equation, Literal, Operand
from sculpt.tracing.axes import Atom
from sculpt.tracing.flow import Flow
from sculpt.tracing.signs import never_negative


@dataclasses.dataclass(frozen=True)
class Zero:
    """What is known of the zeros of one value."""

    atoms: frozenset[Atom]
    """Free atoms at whose pruned units the value is exactly zero."""
    constant: Any = None
    """The value itself where it is one number known beforehand."""
    never_negative: bool = False
    """Whether no entry of it is below zero."""


ZeroRule = Callable[["ZeroPass", Equation, list[Zero]], Set[Atom] | list[Zero]]
"""Gives the atoms at which every result is zero, or a list: what is known of each result."""
ZERO_RULES: dict[str, ZeroRule] = {}
"""Primitive name -> rule; without one, a result is zero nowhere."""


def zero_rule(*names: str) -> Callable[[ZeroRule], ZeroRule]:
    """Registers a zero rule for primitives of these names."""

    def register(function: ZeroRule) -> ZeroRule:
        for name in names:
            ZERO_RULES[name] = function
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a program does with pruned units that are not zero, in its bodies too."""

    unsound: dict[Atom, str] = dataclasses.field(default_factory=dict)
    """The prunable atoms that some operation mixes while their pruned units are not zero, and why each must be frozen."""
    sums: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    """By `id(equation)` of a sum over pruned units that are not zero but equal: the slices (`tracing/equal_units.py`) that say
    what these units add to it."""


def find_unsound(flow: Flow, zero_inputs: Iterable[int]) -> Findings:
    """Runs the zero pass over a program.

    Args:
      flow: the finished axis flow.
      zero_inputs: ids of the values that masks zero (the parameters).
    """
    findings, masked = Findings(), set(zero_inputs)
    inputs = [
        Zero(frozenset(live(flow, flow.terms[value]) if value in masked else ()))
        for value in flow.program.inputs
    ]
    ZeroPass(flow, inputs, findings)
    return findings


def live(flow: Flow, term: Iterable[Any]) -> set[Atom]:
    """The free atoms of a term that are not frozen."""
    axes = flow.axes
    return {a for axis in term for a in axes.atoms(axis) if axes.frozen(a) is None}


class ZeroPass:
    """The zeros of all values of a program, found in order of its equations."""

    def __init__(
        self, flow: Flow, inputs: Sequence[Zero], findings: Findings, follows_sums: bool = True
    ) -> None:
        self.flow = flow
        self.findings = findings
        self.follows_sums = follows_sums
        """Whether sums over equal units are followed. Inside functions with a derivative of their own they are not: the derivative
        would have to add the same."""
        self.zeros: dict[int, Zero] = dict(zip(flow.program.inputs, inputs, strict=True))
        self.places: dict[int, int] = {}
        """The place of the equation that gives a value among the program's equations, by the value's id."""
        for value, array in flow.program.constants.items():
            self.zeros[value] = _number(array)
        for place, eqn in enumerate(flow.program.equations):
            self._step(eqn)
            self.places.update(dict.fromkeys(eqn.outputs, place))

    @property
    def results(self) -> list[Zero]:
        """Zeros of the program's outputs."""
        return [self.read(o) for o in self.flow.program.outputs]

    def live(self, term: Iterable[Any]) -> set[Atom]:
        return live(self.flow, term)

    def read(self, operand: Operand) -> Zero:
        if isinstance(operand, Literal):
            return _number(operand.value)
        return self.zeros[operand]

    def term(self, operand: Operand) -> Any:
        return () if isinstance(operand, Literal) else self.flow.terms[operand]

    def require(self, atoms: set[Atom], zero: Iterable[Atom], reason: str) -> None:
        """Reports those of `atoms` that are not among `zero`."""
        for atom in atoms - set(zero):
            self.findings.unsound.setdefault(atom, reason)

    def _step(self, eqn: Equation) -> None:
        operands = [self._spread(eqn, o) for o in eqn.inputs]
        rule = None if self.flow.program.is_table(eqn) else ZERO_RULES.get(eqn.name)
        results = frozenset() if rule is None else rule(self, eqn, operands)
        if not isinstance(results, list):
            sign = never_negative(self.flow.program, eqn, lambda o: self.read(o).never_negative, self._maker)
            results = [Zero(frozenset(results), _constant(eqn, operands), sign)] * len(eqn.outputs)
        for output, found in zip(eqn.outputs, results, strict=True):
            alive = self.live(self.flow.terms[output])
            everywhere = found.constant is not None and found.constant == 0
            atoms = frozenset(alive if everywhere else found.atoms & alive)
            self.zeros[output] = dataclasses.replace(found, atoms=atoms)

    def _maker(self, operand: Operand) -> Equation | None:
        place = self.places.get(operand) if isinstance(operand, int) else None
        return None if place is None else self.flow.program.equations[place]

    def _spread(self, eqn: Equation, operand: Operand) -> Zero:
        """An operand as it meets the others. What is copied along an axis is not zero at that axis' pruned units, even where
        another axis of it has the same atom."""
        zero = self.read(operand)
        if eqn.name not in _COPYING:
            return zero
        shape, result = self.flow.program.shape(operand), eqn.outputs[0]
        sizes = dict(zip(eqn.params.get("broadcast_dimensions", range(len(shape))), shape))
        axes = zip(self.flow.terms[result], self.flow.program.shape(result))
        copied = self.live(axis for dim, (axis, size) in enumerate(axes) if sizes.get(dim, 1) == 1 != size)
        return dataclasses.replace(zero, atoms=zero.atoms - copied)


_COPYING = {
    *("add", "sub", "add_any", "mul", "div", "rem", "max", "min", "pow", "and", "or", "select_n", "clamp"),
    *("broadcast_in_dim", "tile"),
}
"""Operations that copy operands along axes of size one, or along new ones."""
_CARRY_CONSTANT = {
    *("convert_element_type", "broadcast_in_dim", "copy", "reshape", "transpose", "squeeze", "slice"),
    *("concatenate", "stack", "pad"),
}


def _constant(eqn: Equation, operands: list[Zero]) -> Any:
    """The one number that a result consists of, if that is known."""
    if eqn.name == "gather":
        filled = eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP
        return None if filled else operands[0].constant
    constants = {o.constant for o in operands} if eqn.name in _CARRY_CONSTANT else set()
    return constants.pop() if len(constants) == 1 else None


def _number(array: Any) -> Zero:
    """What is known of an array that is part of the program."""
    number = _single_number(array)
    return Zero(frozenset(), number, isinstance(number, int | float) and number >= 0)


def _single_number(array: Any) -> Any:
    if np.ndim(array) == 0:
        try:
            return np.asarray(array).item()
        except (TypeError, ValueError):
            return None
    return None


def _body(zeros: ZeroPass, eqn: Equation, index: int, inputs: Sequence[Zero]) -> list[Zero]:
    follows_sums = zeros.follows_sums and eqn.name not in OWN_DERIVATIVES
    return ZeroPass(zeros.flow.bodies[id(eqn)][index], inputs, zeros.findings, follows_sums).results


@zero_rule("custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2", "shard_map")
def _call(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    if not eqn.bodies:
        return [Zero(frozenset())] * len(eqn.outputs)
    return _body(zeros, eqn, 0, operands)


@zero_rule("cond")
def _cond(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    branches = [_body(zeros, eqn, index, operands[1:]) for index in range(len(eqn.bodies))]
    return [_both(*results) for results in zip(*branches)]


def _both(*found: Zero) -> Zero:
    atoms = frozenset.intersection(*(z.atoms for z in found))
    return Zero(atoms, never_negative=all(z.never_negative for z in found))


@zero_rule("scan")
def _scan(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    consts, carry, stacked = scan_parts(eqn, operands)
    carry = _initial(zeros, scan_parts(eqn, eqn.inputs)[1], carry)
    while True:
        results = _body(zeros, eqn, 0, [*consts, *carry, *stacked])
        new_carry, rows = scan_results(eqn, results)
        narrowed = [_both(x, y) for x, y in zip(carry, new_carry)]
        if narrowed == carry:
            return [*carry, *rows]
        carry = narrowed


@zero_rule("while")
def _while(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    of_condition, of_body, carry = while_parts(eqn, operands)
    carry = _initial(zeros, while_parts(eqn, eqn.inputs)[2], carry)
    while True:
        results = _body(zeros, eqn, 1, [*of_body, *carry])
        narrowed = [_both(x, y) for x, y in zip(carry, results)]
        if narrowed == carry:
            _body(zeros, eqn, 0, [*of_condition, *carry])
            return carry
        carry = narrowed


def _initial(zeros: ZeroPass, operands: Sequence[Operand], found: Sequence[Zero]) -> list[Zero]:
    """A carry changes: no constant, but zero where it starts as zero, until a step shows otherwise."""
    return [
        Zero(frozenset(zeros.live(zeros.term(o)) if z.constant == 0 else z.atoms), None, z.never_negative)
        for o, z in zip(operands, found)
    ]

"""The zero pass: which values are exactly zero at the pruned units of an axis, and where that matters.

Coupling alone is unsound: a sum over an axis equals the sum over the kept units only if the summand is zero at the
pruned ones. Parameters are (masks zero them); `exp(x)` or a BatchNorm mean is not. Every prunable axis that is summed
over while no operand is zero there is reported, to be frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sculpt.tracing.axes import Atom
from sculpt.tracing.program import Equation, Literal, Operand
from sculpt.tracing.rules import Flow, because

_KEEP_ZERO = set(
    "neg abs sign tanh sin tan sqrt cbrt square erf floor ceil round expm1 log1p asin atan sinh asinh atanh "
    "convert_element_type copy copy_p reduce_precision real imag stop_gradient reshape transpose "
    "squeeze slice rev split reduce_sum reduce_max reduce_min reduce_window_sum cumsum".split()
)
_INTERSECT = {"add", "sub", "add_any", "max", "min", "select_n", "or", "clamp"}


@dataclasses.dataclass(frozen=True)
class _Zero:
    atoms: frozenset[Atom]
    """Free atoms at whose pruned units the value is exactly zero."""
    constant: Any = None
    """The value itself where it is one number known beforehand."""


def unsound_atoms(flow: Flow, zero_inputs: Iterable[int]) -> dict[Atom, str]:
    """Finds the prunable atoms that some operation mixes while their pruned units are not zero.

    Args:
      flow: the finished axis flow.
      zero_inputs: ids of the values that masks zero (the parameters).

    Returns:
      atom -> reason why it must be frozen.
    """
    return _ZeroPass(flow, zero_inputs).run()


class _ZeroPass:
    def __init__(self, flow: Flow, zero_inputs: Iterable[int]) -> None:
        self.flow = flow
        self.unsound: dict[Atom, str] = {}
        self.zeros: dict[int, _Zero] = {}
        for value in flow.program.inputs:
            self.zeros[value] = _Zero(frozenset())
        for value in zero_inputs:
            self.zeros[value] = _Zero(frozenset(self.live(flow.terms[value])))
        for value, array in flow.program.constants.items():
            self.zeros[value] = _Zero(frozenset(), _single_number(array))

    def live(self, term: Iterable[Any]) -> set[Atom]:
        axes = self.flow.axes
        return {a for axis in term for a in axes.atoms(axis) if axes.frozen(a) is None}

    def read(self, operand: Operand) -> _Zero:
        if isinstance(operand, Literal):
            return _Zero(frozenset(), _single_number(operand.value))
        return self.zeros[operand]

    def term(self, operand: Operand) -> Any:
        return () if isinstance(operand, Literal) else self.flow.terms[operand]

    def run(self) -> dict[Atom, str]:
        for eqn in self.flow.program.equations:
            operands = [self.read(o) for o in eqn.inputs]
            atoms = self.result(eqn, operands)
            constant = operands[0].constant if eqn.name in _CARRY_CONSTANT and operands else None
            for output in eqn.outputs:
                self.zeros[output] = _Zero(frozenset(atoms & self.live(self.flow.terms[output])), constant)
        return self.unsound

    def result(self, eqn: Equation, operands: list[_Zero]) -> set[Atom]:
        name = eqn.name
        if name in ("dot_general", "conv_general_dilated"):
            return self.contraction(eqn, operands)
        if name == "reduce_sum":
            summed = [self.term(eqn.inputs[0])[d] for d in eqn.params["axes"]]
            self.require(self.live(summed), operands[0].atoms, because(eqn, "summed over while not zero"))
        if name in _KEEP_ZERO:
            return set(operands[0].atoms)
        if name == "broadcast_in_dim":
            mapped = eqn.params["broadcast_dimensions"]
            new = [a for d, a in enumerate(self.flow.terms[eqn.outputs[0]]) if d not in mapped]
            return set(operands[0].atoms) - self.live(new)
        if name in ("mul", "and"):
            return set().union(*(o.atoms for o in operands))
        if name == "div":
            return set(operands[0].atoms)
        if name == "integer_pow":
            return set(operands[0].atoms) if eqn.params["y"] > 0 else set()
        if name == "pow":
            exponent = operands[1].constant
            return set(operands[0].atoms) if exponent is not None and exponent > 0 else set()
        if name in _INTERSECT:
            return self.intersection(eqn, operands)
        if name in ("concatenate", "pad"):
            return self.joined(eqn, operands)
        return set()

    def intersection(self, eqn: Equation, operands: list[_Zero]) -> set[Atom]:
        name = eqn.name
        if name == "clamp":
            low, x, high = operands
            bounds = (low.constant, high.constant)
            return set(x.atoms) if None not in bounds and bounds[0] <= 0 <= bounds[1] else set()
        considered = operands[1:] if name == "select_n" else operands
        harmless = {"max": lambda c: c <= 0, "min": lambda c: c >= 0}.get(name, lambda c: c == 0)
        sets = [o.atoms for o in considered if o.constant is None or not harmless(o.constant)]
        if not sets:
            return self.live(self.flow.terms[eqn.outputs[0]])
        return set(frozenset.intersection(*sets))

    def joined(self, eqn: Equation, operands: list[_Zero]) -> set[Atom]:
        atoms = self.live(self.flow.terms[eqn.outputs[0]])
        if eqn.name == "pad":
            source = self.live(self.term(eqn.inputs[0]))
            padded_with_zero = operands[1].constant == 0
            padding = self.padding_atoms(eqn)
            return {
                a
                for a in atoms
                if (a not in source or a in operands[0].atoms) and (a not in padding or padded_with_zero)
            }
        return {
            a
            for a in atoms
            if all(a in z.atoms for o, z in zip(eqn.inputs, operands) if a in self.live(self.term(o)))
        }

    def padding_atoms(self, eqn: Equation) -> set[Atom]:
        found: set[Atom] = set()
        axes = self.flow.axes
        for axis, (low, high, interior) in zip(self.flow.terms[eqn.outputs[0]], eqn.params["padding_config"]):
            if (low or high) and low >= 0 and high >= 0 and not interior:
                reason = because(eqn, "padding inside a product of axes")
                head, rest = axes.cut(axis, low, reason)
                tail = axes.cut(rest, axes.size(rest) - high, reason)[1]
                found |= self.live((head, tail))
        return found

    def contraction(self, eqn: Equation, operands: list[_Zero]) -> set[Atom]:
        lhs, rhs = (self.term(o) for o in eqn.inputs)
        if eqn.name == "dot_general":
            (lhs_sum, rhs_sum), (lhs_batch, _) = eqn.params["dimension_numbers"]
            shared = self.live(lhs[i] for i in lhs_batch)
            lhs_free = self.live(a for d, a in enumerate(lhs) if d not in (*lhs_sum, *lhs_batch))
            rhs_batch = eqn.params["dimension_numbers"][1][1]
            rhs_free = self.live(a for d, a in enumerate(rhs) if d not in (*rhs_sum, *rhs_batch))
            summed = self.live([lhs[i] for i in lhs_sum] + [rhs[i] for i in rhs_sum])
        else:
            numbers = eqn.params["dimension_numbers"]
            shared = set()
            lhs_free = self.live([lhs[numbers.lhs_spec[0]]])
            rhs_free = self.live([rhs[numbers.rhs_spec[0]]])
            summed = self.live([rhs[numbers.rhs_spec[1]]])
        self.require(
            summed, operands[0].atoms | operands[1].atoms, because(eqn, "contracted over while not zero")
        )
        result: set[Atom] = set()
        for atom in shared | lhs_free | rhs_free:
            left, right = atom in operands[0].atoms, atom in operands[1].atoms
            if atom in shared and (left or right):
                result.add(atom)
            elif (atom not in lhs_free or left) and (atom not in rhs_free or right) and atom not in shared:
                result.add(atom)
        return result

    def require(self, atoms: set[Atom], zero: Iterable[Atom], reason: str) -> None:
        for atom in atoms - set(zero):
            self.unsound.setdefault(atom, reason)


_CARRY_CONSTANT = {"convert_element_type", "broadcast_in_dim", "copy", "reshape"}


def _single_number(array: Any) -> Any:
    if np.ndim(array) == 0 and not isinstance(array, Mapping):
        try:
            return np.asarray(array).item()
        except (TypeError, ValueError):
            return None
    return None

"""The zero pass: which values are exactly zero at the pruned units of an axis, and where that matters.

Coupling alone is unsound: a sum over an axis equals the sum over the kept units only if the summand is zero at the
pruned ones. Parameters are (masks zero them); `exp(x)` or a BatchNorm mean is not. Every prunable axis that is summed
over while no operand is zero there is reported, to be frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from sculpt.tracing.axes import Atom
from sculpt.tracing.flow import Flow, because
from sculpt.tracing.program import Equation, Literal, Operand


@dataclasses.dataclass(frozen=True)
class Zero:
    """What is known of the zeros of one value."""

    atoms: frozenset[Atom]
    """Free atoms at whose pruned units the value is exactly zero."""
    constant: Any = None
    """The value itself where it is one number known beforehand."""


ZeroRule = Callable[["ZeroPass", Equation, list[Zero]], Iterable[Atom]]
ZERO_RULES: dict[str, ZeroRule] = {}
"""Primitive name -> rule that gives the atoms at which the result is zero; without a rule, none."""


def zero_rule(*names: str) -> Callable[[ZeroRule], ZeroRule]:
    """Registers a zero rule for primitives of these names."""

    def register(function: ZeroRule) -> ZeroRule:
        for name in names:
            ZERO_RULES[name] = function
        return function

    return register


def unsound_atoms(flow: Flow, zero_inputs: Iterable[int]) -> dict[Atom, str]:
    """Finds the prunable atoms that some operation mixes while their pruned units are not zero.

    Args:
      flow: the finished axis flow.
      zero_inputs: ids of the values that masks zero (the parameters).

    Returns:
      atom -> reason why it must be frozen.
    """
    unsound: dict[Atom, str] = {}
    masked = set(zero_inputs)
    inputs = [
        Zero(frozenset(live(flow, flow.terms[value]) if value in masked else ()))
        for value in flow.program.inputs
    ]
    ZeroPass(flow, inputs, unsound)
    return unsound


def live(flow: Flow, term: Iterable[Any]) -> set[Atom]:
    """The free atoms of a term that are not frozen."""
    axes = flow.axes
    return {a for axis in term for a in axes.atoms(axis) if axes.frozen(a) is None}


class ZeroPass:
    """The zeros of all values of a program, found in order of its equations."""

    def __init__(self, flow: Flow, inputs: Sequence[Zero], unsound: dict[Atom, str]) -> None:
        self.flow = flow
        self.unsound = unsound
        self.zeros: dict[int, Zero] = dict(zip(flow.program.inputs, inputs, strict=True))
        for value, array in flow.program.constants.items():
            self.zeros[value] = Zero(frozenset(), _single_number(array))
        for eqn in flow.program.equations:
            self._step(eqn)

    @property
    def results(self) -> list[Zero]:
        """Zeros of the program's outputs."""
        return [self.read(o) for o in self.flow.program.outputs]

    def live(self, term: Iterable[Any]) -> set[Atom]:
        return live(self.flow, term)

    def read(self, operand: Operand) -> Zero:
        if isinstance(operand, Literal):
            return Zero(frozenset(), _single_number(operand.value))
        return self.zeros[operand]

    def term(self, operand: Operand) -> Any:
        return () if isinstance(operand, Literal) else self.flow.terms[operand]

    def require(self, atoms: set[Atom], zero: Iterable[Atom], reason: str) -> None:
        """Reports those of `atoms` that are not among `zero`."""
        for atom in atoms - set(zero):
            self.unsound.setdefault(atom, reason)

    def _step(self, eqn: Equation) -> None:
        operands = [self.read(o) for o in eqn.inputs]
        if eqn.name in _SIDE_BY_SIDE:
            operands = [self._spread(eqn, o, zero) for o, zero in zip(eqn.inputs, operands)]
        if eqn.bodies and not self.flow.program.is_table(eqn):
            results = _BODY_RULES[eqn.name](self, eqn, operands)
        else:
            zero = None if self.flow.program.is_table(eqn) else ZERO_RULES.get(eqn.name)
            atoms = frozenset(() if zero is None else zero(self, eqn, operands))
            constant = _constant(eqn, operands)
            results = [Zero(atoms, constant)] * len(eqn.outputs)
            if eqn.name == "top_k":
                results[1] = Zero(frozenset())
        for output, found in zip(eqn.outputs, results, strict=True):
            alive = self.live(self.flow.terms[output])
            everywhere = found.constant is not None and found.constant == 0
            self.zeros[output] = Zero(frozenset(alive if everywhere else found.atoms & alive), found.constant)

    def _spread(self, eqn: Equation, operand: Operand, zero: Zero) -> Zero:
        """An operand that is copied along axes of size one: not zero at the pruned units of those, even where another axis of
        it has the same atom."""
        shape, result = self.flow.program.shape(operand), self.flow.program.shape(eqn.outputs[0])
        term = self.flow.terms[eqn.outputs[0]]
        copied = (
            [axis for axis, a, b in zip(term, shape, result) if a != b] if len(shape) == len(result) else []
        )
        return dataclasses.replace(zero, atoms=zero.atoms - self.live(copied)) if copied else zero


_SIDE_BY_SIDE = {
    *("add", "sub", "add_any", "mul", "div", "rem", "max", "min", "pow", "and", "or", "select_n", "clamp"),
}
"""Operations on each place of several operands, which may be of size one along some axes."""
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


def _single_number(array: Any) -> Any:
    if np.ndim(array) == 0:
        try:
            return np.asarray(array).item()
        except (TypeError, ValueError):
            return None
    return None


@zero_rule(
    *"neg abs sign tanh sin tan sqrt cbrt square erf floor ceil round expm1 log1p asin atan sinh asinh atanh fft "
    "convert_element_type copy copy_p name reshard sharding_constraint layout_constraint reduce_precision real imag stop_gradient reshape transpose squeeze slice rev "
    "split unstack tile reduce_max reduce_min reduce_window_sum reduce_window_max reduce_window_min cumsum cumprod cummax cummin "
    "dynamic_slice".split()
)
def _kept(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    return operands[0].atoms


@zero_rule("gather")
def _gather(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    # Places out of bounds are filled with NaN by default, in the masked network as in the compact one.
    filled = eqn.params.get("fill_value")
    return operands[0].atoms if filled is None or filled == 0 or filled != filled else ()


@zero_rule("top_k")
def _top_k(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    """Of the values; places, the second result, are numbers of their own."""
    return operands[0].atoms


@zero_rule("optimization_barrier", "device_put")
def _each_as_it_is(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    parts = [(zeros.live(zeros.term(o)), z.atoms) for o, z in zip(eqn.inputs, operands)]
    return frozenset().union(*(z for _, z in parts)) - frozenset().union(*(live - z for live, z in parts))


@zero_rule("sort")
def _sort(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    return frozenset.intersection(*(o.atoms for o in operands))


@zero_rule("reduce_sum")
def _reduce_sum(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    summed = [zeros.term(eqn.inputs[0])[d] for d in eqn.params["axes"]]
    zeros.require(zeros.live(summed), operands[0].atoms, because(eqn, "summed over while not zero"))
    return operands[0].atoms


@zero_rule("broadcast_in_dim")
def _broadcast(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    # What is copied along an axis is not zero at that axis' pruned units, even where another axis of it has the same atom.
    term, shape = zeros.flow.terms[eqn.outputs[0]], eqn.params["shape"]
    sizes = dict(zip(eqn.params["broadcast_dimensions"], zeros.flow.program.shape(eqn.inputs[0])))
    new = [axis for d, axis in enumerate(term) if d not in sizes or sizes[d] != shape[d]]
    return operands[0].atoms - zeros.live(new)


@zero_rule("mul", "and")
def _product(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    return frozenset().union(*(o.atoms for o in operands))


@zero_rule("div", "rem")
def _numerator(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    _undefined(zeros, eqn, operands[1])
    return operands[0].atoms


@zero_rule("rsqrt", "log", "lgamma", "digamma")
def _undefined_at_zero(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    _undefined(zeros, eqn, operands[0])
    return ()


def _undefined(zeros: ZeroPass, eqn: Equation, operand: Zero) -> None:
    """A masked unit would be 0 / 0 there, and NaN in everything that it is added to."""
    zeros.require(set(operand.atoms), (), because(eqn, "must not be zero"))


@zero_rule("integer_pow")
def _integer_power(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    if eqn.params["y"] < 0:
        _undefined(zeros, eqn, operands[0])
    return operands[0].atoms if eqn.params["y"] > 0 else ()


@zero_rule("pow")
def _power(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    exponent = operands[1].constant
    if exponent is not None and exponent > 0:
        return operands[0].atoms
    _undefined(zeros, eqn, operands[0])
    return ()


_HARMLESS: dict[str, Callable[[Any], bool]] = {"max": lambda c: c <= 0, "min": lambda c: c >= 0}


@zero_rule(
    "add", "sub", "add_any", "max", "min", "select_n", "or", "dynamic_update_slice", "scatter", "scatter-add"
)
def _all_zero(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    if eqn.name.startswith("scatter"):
        considered = [operands[0], operands[2]]
    elif eqn.name == "dynamic_update_slice":
        considered = operands[:2]
    else:
        considered = operands[1:] if eqn.name == "select_n" else operands
    harmless = _HARMLESS.get(eqn.name, lambda c: c == 0)
    sets = [o.atoms for o in considered if o.constant is None or not harmless(o.constant)]
    return frozenset.intersection(*sets) if sets else zeros.live(zeros.flow.terms[eqn.outputs[0]])


@zero_rule("clamp")
def _clamp(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    low, x, high = operands
    if low.constant is None or high.constant is None:
        return ()
    return x.atoms if low.constant <= 0 <= high.constant else ()


@zero_rule("concatenate", "stack")
def _concatenate(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    parts = [(zeros.live(zeros.term(o)), z) for o, z in zip(eqn.inputs, operands)]
    return [
        a
        for a in zeros.live(zeros.flow.terms[eqn.outputs[0]])
        if all(a in z.atoms for atoms, z in parts if a in atoms)
    ]


@zero_rule("pad")
def _pad(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    atoms = zeros.live(zeros.flow.terms[eqn.outputs[0]])
    source = zeros.live(zeros.term(eqn.inputs[0]))
    padding = _padding_atoms(zeros, eqn) if operands[1].constant != 0 else set()
    return [a for a in atoms if (a not in source or a in operands[0].atoms) and a not in padding]


def _padding_atoms(zeros: ZeroPass, eqn: Equation) -> set[Atom]:
    found: set[Atom] = set()
    axes = zeros.flow.axes
    for axis, (low, high, interior) in zip(zeros.flow.terms[eqn.outputs[0]], eqn.params["padding_config"]):
        if (low or high) and low >= 0 and high >= 0 and not interior:
            reason = because(eqn, "padding inside a product of axes")
            head, rest = axes.cut(axis, low, reason)
            tail = axes.cut(rest, axes.size(rest) - high, reason)[1]
            found |= zeros.live((head, tail))
    return found


@zero_rule("dot_general")
def _dot_general(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    lhs, rhs = (zeros.term(o) for o in eqn.inputs)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    shared = zeros.live(lhs[i] for i in lhs_batch)
    lhs_free = zeros.live(a for d, a in enumerate(lhs) if d not in (*lhs_sum, *lhs_batch))
    rhs_free = zeros.live(a for d, a in enumerate(rhs) if d not in (*rhs_sum, *rhs_batch))
    summed = zeros.live([lhs[i] for i in lhs_sum] + [rhs[i] for i in rhs_sum])
    return _contraction(zeros, eqn, operands, summed, shared, lhs_free, rhs_free)


@zero_rule("conv_general_dilated")
def _convolution(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Iterable[Atom]:
    lhs, rhs = (zeros.term(o) for o in eqn.inputs)
    numbers = eqn.params["dimension_numbers"]
    features, outputs = zeros.live([lhs[numbers.lhs_spec[1]]]), zeros.live([rhs[numbers.rhs_spec[0]]])
    summed = zeros.live([rhs[numbers.rhs_spec[1]]])
    # Groups are features and outputs at once.
    shared = (features & outputs) - summed
    lhs_free = zeros.live([lhs[numbers.lhs_spec[0]]])
    return _contraction(zeros, eqn, operands, summed, shared, lhs_free, outputs - shared)


def _contraction(
    zeros: ZeroPass,
    eqn: Equation,
    operands: list[Zero],
    summed: set[Atom],
    shared: set[Atom],
    lhs_free: set[Atom],
    rhs_free: set[Atom],
) -> Iterable[Atom]:
    left, right = (o.atoms for o in operands)
    zeros.require(summed, left | right, because(eqn, "contracted over while not zero"))
    kept = (
        (shared & (left | right)) | {a for a in lhs_free if a in left} | {a for a in rhs_free if a in right}
    )
    # An atom free on both sides (x times x transposed) is zero on its two axes only if both operands are.
    return {a for a in kept if a not in lhs_free & rhs_free or a in left & right}


BodyRule = Callable[[ZeroPass, Equation, list[Zero]], list[Zero]]


def _body(zeros: ZeroPass, eqn: Equation, index: int, inputs: Sequence[Zero]) -> list[Zero]:
    return ZeroPass(zeros.flow.bodies[id(eqn)][index], inputs, zeros.unsound).results


def _call(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    return _body(zeros, eqn, 0, operands)


def _cond(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    branches = [_body(zeros, eqn, index, operands[1:]) for index in range(len(eqn.bodies))]
    return [_both(*results) for results in zip(*branches)]


def _both(*found: Zero) -> Zero:
    return Zero(frozenset.intersection(*(z.atoms for z in found)))


def _scan(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    first, count = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, stacked = operands[:first], operands[first + count :]
    carry = _initial(zeros, eqn.inputs[first : first + count], operands[first : first + count])
    while True:
        results = _body(zeros, eqn, 0, [*consts, *carry, *stacked])
        narrowed = [_both(x, y) for x, y in zip(carry, results)]
        if narrowed == carry:
            return [*carry, *results[count:]]
        carry = narrowed


def _while(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = _initial(zeros, eqn.inputs[first + second :], operands[first + second :])
    while True:
        results = _body(zeros, eqn, 1, [*operands[first : first + second], *carry])
        narrowed = [_both(x, y) for x, y in zip(carry, results)]
        if narrowed == carry:
            _body(zeros, eqn, 0, [*operands[:first], *carry])
            return carry
        carry = narrowed


def _initial(zeros: ZeroPass, operands: Sequence[Operand], found: Sequence[Zero]) -> list[Zero]:
    """A carry changes: no constant, but zero where it starts as zero, until a step shows otherwise."""
    return [
        Zero(frozenset(zeros.live(zeros.term(o)) if z.constant == 0 else z.atoms))
        for o, z in zip(operands, found)
    ]


_BODY_RULES: dict[str, BodyRule] = {
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "checkpoint": _call,
    "remat2": _call,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}

"""Zero rules of single primitives: where a result is zero, given where the operands are."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from sculpt.ir.program import Equation
from sculpt.tracing.axes import Atom
from sculpt.tracing.equal_units import find_slices
from sculpt.tracing.flow import because
from sculpt.tracing.rules import dot_numbers
from sculpt.tracing.zeros import Zero, ZeroPass, zero_rule


@zero_rule(
    *"neg abs sign tanh sin tan sqrt cbrt square erf floor ceil round expm1 log1p asin atan sinh asinh atanh fft "
    "convert_element_type copy copy_p name reshard sharding_constraint layout_constraint reduce_precision real imag "
    "stop_gradient broadcast_in_dim reshape transpose squeeze slice rev split unstack tile reduce_min "
    "pvary reduce_window_sum reduce_window_max reduce_window_min cumsum cumprod cummax cummin dynamic_slice".split()
)
def _kept(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    return operands[0].atoms


@zero_rule("gather")
def _gather(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    if id(eqn) in zeros.flow.picks:
        return operands[0].atoms
    # Places out of bounds are filled with NaN by default, in the masked network as in the compact one.
    filled = eqn.params.get("fill_value")
    if not (filled is None or filled == 0 or filled != filled):
        return frozenset()
    # Along the axes of the indices entries are picked, whichever atoms these axes have; but for those that both sides share.
    numbers = eqn.params["dimension_numbers"]
    result = zeros.flow.terms[eqn.outputs[0]]
    of_indices = [axis for d, axis in enumerate(result) if d not in numbers.offset_dims]
    picked = (a for d, a in enumerate(of_indices) if d not in numbers.start_indices_batching_dims)
    return operands[0].atoms - zeros.live(picked)


@zero_rule("top_k")
def _top_k(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> list[Zero]:
    """The largest values, and their places, which are numbers of their own."""
    return [Zero(operands[0].atoms), Zero(frozenset())]


@zero_rule("optimization_barrier", "device_put")
def _each_as_it_is(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    parts = [(zeros.live(zeros.term(o)), z.atoms) for o, z in zip(eqn.inputs, operands)]
    return frozenset().union(*(z for _, z in parts)) - frozenset().union(*(live - z for live, z in parts))


@zero_rule("sort")
def _sort(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    return frozenset.intersection(*(o.atoms for o in operands))


@zero_rule("reduce_sum")
def _reduce_sum(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    summed = zeros.live(zeros.term(eqn.inputs[0])[d] for d in eqn.params["axes"])
    zeros.findings.sums.pop(id(eqn), None)
    mixed = summed - operands[0].atoms
    if mixed and zeros.follows_sums:
        slices, mixed = find_slices(zeros, eqn, mixed)
        zeros.findings.sums[id(eqn)] = slices
    zeros.require(mixed, (), because(eqn, "summed over while not zero"))
    return operands[0].atoms


@zero_rule("reduce_max")
def _reduce_max(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    reduced = zeros.live(zeros.term(eqn.inputs[0])[d] for d in eqn.params["axes"])
    smallest = operands[0].atoms if operands[0].never_negative else ()
    zeros.require(reduced, smallest, because(eqn, "reduced over by other than a sum"))
    return operands[0].atoms


@zero_rule("mul", "and")
def _product(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    return frozenset().union(*(o.atoms for o in operands))


@zero_rule("div", "rem")
def _numerator(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    _undefined(zeros, eqn, operands[1])
    return operands[0].atoms


@zero_rule("rsqrt", "log", "lgamma", "digamma")
def _undefined_at_zero(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    _undefined(zeros, eqn, operands[0])
    return frozenset()


def _undefined(zeros: ZeroPass, eqn: Equation, operand: Zero) -> None:
    """A masked unit would be 0 / 0 there, and NaN in everything that it is added to."""
    zeros.require(set(operand.atoms), (), because(eqn, "must not be zero"))


@zero_rule("integer_pow")
def _integer_power(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    if eqn.params["y"] < 0:
        _undefined(zeros, eqn, operands[0])
    return operands[0].atoms if eqn.params["y"] > 0 else frozenset()


@zero_rule("pow")
def _power(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    exponent = operands[1].constant
    if exponent is not None and exponent > 0:
        return operands[0].atoms
    _undefined(zeros, eqn, operands[0])
    return frozenset()


_HARMLESS: dict[str, Callable[[Any], bool]] = {"max": lambda c: c <= 0, "min": lambda c: c >= 0}


@zero_rule(
    "add", "sub", "add_any", "max", "min", "select_n", "or", "dynamic_update_slice", "scatter", "scatter-add"
)
def _all_zero(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    if eqn.name.startswith("scatter"):
        considered = [operands[0], operands[2]]
    elif eqn.name == "dynamic_update_slice":
        considered = operands[:2]
    else:
        considered = operands[1:] if eqn.name == "select_n" else operands
    harmless = _HARMLESS.get(eqn.name, lambda c: c == 0)
    sets = [o.atoms for o in considered if o.constant is None or not harmless(o.constant)]
    if sets:
        return frozenset.intersection(*sets)
    # Of harmless constants alone the result is zero where one of them is: not the larger of -1 and -2.
    anywhere = any(o.constant == 0 for o in considered)
    return zeros.live(zeros.flow.terms[eqn.outputs[0]]) if anywhere else frozenset()


@zero_rule("clamp")
def _clamp(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    low, x, high = operands
    if low.constant is None or high.constant is None:
        return frozenset()
    return x.atoms if low.constant <= 0 <= high.constant else frozenset()


@zero_rule("concatenate", "stack")
def _concatenate(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    parts = [(zeros.live(zeros.term(o)), z) for o, z in zip(eqn.inputs, operands)]
    return {
        a
        for a in zeros.live(zeros.flow.terms[eqn.outputs[0]])
        if all(a in z.atoms for atoms, z in parts if a in atoms)
    }


@zero_rule("pad")
def _pad(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    atoms = zeros.live(zeros.flow.terms[eqn.outputs[0]])
    source = zeros.live(zeros.term(eqn.inputs[0]))
    padding = _padding_atoms(zeros, eqn) if operands[1].constant != 0 else set()
    return {a for a in atoms if (a not in source or a in operands[0].atoms) and a not in padding}


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


@zero_rule("dot_general", "ragged_dot_general")
def _dot_general(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
    lhs, rhs = (zeros.term(o) for o in eqn.inputs[:2])
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dot_numbers(eqn)
    shared = zeros.live(lhs[i] for i in lhs_batch)
    lhs_free = zeros.live(a for d, a in enumerate(lhs) if d not in (*lhs_sum, *lhs_batch))
    rhs_free = zeros.live(a for d, a in enumerate(rhs) if d not in (*rhs_sum, *rhs_batch))
    summed = zeros.live([lhs[i] for i in lhs_sum] + [rhs[i] for i in rhs_sum])
    return _contraction(zeros, eqn, operands, summed, shared, lhs_free, rhs_free)


@zero_rule("conv_general_dilated")
def _convolution(zeros: ZeroPass, eqn: Equation, operands: list[Zero]) -> Set[Atom]:
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
) -> Set[Atom]:
    left, right = (o.atoms for o in operands[:2])
    zeros.require(summed, left | right, because(eqn, "contracted over while not zero"))
    kept = (
        (shared & (left | right)) | {a for a in lhs_free if a in left} | {a for a in rhs_free if a in right}
    )
    # An atom free on both sides (x times x transposed) is zero on its two axes only if both operands are.
    return {a for a in kept if a not in lhs_free & rhs_free or a in left & right}

"""Axis-flow rules of array operations: for each primitive, the axes of its results in terms of its operands' axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from sculpt.ir.program import Equation
from sculpt.tracing.axes import ONE, Axis, Term
from sculpt.tracing.flow import Flow, because, rule

WINDOW = "window of a convolution"
"""Why a kernel's spatial axes are frozen: units cannot go one by one, but a smaller window may be kept."""

ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj "
    "convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma "
    "igammac imag integer_pow is_finite layout_constraint le le_to lgamma log log1p logistic lt lt_to max min mul name ne "
    "neg nextafter not or polygamma population_count pow pvary real reduce_precision rem reshard round rsqrt select_n "
    "sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub "
    "tan tanh xor zeta"
).split()


@rule(*ELEMENTWISE)
def _elementwise(flow: Flow, eqn: Equation) -> list[Term]:
    (shape,) = flow.out_shapes(eqn)
    terms = [flow.term(o) for o in eqn.inputs]
    result: list[Axis] = []
    for dim, size in enumerate(shape):
        # Size-one dims and scalars broadcast implicitly; only the others are tied to the result.
        same = [t[dim] for t in terms if len(t) == len(shape) and flow.axes.size(t[dim]) == size]
        for other in same[1:]:
            flow.axes.unify(same[0], other, because(eqn, "axes of different structure meet"))
        result.append(ONE if size == 1 else same[0])
    return [tuple(result)]


@rule("bitcast_convert_type")
def _bitcast(flow: Flow, eqn: Equation) -> list[Term]:
    (shape,) = flow.out_shapes(eqn)
    # Wider or narrower numbers lose or gain a last axis.
    term = flow.term(eqn.inputs[0])[: len(shape)]
    return [(*term, *flow.fresh(shape[len(term) :], because(eqn, "parts of a number")))]


@rule("optimization_barrier", "device_put")
def _each_as_it_is(flow: Flow, eqn: Equation) -> list[Term]:
    return [flow.term(o) for o in eqn.inputs]


@rule("broadcast_in_dim")
def _broadcast(flow: Flow, eqn: Equation) -> list[Term]:
    (shape,) = flow.out_shapes(eqn)
    term = flow.term(eqn.inputs[0])
    result = list(flow.fresh(shape))
    for dim, target in enumerate(eqn.params["broadcast_dimensions"]):
        if flow.axes.size(term[dim]) == shape[target]:
            result[target] = term[dim]
    return [tuple(result)]


@rule("transpose")
def _transpose(flow: Flow, eqn: Equation) -> list[Term]:
    term = flow.term(eqn.inputs[0])
    return [tuple(term[d] for d in eqn.params["permutation"])]


@rule("squeeze")
def _squeeze(flow: Flow, eqn: Equation) -> list[Term]:
    term = flow.term(eqn.inputs[0])
    dropped = {d % len(term) for d in eqn.params["dimensions"]}
    return [tuple(a for d, a in enumerate(term) if d not in dropped)]


@rule("reshape")
def _reshape(flow: Flow, eqn: Equation) -> list[Term]:
    (shape,) = flow.out_shapes(eqn)
    term, old = flow.term(eqn.inputs[0]), flow.program.shape(eqn.inputs[0])
    if eqn.params["dimensions"] is not None:
        # Transposed first.
        term = tuple(term[d] for d in eqn.params["dimensions"])
        old = tuple(old[d] for d in eqn.params["dimensions"])
    reason = because(eqn, "reshape across coupled axes")
    if 0 in old:
        return [flow.fresh(shape, reason)]
    result: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(shape):
        # The shortest runs of old and new dims with equal products belong together.
        i_end, j_end = i, j
        before = after = 1
        while True:
            if i_end < len(old) and (before <= after or j_end == len(shape)):
                before *= old[i_end]
                i_end += 1
            else:
                after *= shape[j_end]
                j_end += 1
            if before == after and (i_end > i or j_end > j):
                break
        axis = flow.axes.merge(a for a in term[i:i_end] if flow.axes.size(a) != 1)
        rest = before
        for size in shape[j:j_end]:
            rest //= size
            head, axis = flow.axes.split(axis, size, rest, reason)
            result.append(head)
        i, j = i_end, j_end
    return [tuple(result)]


@rule("concatenate")
def _concatenate(flow: Flow, eqn: Equation) -> list[Term]:
    terms = [flow.term(o) for o in eqn.inputs]
    dim = eqn.params["dimension"]
    result = list(terms[0])
    for term in terms[1:]:
        for d, axis in enumerate(term):
            if d != dim:
                flow.axes.unify(result[d], axis, because(eqn, "axes of different structure meet"))
    result[dim] = tuple(s for term in terms for s in term[dim])
    return [tuple(result)]


@rule("stack")
def _stack(flow: Flow, eqn: Equation) -> list[Term]:
    terms = [flow.term(o) for o in eqn.inputs]
    for other in terms[1:]:
        flow.unify(terms[0], other, because(eqn, "axes of different structure meet"))
    dim = eqn.params["axis"]
    return [(*terms[0][:dim], ONE * len(terms), *terms[0][dim:])]


@rule("unstack")
def _unstack(flow: Flow, eqn: Equation) -> list[Term]:
    term, dim = flow.term(eqn.inputs[0]), eqn.params["axis"]
    flow.axes.freeze(term[dim], because(eqn, "taken apart unit by unit"))
    return [term[:dim] + term[dim + 1 :]] * len(eqn.outputs)


@rule("pad")
def _pad(flow: Flow, eqn: Equation) -> list[Term]:
    result = []
    for axis, (low, high, interior) in zip(flow.term(eqn.inputs[0]), eqn.params["padding_config"]):
        if low < 0 or high < 0 or interior:
            reason = because(eqn, "negative or interior padding")
            flow.axes.freeze(axis, reason)
            size = flow.axes.size(axis)
            result.append(flow.axes.fresh(size + low + high + interior * max(size - 1, 0), reason))
        else:
            result.append(flow.axes.fresh(low) + axis + flow.axes.fresh(high) if low or high else axis)
    return [tuple(result)]


@rule("slice")
def _slice(flow: Flow, eqn: Equation) -> list[Term]:
    strides = eqn.params["strides"]
    result = []
    for dim, axis in enumerate(flow.term(eqn.inputs[0])):
        start, limit = eqn.params["start_indices"][dim], eqn.params["limit_indices"][dim]
        stride = 1 if strides is None else strides[dim]
        size = flow.axes.size(axis)
        if stride != 1:
            units = np.arange(start, limit, stride)
            result.append(flow.pick(eqn, dim, units, because(eqn, "strided slice")))
        elif (start, limit) == (0, size):
            result.append(axis)
        else:
            reason = because(eqn, "slice inside a product of axes")
            head, _ = flow.axes.cut(axis, limit, reason)
            result.append(flow.axes.cut(head, start, reason)[1])
    return [tuple(result)]


@rule("split")
def _split(flow: Flow, eqn: Equation) -> list[Term]:
    term, dim = flow.term(eqn.inputs[0]), eqn.params["axis"]
    rest, results = term[dim], []
    for size in eqn.params["sizes"]:
        head, rest = flow.axes.cut(rest, size, because(eqn, "split inside a product of axes"))
        results.append(term[:dim] + (head,) + term[dim + 1 :])
    return results


@rule("reduce_sum")
def _reduce_sum(flow: Flow, eqn: Equation) -> list[Term]:
    # Whether a prunable axis may be summed over is decided by the zero pass.
    term = flow.term(eqn.inputs[0])
    return [tuple(a for d, a in enumerate(term) if d not in eqn.params["axes"])]


@rule("reduce_max")
def _reduce_max(flow: Flow, eqn: Equation) -> list[Term]:
    # Likewise; but the zero pass sees no derivatives.
    return _reduce_sum(flow, eqn) if flow.with_derivatives else _reduce_other(flow, eqn)


@rule("reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin")
def _reduce_other(flow: Flow, eqn: Equation) -> list[Term]:
    term = flow.term(eqn.inputs[0])
    for dim in eqn.params["axes"]:
        flow.axes.freeze(term[dim], because(eqn, "reduced over by other than a sum"))
    return [tuple(a for d, a in enumerate(term) if d not in eqn.params["axes"])]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(flow: Flow, eqn: Equation) -> list[Term]:
    term = flow.term(eqn.inputs[0])
    flow.axes.freeze(term[eqn.params["axis"]], because(eqn, "running over the axis"))
    return [term]


@rule("fft")
def _fourier(flow: Flow, eqn: Equation) -> list[Term]:
    (shape,) = flow.out_shapes(eqn)
    term, kept = flow.term(eqn.inputs[0]), len(shape) - len(eqn.params["fft_lengths"])
    reason = because(eqn, "transformed as a whole")
    flow.freeze(term[kept:], reason)
    return [(*term[:kept], *flow.fresh(shape[kept:], reason))]


@rule("rev")
def _reverse(flow: Flow, eqn: Equation) -> list[Term]:
    result = list(flow.term(eqn.inputs[0]))
    for dim in eqn.params["dimensions"]:
        units = np.arange(flow.axes.size(result[dim]))[::-1]
        result[dim] = flow.pick(eqn, dim, units, because(eqn, "order reversed"))
    return [tuple(result)]


@rule(
    "random_bits",
    "random_clone",
    "rng_uniform",
    "random_seed",
    "random_wrap",
    "random_unwrap",
    "random_fold_in",
    "random_split",
)
def _random(flow: Flow, eqn: Equation) -> list[Term]:
    return [flow.fresh(shape) for shape in flow.out_shapes(eqn)]


@rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumsum_window")
def _reduce_window(flow: Flow, eqn: Equation) -> list[Term]:
    (shape,) = flow.out_shapes(eqn)
    reason = because(eqn, "pooling window")
    result = []
    for dim, axis in enumerate(flow.term(eqn.inputs[0])):
        untouched = eqn.params["window_dimensions"][dim] == 1 and flow.axes.size(axis) == shape[dim]
        if untouched and eqn.params["window_strides"][dim] == 1 and not any(eqn.params["padding"][dim]):
            result.append(axis)
        else:
            flow.axes.freeze(axis, reason)
            result.append(flow.axes.fresh(shape[dim], reason))
    return [tuple(result)]


def dot_numbers(eqn: Equation) -> Any:
    """Of a matrix product, ragged or not: ((contracted axes of both operands), (batch axes of both))."""
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    return eqn.params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers


@rule("dot_general")
def _dot_general(flow: Flow, eqn: Equation) -> list[Term]:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dot_numbers(eqn)
    lhs, rhs = (flow.term(o) for o in eqn.inputs)
    reason = because(eqn, "axes of different structure meet")
    for i, j in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch)):
        flow.axes.unify(lhs[i], rhs[j], reason)
    batch = [lhs[i] for i in lhs_batch]
    lhs_free = [a for d, a in enumerate(lhs) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [a for d, a in enumerate(rhs) if d not in (*rhs_contract, *rhs_batch)]
    return [tuple(batch + lhs_free + rhs_free)]


@rule("ragged_dot_general")
def _ragged_dot(flow: Flow, eqn: Equation) -> list[Term]:
    """Rows in groups, each of which is multiplied by a matrix of its own: as `dot_general`, but for the axis of the matrices."""
    groups = eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    if not groups:
        return flow.unknown(eqn, "groups of what is summed over or of batches")
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dot_numbers(eqn)
    lhs, rhs, sizes = (flow.term(o) for o in eqn.inputs)
    for i, j in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch)):
        flow.axes.unify(lhs[i], rhs[j], because(eqn, "axes of different structure meet"))
    ragged = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
    flow.freeze((*sizes, *(lhs[d] for d in ragged), *(rhs[d] for d in groups)), because(eqn, "grouped"))
    lhs_free = [a for d, a in enumerate(lhs) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [a for d, a in enumerate(rhs) if d not in (*rhs_contract, *rhs_batch, *groups)]
    return [(*(lhs[i] for i in lhs_batch), *lhs_free, *rhs_free)]


@rule("conv_general_dilated")
def _conv(flow: Flow, eqn: Equation) -> list[Term]:
    if eqn.params["batch_group_count"] != 1:
        return flow.unknown(eqn, "batch groups")
    (shape,) = flow.out_shapes(eqn)
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs = (flow.term(o) for o in eqn.inputs)
    groups = eqn.params["feature_group_count"]
    features, inputs, outputs = lhs[numbers.lhs_spec[1]], rhs[numbers.rhs_spec[1]], rhs[numbers.rhs_spec[0]]
    reason = because(eqn, "axes of different structure meet")
    if groups > 1:
        size_in, size_out = flow.axes.size(features) // groups, flow.axes.size(outputs) // groups
        group_in, features = flow.axes.split(features, groups, size_in, reason)
        group_out, _ = flow.axes.split(outputs, groups, size_out, reason)
        flow.axes.unify(group_in, group_out, reason)
    flow.axes.unify(features, inputs, reason)
    result: list[Axis] = [ONE] * len(shape)
    result[numbers.out_spec[0]] = lhs[numbers.lhs_spec[0]]
    result[numbers.out_spec[1]] = outputs
    for i, j, k in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:]):
        flow.axes.freeze(lhs[i], because(eqn, "spatial axis of a convolution"))
        flow.axes.freeze(rhs[j], because(eqn, WINDOW))
        result[k] = flow.axes.fresh(shape[k], because(eqn, "spatial axis of a convolution"))
    return [tuple(result)]


@rule("tile")
def _tile(flow: Flow, eqn: Equation) -> list[Term]:
    pairs = zip(flow.term(eqn.inputs[0]), eqn.params["reps"])
    # What is copied along an axis of size one takes part in that axis as what is broadcast does.
    return [tuple(flow.axes.fresh(n) if flow.axes.size(axis) == 1 else axis * n for axis, n in pairs)]

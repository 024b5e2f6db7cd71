"""Axis-flow rules of indexing and ordering: whole axes pass through, indexed and sorted ones are frozen."""

from __future__ import annotations

import numpy as np
from jax.lax import GatherScatterMode

from sculpt.ir.interpreter import table_value
from sculpt.ir.program import Equation
from sculpt.tracing.axes import Axis, Term
from sculpt.tracing.flow import Flow, because, rule

_DIFFER = "axes of different structure meet"


@rule("gather")
def _gather(flow: Flow, eqn: Equation) -> list[Term]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (shape,) = flow.out_shapes(eqn)
    operand, indices = (flow.term(o) for o in eqn.inputs)
    reason = because(eqn, "indexed")
    picked = _picked_units(flow, eqn)
    if picked is not None:
        dim, units = picked
        window = [axis for d, axis in enumerate(operand) if d != dim]
        places = [d for d in range(len(shape)) if d not in numbers.offset_dims]
        window.insert(places[0], flow.pick(eqn, dim, units, reason))
        return [tuple(window)]
    flow.axes.freeze(indices[-1], reason)
    for x, y in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        flow.axes.unify(operand[x], indices[y], because(eqn, _DIFFER))
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window: list[Axis] = []
    for dim, axis in enumerate(operand):
        whole = sizes[dim] == flow.axes.size(axis) and dim not in numbers.start_index_map
        if not whole and dim not in numbers.operand_batching_dims:
            flow.axes.freeze(axis, reason)
        if dim not in dropped:
            window.append(axis if whole else flow.axes.fresh(sizes[dim], reason))
    batch = list(indices[:-1])
    return [tuple((window if d in numbers.offset_dims else batch).pop(0) for d in range(len(shape)))]


def _picked_units(flow: Flow, eqn: Equation) -> tuple[int, np.ndarray] | None:
    """The axis that a gather takes units of, and which, where the rest stays whole and the units are the same for every input."""
    numbers = eqn.params["dimension_numbers"]
    shape, places = flow.program.shape(eqn.inputs[0]), flow.program.shape(eqn.inputs[1])
    if len(places) != 2 or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (dim,) = numbers.start_index_map
    whole = (*shape[:dim], 1, *shape[dim + 1 :])
    if shape[dim] == 1 or numbers.collapsed_slice_dims != (dim,) or tuple(eqn.params["slice_sizes"]) != whole:
        return None
    index = table_value(flow.program, eqn.inputs[1])
    if index is None:
        return None
    units = index[:, 0].astype(np.int64)
    if eqn.params["mode"] == GatherScatterMode.CLIP:
        units = units.clip(0, shape[dim] - 1)
    return (dim, units) if ((units >= 0) & (units < shape[dim])).all() else None


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(flow: Flow, eqn: Equation) -> list[Term]:
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = (flow.term(o) for o in eqn.inputs)
    reason = because(eqn, "indexed")
    flow.axes.freeze(indices[-1], reason)
    for x, y in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims):
        flow.axes.unify(operand[x], indices[y], because(eqn, _DIFFER))
    windows = [updates[d] for d in numbers.update_window_dims]
    batch = [axis for d, axis in enumerate(updates) if d not in numbers.update_window_dims]
    for x, y in zip(batch, indices[:-1]):
        flow.axes.unify(x, y, because(eqn, _DIFFER))
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    for dim, axis in enumerate(operand):
        if dim in dropped:
            if dim in numbers.inserted_window_dims:
                flow.axes.freeze(axis, reason)
            continue
        window = windows.pop(0)
        whole = flow.axes.size(window) == flow.axes.size(axis)
        if whole and dim not in numbers.scatter_dims_to_operand_dims:
            flow.axes.unify(axis, window, because(eqn, _DIFFER))
        else:
            flow.freeze((axis, window), reason)
    return [operand]


@rule("dynamic_slice")
def _dynamic_slice(flow: Flow, eqn: Equation) -> list[Term]:
    result: list[Axis] = []
    for axis, size in zip(flow.term(eqn.inputs[0]), eqn.params["slice_sizes"]):
        if size == flow.axes.size(axis):
            result.append(axis)
        else:
            reason = because(eqn, "sliced at a place that is not known beforehand")
            flow.axes.freeze(axis, reason)
            result.append(flow.axes.fresh(size, reason))
    return [tuple(result)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(flow: Flow, eqn: Equation) -> list[Term]:
    operand, update = flow.term(eqn.inputs[0]), flow.term(eqn.inputs[1])
    for x, y in zip(operand, update):
        if flow.axes.size(x) == flow.axes.size(y):
            flow.axes.unify(x, y, because(eqn, _DIFFER))
        else:
            flow.freeze((x, y), because(eqn, "written at a place that is not known beforehand"))
    return [operand]


@rule("sort")
def _sort(flow: Flow, eqn: Equation) -> list[Term]:
    terms = [flow.term(o) for o in eqn.inputs]
    for other in terms[1:]:
        flow.unify(terms[0], other, because(eqn, _DIFFER))
    flow.axes.freeze(terms[0][eqn.params["dimension"]], because(eqn, "sorted"))
    return terms


@rule("top_k")
def _top_k(flow: Flow, eqn: Equation) -> list[Term]:
    term = flow.term(eqn.inputs[0])
    dims = [
        d
        for d, (old, new) in enumerate(zip(flow.program.shape(eqn.inputs[0]), flow.out_shapes(eqn)[0]))
        if old != new or d == eqn.params.get("axis", len(term) - 1) % len(term)
    ]
    reason = because(eqn, "sorted")
    for dim in dims:
        flow.axes.freeze(term[dim], reason)
    return [
        tuple(flow.axes.fresh(n, reason) if d in dims else term[d] for d, n in enumerate(shape))
        for shape in flow.out_shapes(eqn)
    ]

"""Splits a convolution whose filters keep different windows (`rect_grouped`) into several smaller convolutions.

Filters are sorted by window; each group is a convolution with a smaller kernel and less padding; the results are concatenated and,
where the channels could not be put in that order for good, put back in order. Kernels stay one array of the dense window, of which the
program reads the parts: zeros outside are never read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.interpreter import Executable
from sculpt.ir.program import Equation, FlatProgram

MIN_GROUP = 16
"""Filters that share a window are computed by themselves in multiples of it: what engines compute as fast as fewer."""
OVERHEAD = 16
"""A group costs as much as this many filters of its window more: every group reads the whole image. Measured in XLA on CPUs by
`benchmarks/bench_filter_groups.py`; `sculpt.measure_group_overheads` measures it for a network and an engine."""
_PARAMETER = "filter_groups"
_CASTS = ("convert_element_type", "copy")

Window = tuple[tuple[int, int], ...]
"""First position and the one past the last, along each axis of the window; (0, 0) where nothing stays."""


@dataclasses.dataclass(frozen=True)
class FilterGroup:
    """Filters that are computed together."""

    window: Window
    """What is read of their kernels; holds all that each of them keeps."""
    filters: tuple[int, ...]
    """Output channels, ascending."""

    def __str__(self) -> str:
        sides = "x".join(str(stop - start) for start, stop in self.window if stop > start)
        return f"{len(self.filters)} filters of {sides or 'nothing'}"


def group_filters(used: np.ndarray, overhead: int | None = OVERHEAD) -> tuple[FilterGroup, ...]:
    """Sorts filters into groups of multiples of `MIN_GROUP`; filters that keep nothing are not computed.

    What is left over at one window joins the smallest window around it at which enough is left over to make a group, or else the
    whole kernel. Then groups are put together where that costs less (see `OVERHEAD`).

    Args:
      used: boolean `[filters, *window]`: the positions at which a filter keeps anything.
      overhead: what a group costs beside its filters, in filters; None: more than it could save.

    Returns:
      The groups, by area; none where one convolution by the whole kernel costs no more.
    """
    if overhead is None:
        return ()
    whole: Window = tuple((0, n) for n in used.shape[1:])
    windows: dict[Window, list[int]] = {whole: []}
    for index, positions in enumerate(used):
        windows.setdefault(_bounds(positions), []).append(index)
    for one, other in itertools.combinations(filter(_area, tuple(windows)), 2):
        windows.setdefault(_around(one, other), [])
    by_area = sorted(windows, key=lambda window: (_area(window), window))
    for place, window in enumerate(by_area):
        surplus = len(windows[window]) % MIN_GROUP
        if surplus and _area(window) and window != whole:
            wider = (w for w in by_area[place + 1 :] if _holds(w, window))
            target = next((w for w in wider if _left_over(windows, w) >= MIN_GROUP), whole)
            windows[target] += windows[window][-surplus:]
            del windows[window][-surplus:]
    found = _merged({window: filters for window, filters in windows.items() if filters}, overhead)
    if _cost(found, overhead) >= _cost({whole: range(len(used))}, overhead):
        return ()
    return tuple(FilterGroup(w, tuple(sorted(found[w]))) for w in by_area if w in found)


def mask_groups(
    mask: np.ndarray, outputs: int, window_axes: Sequence[int], overhead: int | None = OVERHEAD
) -> tuple[FilterGroup, ...]:
    """`group_filters` of a kernel's mask, whose axis `outputs` is its filters."""
    others = tuple(d for d in range(mask.ndim) if d not in (outputs, *window_axes))
    used = np.transpose(mask.any(axis=others, keepdims=True), (outputs, *window_axes, *others))
    return group_filters(used.reshape(used.shape[: 1 + len(window_axes)]), overhead)


def in_order(groups: Sequence[FilterGroup]) -> tuple[FilterGroup, ...]:
    """The groups of filters that have been put in the order of the groups."""
    stops = list(itertools.accumulate(len(group.filters) for group in groups))
    return tuple(
        dataclasses.replace(group, filters=tuple(range(stop - len(group.filters), stop)))
        for group, stop in zip(groups, stops)
    )


def _merged(windows: dict[Window, list[int]], overhead: int) -> dict[Window, list[int]]:
    """Puts two groups together, those that save most by it, as long as any do."""
    merges = [windows]
    for one, other in itertools.combinations(filter(_area, sorted(windows)), 2):
        around = _around(one, other)
        rest = {w: filters for w, filters in windows.items() if w not in (one, other)}
        merges.append({**rest, around: windows[one] + windows[other] + rest.get(around, [])})
    best = min(merges, key=lambda merge: _cost(merge, overhead))
    return windows if best is windows else _merged(best, overhead)


def _cost(windows: Mapping[Window, Sequence[int]], overhead: int) -> int:
    """In filters of one position."""
    return sum(_area(window) * (len(filters) + overhead) for window, filters in windows.items())


def _bounds(positions: np.ndarray) -> Window:
    lines = [
        positions.any(axis=tuple(d for d in range(positions.ndim) if d != dim))
        for dim in range(positions.ndim)
    ]
    found = [np.flatnonzero(line) for line in lines]
    return tuple((int(f[0]), int(f[-1]) + 1) if len(f) else (0, 0) for f in found)


def _around(one: Window, other: Window) -> Window:
    return tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(one, other))


def _left_over(windows: Mapping[Window, Sequence[int]], outer: Window) -> int:
    """Filters beyond whole groups whose windows lie in `outer`."""
    return sum(len(filters) % MIN_GROUP for w, filters in windows.items() if _area(w) and _holds(outer, w))


def _area(window: Window) -> int:
    return math.prod(stop - start for start, stop in window)


def _holds(outer: Window, inner: Window) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner))


def split_convolutions(executable: Executable, groups: Mapping[int, Sequence[FilterGroup]]) -> Executable:
    """The executable whose convolutions by certain kernels are computed in groups by `convolve_in_groups`.

    Args:
      executable: a program; convolutions inside its bodies are computed as before.
      groups: for the value id of a kernel, an input of the program, the groups of its filters.
    """
    params = dict(executable.params)
    for eqn, kernel in convolutions_by(executable.program, groups):
        params[id(eqn)] = in_groups(params.get(id(eqn), eqn.params), groups[kernel])
    return dataclasses.replace(executable, params=params)


def convolutions_by(program: FlatProgram, kernels: Iterable[int]) -> Iterator[tuple[Equation, int]]:
    """The convolutions by certain kernels outside bodies, and the value id of the kernel, an input of the program."""
    origin = {kernel: kernel for kernel in kernels}
    for eqn in program.equations:
        if eqn.name in _CASTS and eqn.inputs[0] in origin:
            origin[eqn.outputs[0]] = origin[eqn.inputs[0]]  # type: ignore[index]
        elif eqn.name == "conv_general_dilated" and eqn.inputs[1] in origin:
            yield eqn, origin[eqn.inputs[1]]  # type: ignore[index]


def in_groups(params: Mapping[str, Any], groups: Sequence[FilterGroup]) -> dict[str, Any]:
    """The static parameters of a convolution that `bind_in_groups` computes in these groups."""
    return {**params, _PARAMETER: tuple(groups)}


Bind = Callable[[Equation, list[Any], dict[str, Any]], Any]


def bind_in_groups(bind: Bind) -> Bind:
    """`bind` that computes convolutions in groups where `split_convolutions` says so."""

    def grouped(eqn: Equation, operands: list[Any], params: dict[str, Any]) -> Any:
        if _PARAMETER not in params:
            return bind(eqn, operands, params)
        others = {name: value for name, value in params.items() if name != _PARAMETER}
        return _computed_in_groups(bind, eqn, operands, others, params[_PARAMETER])

    return grouped


def _computed_in_groups(
    bind: Bind, eqn: Equation, operands: list[Any], params: dict[str, Any], groups: Sequence[FilterGroup]
) -> Any:
    image, kernel = operands
    numbers, shape = params["dimension_numbers"], kernel.shape
    parts = []
    for group in groups:
        own = _picked(kernel, group.filters, numbers.rhs_spec[0])
        if not _area(group.window):
            dense = jax.eval_shape(lambda x, k: bind(eqn, [x, k], params), image, own)
            parts.append(jnp.zeros(dense.shape, dense.dtype))
            continue
        padding = []
        for dim, (start, stop), (low, high), dilation in zip(
            numbers.rhs_spec[2:], group.window, params["padding"], params["rhs_dilation"]
        ):
            own = jax.lax.slice_in_dim(own, start, stop, axis=dim)
            # What the kernel lost at an edge, the padding loses too (below zero it crops).
            padding.append((low - start * dilation, high - (shape[dim] - stop) * dilation))
        parts.append(bind(eqn, [image, own], {**params, "padding": tuple(padding)}))
    order = np.concatenate([group.filters for group in groups])
    joined = jnp.concatenate(parts, axis=numbers.out_spec[1])
    return _picked(joined, np.argsort(order), numbers.out_spec[1])


def _picked(array: Any, places: Sequence[int] | np.ndarray, axis: int) -> Any:
    """These places along an axis; neighbours as a slice, which costs less."""
    first, last = int(places[0]), int(places[0]) + len(places)
    if not np.array_equal(places, np.arange(first, last)):
        return jnp.take(array, np.asarray(places, np.int32), axis=axis, mode="clip")
    return array if len(places) == array.shape[axis] else jax.lax.slice_in_dim(array, first, last, axis=axis)

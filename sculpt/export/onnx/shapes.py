"""ONNX export of operations that move values. Axes of size one, and the order of axes, cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from sculpt.export.onnx.pointwise import common_order
from sculpt.export.onnx.windows import without
from sculpt.export.onnx.writer import Tensor, Unsupported, Writer, operation
from sculpt.ir.program import Equation

_LAST = np.iinfo(np.int64).max
"""Beyond the end of any axis."""


@operation("transpose")
def _transpose(writer: Writer, eqn: Equation) -> list[Tensor]:
    return [writer.tensor(eqn.inputs[0]).relabelled(eqn.params["permutation"])]


def squeezed(writer: Writer, x: Tensor, axes: Sequence[int]) -> Tensor:
    """Without axes of size one."""
    if not axes:
        return x
    order, shape = without(x, axes)
    if x.array is not None:
        return Tensor(None, tuple(range(len(shape))), shape, x.array.squeeze(tuple(axes)), x.label)
    places = sorted(x.place(d) for d in axes)
    return Tensor(writer.node("Squeeze", [writer.held(x, x.order), writer.integers(*places)]), order, shape)


def unsqueezed(writer: Writer, x: Tensor, targets: Sequence[int], rank: int) -> Tensor:
    """With axes of size one: axis `d` becomes axis `targets[d]` of `rank`. They are held last, which suits images."""
    new = [d for d in range(rank) if d not in targets]
    if not new:
        return x
    shape = tuple(x.shape[targets.index(d)] if d in targets else 1 for d in range(rank))
    if x.array is not None:
        return Tensor(None, tuple(range(rank)), shape, np.expand_dims(x.array, tuple(new)), x.label)
    places = writer.integers(*range(x.rank, rank))
    order = (*(targets[d] for d in x.order), *new)
    return Tensor(writer.node("Unsqueeze", [writer.held(x, x.order), places]), order, shape)


@operation("squeeze")
def _squeeze(writer: Writer, eqn: Equation) -> list[Tensor]:
    x = writer.tensor(eqn.inputs[0])
    return [squeezed(writer, x, [d % x.rank for d in eqn.params["dimensions"]])]


@operation("reshape")
def _reshape(writer: Writer, eqn: Equation) -> list[Tensor]:
    x = writer.tensor(eqn.inputs[0])
    if eqn.params["dimensions"] is not None:
        x = x.relabelled(eqn.params["dimensions"])
    return [reshaped(writer, x, writer.program.shape(eqn.outputs[0]))]


def reshaped(writer: Writer, x: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """The value in another shape."""
    wide = [d for d, n in enumerate(x.shape) if _is_wide(n)]
    targets = [d for d, n in enumerate(shape) if _is_wide(n)]
    if [x.shape[d] for d in wide] == [shape[d] for d in targets]:
        # Only axes of size one come and go: the order stays.
        return unsqueezed(
            writer, squeezed(writer, x, [d for d in range(x.rank) if d not in wide]), targets, len(shape)
        )
    name = writer.node("Reshape", [writer.held(x), writer.sizes(shape)])
    return Tensor(name, tuple(range(len(shape))), shape)


def _is_wide(size: Any) -> bool:
    return export.is_symbolic_dim(size) or size != 1


@operation("broadcast_in_dim")
def _broadcast(writer: Writer, eqn: Equation) -> list[Tensor]:
    shape = writer.program.shape(eqn.outputs[0])
    x = writer.tensor(eqn.inputs[0])
    x = unsqueezed(writer, x, list(eqn.params["broadcast_dimensions"]), len(shape))
    if x.shape == shape:
        return [x]
    # Expand keeps axes where it is told 1.
    wanted = [1 if x.shape[d] == shape[d] else shape[d] for d in x.order]
    name = writer.node("Expand", [writer.held(x, x.order), writer.expanded_sizes(wanted)])
    return [Tensor(name, x.order, shape)]


@operation("dim_as_value")
def _batch_size(writer: Writer, eqn: Equation) -> list[Tensor]:
    """A number of images, as a number."""
    size = writer.node("Squeeze", [writer.expanded_sizes([eqn.params["dim"]]), writer.integers(0)])
    return [Tensor(writer.node("Cast", [size], to=writer.dtype(eqn.outputs[0])), (), ())]


@operation("tile")
def _tile(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, repeats = writer.tensor(eqn.inputs[0]), eqn.params["reps"]
    name = writer.node(
        "Tile", [writer.held(x, x.order), writer.expanded_sizes([repeats[d] for d in x.order])]
    )
    return [Tensor(name, x.order, writer.program.shape(eqn.outputs[0]))]


@operation("concatenate")
def _concatenate(writer: Writer, eqn: Equation) -> list[Tensor]:
    tensors = [writer.tensor(o) for o in eqn.inputs]
    shape = writer.program.shape(eqn.outputs[0])
    order = _widest_order(tensors)
    names = [writer.held(t, order) for t in tensors]
    return [Tensor(writer.node("Concat", names, axis=order.index(eqn.params["dimension"])), order, shape)]


def _widest_order(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The order of the computed tensor with the fewest axes of size one: the others are cheap to turn."""
    computed = [t for t in tensors if t.array is None]
    widest = min(computed, key=lambda t: t.shape.count(1))
    return common_order([widest], widest.shape)


@operation("stack")
def _stack(writer: Writer, eqn: Equation) -> list[Tensor]:
    axis, shape = eqn.params["axis"], writer.program.shape(eqn.outputs[0])
    targets = [d for d in range(len(shape)) if d != axis]
    tensors = [unsqueezed(writer, writer.tensor(o), targets, len(shape)) for o in eqn.inputs]
    order = _widest_order(tensors)
    names = [writer.held(t, order) for t in tensors]
    return [Tensor(writer.node("Concat", names, axis=order.index(axis)), order, shape)]


def _split_into(writer: Writer, x: Tensor, axis: int, sizes: Sequence[int]) -> list[Tensor]:
    operands = [writer.held(x, x.order), writer.integers(*sizes)]
    names = writer.node_of("Split", operands, len(sizes), axis=x.place(axis))
    shapes = [(*x.shape[:axis], n, *x.shape[axis + 1 :]) for n in sizes]
    return [Tensor(name, x.order, shape) for name, shape in zip(names, shapes)]


@operation("split")
def _split(writer: Writer, eqn: Equation) -> list[Tensor]:
    return _split_into(writer, writer.tensor(eqn.inputs[0]), eqn.params["axis"], eqn.params["sizes"])


@operation("unstack")
def _unstack(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, axis = writer.tensor(eqn.inputs[0]), eqn.params["axis"]
    return [squeezed(writer, part, [axis]) for part in _split_into(writer, x, axis, [1] * x.shape[axis])]


def _cut(
    writer: Writer, x: Tensor, cuts: Mapping[int, tuple[int, int, int]], shape: tuple[Any, ...]
) -> Tensor:
    """A slice: axis -> start, end, step."""
    if not cuts:
        return x
    places = {x.place(axis): cut for axis, cut in cuts.items()}
    starts, ends, steps = (writer.integers(*(places[k][i] for k in sorted(places))) for i in range(3))
    operands = [writer.held(x, x.order), starts, ends, writer.integers(*sorted(places)), steps]
    return Tensor(writer.node("Slice", operands), x.order, shape)


@operation("slice")
def _slice(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, params = writer.tensor(eqn.inputs[0]), eqn.params
    steps = params["strides"] or (1,) * x.rank
    bounds = zip(params["start_indices"], params["limit_indices"], steps)
    cuts = {d: cut for d, cut in enumerate(bounds) if cut != (0, x.shape[d], 1)}
    if any(export.is_symbolic_dim(n) for cut in cuts.values() for n in cut):
        raise Unsupported("a slice that depends on the batch size")
    return [_cut(writer, x, cuts, writer.program.shape(eqn.outputs[0]))]


@operation("rev")
def _reverse(writer: Writer, eqn: Equation) -> list[Tensor]:
    x = writer.tensor(eqn.inputs[0])
    return [_cut(writer, x, dict.fromkeys(eqn.params["dimensions"], (-1, -_LAST, -1)), x.shape)]


@operation("dynamic_slice")
def _dynamic_slice(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, *starts = (writer.tensor(o) for o in eqn.inputs)
    if any(start.array is None for start in starts):
        raise Unsupported("a slice that begins where the images say")
    shape = writer.program.shape(eqn.outputs[0])
    cuts = {}
    for d, start in enumerate(starts):
        if x.shape[d] != shape[d]:
            first = int(np.clip(int(start.array), 0, x.shape[d] - shape[d]))  # type: ignore[arg-type]
            cuts[d] = (first, first + shape[d], 1)
    return [_cut(writer, x, cuts, shape)]


@operation("pad")
def _pad(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, value = (writer.tensor(o) for o in eqn.inputs)
    config = eqn.params["padding_config"]
    if any(interior for _, _, interior in config):
        raise Unsupported("padding between the elements")
    cropped = [n + min(low, 0) + min(high, 0) for n, (low, high, _) in zip(x.shape, config)]
    cuts = {
        d: (max(-low, 0), _LAST if high >= 0 else high, 1)
        for d, (low, high, _) in enumerate(config)
        if low < 0 or high < 0
    }
    x = _cut(writer, x, cuts, tuple(cropped))
    lows, highs = ([max(config[d][side], 0) for d in x.order] for side in (0, 1))
    if not any((*lows, *highs)):
        return [x]
    name = writer.node("Pad", [writer.held(x, x.order), writer.integers(*lows, *highs), writer.held(value)])
    return [Tensor(name, x.order, writer.program.shape(eqn.outputs[0]))]


@operation("gather")
def _gather(writer: Writer, eqn: Equation) -> list[Tensor]:
    """Slices and picks along axes at known places, as in `x[:, ::2, ::2]`, `x[:, 0]` or `x[:, order]`."""
    x, indices = (writer.tensor(o) for o in eqn.inputs)
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if indices.array is None:
        return [_looked_up(writer, eqn, x, indices)]
    if numbers.operand_batching_dims:
        raise Unsupported("a choice for each of a batch")
    places = indices.array
    # How the axes of the result come about: those of slices from the operand, the others from the indices.
    windows = [d for d in range(x.rank) if d not in numbers.collapsed_slice_dims]
    rank = len(writer.program.shape(eqn.outputs[0]))
    picked = [d for d in range(rank) if d not in numbers.offset_dims]
    source: dict[int, int] = dict(zip(numbers.offset_dims, windows))
    chosen: dict[int, np.ndarray] = {}
    for k, axis in enumerate(numbers.start_index_map):
        along, starts = _one_axis(places[..., k])
        if along is not None:
            if axis in windows or picked[along] in source:
                raise Unsupported("places that are no rows and columns")
            source[picked[along]] = axis
        chosen[axis] = np.clip(starts, 0, x.shape[axis] - sizes[axis])
    x = _picked(writer, x, chosen, sizes)
    gone = [d for d in range(x.rank) if d not in source.values()]
    left = [d for d in range(x.rank) if d not in gone]
    if any(places.shape[picked.index(d)] != 1 for d in picked if d not in source):
        raise Unsupported("places that repeat")
    x = squeezed(writer, x, gone)
    # First the order of the axes, then those of size one.
    known = sorted(source)
    x = x.relabelled([left.index(source[d]) for d in known])
    return [unsqueezed(writer, x, known, rank)]


def _looked_up(writer: Writer, eqn: Equation, x: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table at places that the inputs say, such as embeddings of tokens."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes = numbers.start_index_map
    whole = len(axes) == 1 and all(n == (1 if d == axes[0] else x.shape[d]) for d, n in enumerate(sizes))
    if not whole or numbers.collapsed_slice_dims != axes or numbers.operand_batching_dims:
        raise Unsupported("places that the images say, other than whole rows along one axis")
    axis, shape = axes[0], writer.program.shape(eqn.outputs[0])
    places = squeezed(writer, indices, [indices.rank - 1])
    name = writer.held(places)
    if eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP:
        limits = [writer.constant(np.asarray(n, writer.dtype(eqn.inputs[1]))) for n in (0, x.shape[axis] - 1)]
        name = writer.node("Min", [writer.node("Max", [name, limits[0]]), limits[1]])
    offsets = numbers.offset_dims
    picked = [d for d in range(len(shape)) if d not in offsets]
    order = (*offsets[:axis], *picked, *offsets[axis:])
    return Tensor(writer.node("Gather", [writer.held(x), name], axis=axis), order, shape)


def _one_axis(places: np.ndarray) -> tuple[int | None, np.ndarray]:
    """The only axis along which an array changes, and the numbers along it; None and one number where it is the same all over.

    Raises:
      Unsupported: if there are several.
    """
    changing = [d for d in range(places.ndim) if (places != places.take([0], d)).any()]
    if len(changing) > 1:
        raise Unsupported("places that are no rows and columns")
    if not changing:
        return None, places.ravel()[:1]
    return changing[0], np.moveaxis(places, changing[0], -1).reshape(-1, places.shape[changing[0]])[0]


def _picked(writer: Writer, x: Tensor, chosen: dict[int, np.ndarray], sizes: Sequence[int]) -> Tensor:
    """Parts of axes: axis -> where slices of these sizes begin; those of several have size 1. Even steps are one slice."""
    shape, cuts = list(x.shape), {}
    for axis, starts in chosen.items():
        shape[axis] = sizes[axis] if len(starts) == 1 else len(starts)
        steps = set(np.diff(starts).tolist()) or {1}
        if len(steps) == 1 and min(steps) > 0:
            cut = (int(starts[0]), int(starts[-1]) + sizes[axis], steps.pop())
            if cut != (0, x.shape[axis], 1):
                cuts[axis] = cut
            continue
        operands = [writer.held(x, x.order), writer.integers(*starts.tolist())]
        size = (*x.shape[:axis], len(starts), *x.shape[axis + 1 :])
        x = Tensor(writer.node("Gather", operands, axis=x.place(axis)), x.order, size)
    return _cut(writer, x, cuts, tuple(shape))

"""ONNX export of pooling and reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sculpt.export.onnx.writer import Tensor, Unsupported, Writer, operation
from sculpt.ir.program import Equation


@operation("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _pooling(writer: Writer, eqn: Equation) -> list[Tensor]:
    params, x = eqn.params, writer.tensor(eqn.inputs[0])
    windows, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    moving = [
        d
        for d in range(x.rank)
        if windows[d] != 1 or strides[d] != 1 or any(padding[d]) or params["window_dilation"][d] != 1
    ]
    if writer.dtype(eqn.inputs[0]) != np.float32:
        raise Unsupported(f"windows over {writer.dtype(eqn.inputs[0])}")
    if any(n != 1 for n in params["base_dilation"]):
        raise Unsupported("windows over an image spread out with zeros")
    if any(low < 0 or high < 0 for low, high in padding):
        raise Unsupported("negative padding")
    still = [d for d in x.order if d not in moving]
    if x.rank < 3 or len(still) < 2:
        raise Unsupported("windows over other than the spatial axes of images")
    # Batch and channel first; a spatial axis that no window moves along is one with a window of 1.
    order = (
        x.order
        if not set(x.order[:2]) & set(moving)
        else (*still[:2], *sorted({*range(x.rank)} - {*still[:2]}))
    )
    spatial = order[2:]
    attributes: dict[str, Any] = {
        "kernel_shape": tuple(windows[d] for d in spatial),
        "pads": (*(padding[d][0] for d in spatial), *(padding[d][1] for d in spatial)),
        "strides": tuple(strides[d] for d in spatial),
    }
    name = writer.held(x, order)
    dilations = tuple(params["window_dilation"][d] for d in spatial)
    if eqn.name == "reduce_window_sum":
        if any(n != 1 for n in dilations):
            raise Unsupported("sums over dilated windows")
        name = writer.node("AveragePool", [name], count_include_pad=1, **attributes)
        name = writer.node("Mul", [name, writer.constant(np.float32(math.prod(windows)))])
    elif eqn.name == "reduce_window_max":
        name = writer.node("MaxPool", [name], dilations=dilations, **attributes)
    else:
        pooled = writer.node("MaxPool", [writer.node("Neg", [name])], dilations=dilations, **attributes)
        name = writer.node("Neg", [pooled])
    return [Tensor(name, order, writer.program.shape(eqn.outputs[0]))]


_REDUCTIONS = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_prod": "ReduceProd",
}  # fmt: skip


@operation(*_REDUCTIONS)
def _reduction(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, axes = writer.tensor(eqn.inputs[0]), eqn.params["axes"]
    return [reduced(writer, _REDUCTIONS[eqn.name], x, axes)]


def reduced(writer: Writer, operator: str, x: Tensor, axes: Sequence[int]) -> Tensor:
    """One of ONNX's reductions over axes, which go."""
    if not axes:
        return x
    places = sorted(x.place(d) for d in axes)
    name = writer.held(x, x.order)
    # Axes became an operand one operator after the other.
    if operator == "ReduceSum" or writer.opset >= 18:
        name = writer.node(operator, [name, writer.integers(*places)], keepdims=0)
    else:
        name = writer.node(operator, [name], axes=tuple(places), keepdims=0)
    order, shape = without(x, axes)
    return Tensor(name, order, shape)


def without(x: Tensor, axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Order and shape of a tensor that lost axes."""
    left = [d for d in range(x.rank) if d not in axes]
    return tuple(left.index(d) for d in x.order if d in left), tuple(x.shape[d] for d in left)


@operation("argmax", "argmin")
def _extreme(writer: Writer, eqn: Equation) -> list[Tensor]:
    x, (axis,) = writer.tensor(eqn.inputs[0]), eqn.params["axes"]
    if writer.dtype(eqn.inputs[0]) == np.bool_:
        raise Unsupported("of booleans")
    operator = "ArgMax" if eqn.name == "argmax" else "ArgMin"
    name = writer.node(operator, [writer.held(x, x.order)], axis=x.place(axis), keepdims=0)
    order, shape = without(x, (axis,))
    return [Tensor(writer.node("Cast", [name], to=np.dtype(eqn.params["index_dtype"])), order, shape)]


@operation("cumsum")
def _cumulative(writer: Writer, eqn: Equation) -> list[Tensor]:
    x = writer.tensor(eqn.inputs[0])
    axis = writer.constant(np.int64(x.place(eqn.params["axis"])))
    name = writer.node("CumSum", [writer.held(x, x.order), axis], reverse=int(eqn.params["reverse"]))
    return [Tensor(name, x.order, x.shape)]

"""ONNX export of convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import export

from sculpt.export.onnx.writer import Tensor, Unsupported, Writer, number_of, operation
from sculpt.ir.program import Equation


@operation("conv_general_dilated")
def _convolution(writer: Writer, eqn: Equation) -> list[Tensor]:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    image, kernel = (writer.tensor(o) for o in eqn.inputs)
    if params["batch_group_count"] != 1:
        raise Unsupported("batch groups")
    if export.is_symbolic_dim(params["feature_group_count"]):
        raise Unsupported("groups that depend on the batch size")
    if not numbers.lhs_spec[2:]:
        raise Unsupported("a convolution without spatial axes")
    if any(n != 1 for n in params["lhs_dilation"]):
        name = _transposed(writer, eqn, image, kernel)
    else:
        padding = params["padding"]
        if any(low < 0 or high < 0 for low, high in padding):
            raise Unsupported("negative padding")
        name = writer.node(
            "Conv",
            [writer.held(image, numbers.lhs_spec), writer.held(kernel, numbers.rhs_spec)],
            dilations=tuple(params["rhs_dilation"]),
            group=params["feature_group_count"],
            pads=(*(low for low, _ in padding), *(high for _, high in padding)),
            strides=tuple(params["window_strides"]),
        )
    return [Tensor(name, tuple(numbers.out_spec), writer.program.shape(eqn.outputs[0]))]


def _transposed(writer: Writer, eqn: Equation, image: Tensor, kernel: Tensor) -> str:
    """A convolution of an image spread out with zeros: the transpose of one with strides, whose kernel is turned round."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if (
        params["feature_group_count"] != 1
        or any(n != 1 for n in params["window_strides"])
        or kernel.array is None
    ):
        raise Unsupported(
            "a transposed convolution with groups, with strides of its own or without constant weights"
        )
    out, inputs, *window = numbers.rhs_spec
    weights = np.flip(kernel.array.transpose((inputs, out, *window)), tuple(range(2, kernel.rank)))
    lows, highs, extra = [], [], []
    for d, dilation, stride, (low, high) in zip(
        window, params["rhs_dilation"], params["lhs_dilation"], params["padding"]
    ):
        reach = dilation * (kernel.shape[d] - 1)
        lows.append(reach - low)
        # What would be cut off less than nothing is added.
        highs.append(max(reach - high, 0))
        extra.append(max(high - reach, 0))
        if lows[-1] < 0 or extra[-1] >= stride:
            raise Unsupported(f"padding {(low, high)} of a transposed convolution")
    return writer.node(
        "ConvTranspose",
        [writer.held(image, numbers.lhs_spec), writer.constant(weights, kernel.label)],
        dilations=tuple(params["rhs_dilation"]),
        output_padding=tuple(extra),
        pads=(*lows, *highs),
        strides=tuple(params["lhs_dilation"]),
    )


@operation("dot_general")
def _dot_general(writer: Writer, eqn: Equation) -> list[Tensor]:
    """MatMul of `[*batch, *rows, summed]` and `[*batch, summed, columns]`.

    Several rows in a row stay apart where the columns have no batch of their own, as in a dense layer over tokens.
    """
    (left_sums, right_sums), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left, right = (writer.tensor(o) for o in eqn.inputs)
    left_free = _others(left, (*left_sums, *left_batch))
    right_free = _others(right, (*right_sums, *right_batch))
    shape = writer.program.shape(eqn.outputs[0])
    batch = len(left_batch)
    rows = tuple(range(batch, batch + len(left_free)))
    columns = tuple(range(batch + len(left_free), len(shape)))
    if left.array is not None and right.array is None:
        # Weights stand on the right.
        left, right, left_sums, right_sums = right, left, right_sums, left_sums
        left_batch, right_batch, left_free, right_free = right_batch, left_batch, right_free, left_free
        rows, columns = columns, rows
    # The axes of the result in the order in which MatMul leaves them.
    order = (*range(batch), *rows, *columns)
    apart = len(left_free) > 1 and batch == 0
    first = _merged(
        writer, left, [[d] for d in left_batch], [[d] for d in left_free] if apart else [left_free], left_sums
    )
    second = _merged(writer, right, [[d] for d in right_batch], [right_sums], right_free)
    name = writer.node("MatMul", [first, second])
    if (not apart and len(rows) != 1) or len(columns) != 1:
        name = writer.node("Reshape", [name, writer.sizes([shape[d] for d in order])])
    return [Tensor(name, order, shape)]


def _others(tensor: Tensor, used: Sequence[int]) -> list[int]:
    return [d for d in range(tensor.rank) if d not in used]


def _merged(
    writer: Writer,
    tensor: Tensor,
    batch: list[list[int]],
    middle: list[Sequence[int]] | list[list[int]],
    last: Sequence[int],
) -> str:
    """The tensor with runs of axes made one each: those of the batch, the middle ones, the last ones."""
    groups = [*batch, *middle, last]
    order = [d for group in groups for d in group]
    if all(len(group) == 1 for group in groups):
        return writer.held(tensor, order)
    shape = [_product([tensor.shape[d] for d in group]) for group in groups]
    if tensor.array is not None:
        return writer.constant(
            tensor.array.transpose(order).reshape([number_of([n]) for n in shape]), tensor.label
        )
    return writer.node("Reshape", [writer.held(tensor, order), writer.sizes(shape)])


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result

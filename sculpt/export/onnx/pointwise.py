"""ONNX export of element-wise operations; keeps the axis order of the operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sculpt.export.onnx.writer import Operation, Tensor, Unsupported, Writer, operation
from sculpt.ir.program import Equation, Literal

_ONE_TO_ONE = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh", "atan": "Atan", "atanh": "Atanh",
    "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log",
    "logistic": "Sigmoid", "neg": "Neg", "not": "Not", "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt",
    "tan": "Tan", "tanh": "Tanh",
    "add": "Add", "add_any": "Add", "and": "And", "div": "Div", "eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater",
    "le": "LessOrEqual", "lt": "Less", "mul": "Mul", "or": "Or", "pow": "Pow", "sub": "Sub", "xor": "Xor",
}  # fmt: skip
_LOGICAL = ("and", "or", "xor", "not")


def elementwise(writer: Writer, eqn: Equation, write: Callable[[Sequence[str]], str]) -> Tensor:
    """Writes an operation on operands that are all held in one order."""
    tensors = [writer.tensor(o) for o in eqn.inputs]
    shape = writer.program.shape(eqn.outputs[0])
    order = common_order(tensors, shape)
    # Scalars go with any order.
    return Tensor(write([writer.held(t, order if t.rank else ()) for t in tensors]), order, shape)


def common_order(tensors: Sequence[Tensor], shape: Sequence[Any]) -> tuple[int, ...]:
    """The order of the first computed operand of full size, or else of the first computed one."""
    computed = [t for t in tensors if t.array is None and t.rank == len(shape)]
    full = [t for t in computed if t.shape == tuple(shape)]
    return (full or computed)[0].order if computed else tuple(range(len(shape)))


def _register(primitive: str, operator: str) -> None:
    @operation(primitive)
    def write(writer: Writer, eqn: Equation) -> list[Tensor]:
        if primitive in _LOGICAL and writer.dtype(eqn.outputs[0]) != np.bool_:
            raise Unsupported("bits of integers")
        if primitive == "div" and not np.issubdtype(writer.dtype(eqn.outputs[0]), np.floating):
            raise Unsupported("a quotient of integers")
        return [elementwise(writer, eqn, lambda names: writer.node(operator, names))]


for _primitive, _operator in _ONE_TO_ONE.items():
    _register(_primitive, _operator)


def _unary(*names: str) -> Callable[[Callable[[Writer, Equation, str], str]], Operation]:
    """Registers an operation of one operand, given by name."""

    def register(write: Callable[[Writer, Equation, str], str]) -> Operation:
        @operation(*names)
        def whole(writer: Writer, eqn: Equation) -> list[Tensor]:
            return [elementwise(writer, eqn, lambda operands: write(writer, eqn, operands[0]))]

        return whole

    return register


def _like(writer: Writer, eqn: Equation, value: float) -> str:
    """A scalar of the dtype of the equation's operand."""
    return writer.constant(np.asarray(value, writer.dtype(eqn.inputs[0])))


@operation("copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint")
def _as_it_is(writer: Writer, eqn: Equation) -> list[Tensor]:
    return [writer.tensor(o) for o in eqn.inputs]


@_unary("rsqrt")
def _rsqrt(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Reciprocal", [writer.node("Sqrt", [x])])


@_unary("erfc")
def _erfc(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Sub", [_like(writer, eqn, 1.0), writer.node("Erf", [x])])


@_unary("log1p")
def _log1p(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Log", [writer.node("Add", [x, _like(writer, eqn, 1.0)])])


@_unary("expm1")
def _expm1(writer: Writer, eqn: Equation, x: str) -> str:
    # tanh(x / 2) (exp(x) + 1), which loses nothing where x is small; where exp(x) overflows so does the result.
    half = writer.node("Tanh", [writer.node("Mul", [x, _like(writer, eqn, 0.5)])])
    return writer.node("Mul", [half, writer.node("Add", [writer.node("Exp", [x]), _like(writer, eqn, 1.0)])])


@_unary("exp2")
def _exp2(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Exp", [writer.node("Mul", [x, _like(writer, eqn, math.log(2.0))])])


@_unary("square")
def _square(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Mul", [x, x])


@_unary("integer_pow")
def _integer_pow(writer: Writer, eqn: Equation, x: str) -> str:
    exponent = eqn.params["y"]
    if abs(exponent) > 8 or exponent == 0:
        return writer.node("Pow", [x, _like(writer, eqn, float(exponent))])
    power = x
    for _ in range(abs(exponent) - 1):
        power = writer.node("Mul", [power, x])
    return power if exponent > 0 else writer.node("Reciprocal", [power])


@_unary("round")
def _round(writer: Writer, eqn: Equation, x: str) -> str:
    if eqn.params["rounding_method"].name == "TO_NEAREST_EVEN":
        return writer.node("Round", [x])
    # Away from zero: half of the sign is added, and what follows the point is dropped.
    away = writer.node("Floor", [writer.node("Add", [writer.node("Abs", [x]), _like(writer, eqn, 0.5)])])
    return writer.node("Mul", [writer.node("Sign", [x]), away])


@_unary("is_finite")
def _is_finite(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Not", [writer.node("Or", [writer.node("IsNaN", [x]), writer.node("IsInf", [x])])])


@_unary("convert_element_type")
def _convert(writer: Writer, eqn: Equation, x: str) -> str:
    return writer.node("Cast", [x], to=np.dtype(eqn.params["new_dtype"]))


@_unary("reduce_precision")
def _reduce_precision(writer: Writer, eqn: Equation, x: str) -> str:
    if (eqn.params["exponent_bits"], eqn.params["mantissa_bits"]) != (8, 23):
        raise Unsupported("rounding to fewer bits")
    return x


@operation("ne")
def _ne(writer: Writer, eqn: Equation) -> list[Tensor]:
    return [elementwise(writer, eqn, lambda names: writer.node("Not", [writer.node("Equal", names)]))]


@operation("add", "add_any")
def _add(writer: Writer, eqn: Equation) -> list[Tensor]:
    return [_as_bias(writer, eqn) or elementwise(writer, eqn, lambda names: writer.node("Add", names))]


def _as_bias(writer: Writer, eqn: Equation) -> Tensor | None:
    """A constant for each channel that is added to a convolution that nothing else reads is the convolution's bias.

    To the convolution itself: another view of it, such as a transpose, is no node, and the convolution may have other readers.
    """
    for value, other in (eqn.inputs, eqn.inputs[::-1]):
        if isinstance(value, Literal) or value not in writer.equations:
            continue
        if writer.equations[value].name != "conv_general_dilated":
            continue
        tensor, constant = writer.tensor(value), writer.tensor(other)
        if tensor.name is None or constant.array is None or tensor.rank < 3 or constant.rank != tensor.rank:
            continue
        node = writer.producer(tensor.name)
        if node is None or node.operator not in ("Conv", "ConvTranspose") or len(node.inputs) != 2:
            continue
        channel = tensor.order[1]
        if writer.readers[value] != 1 or constant.array.size != constant.shape[channel]:  # type: ignore[index]
            continue
        bias = np.broadcast_to(constant.array.ravel(), (tensor.shape[channel],))
        writer.replace(node, inputs=(*node.inputs, writer.constant(bias, constant.label)))
        return tensor
    return None


def _scalar(writer: Writer, operand: Any) -> float | None:
    """The number that an operand is, if it is one."""
    array = writer.tensor(operand).array if isinstance(operand, Literal) else None
    return float(array) if array is not None and array.ndim == 0 else None


@operation("max", "min")
def _bound(writer: Writer, eqn: Equation) -> list[Tensor]:
    """Relu and Clip where a bound is a number."""
    operator = "Max" if eqn.name == "max" else "Min"
    floating = np.issubdtype(writer.dtype(eqn.outputs[0]), np.floating)
    for value, other in (eqn.inputs, eqn.inputs[::-1]):
        bound = _scalar(writer, other)
        if bound is None or not floating or isinstance(value, Literal):
            continue
        tensor = writer.tensor(value)
        name = writer.held(tensor, tensor.order)
        if bound == (-math.inf if operator == "Max" else math.inf):
            return [tensor]
        return [Tensor(_clipped(writer, value, name, operator, bound), tensor.order, tensor.shape)]
    return [elementwise(writer, eqn, lambda names: writer.node(operator, names))]


def _clipped(writer: Writer, value: Any, name: str, operator: str, bound: float) -> str:
    if operator == "Max":
        if bound == 0.0:
            return writer.node("Relu", [name])
        return writer.node("Clip", [name, writer.constant(np.float32(bound))])
    before = writer.producer(name)
    upper = writer.constant(np.float32(bound))
    if before is not None and writer.readers[value] == 1:
        # max, then min: one operator.
        if before.operator == "Relu":
            return writer.node("Clip", [before.inputs[0], writer.constant(np.float32(0.0)), upper])
        if before.operator == "Clip" and len(before.inputs) == 2:
            return writer.node("Clip", [*before.inputs, upper])
    return writer.node("Clip", [name, "", upper])


@operation("clamp")
def _clamp(writer: Writer, eqn: Equation) -> list[Tensor]:
    low, x, high = (writer.tensor(o) for o in eqn.inputs)
    order = common_order([x], x.shape)
    names = [writer.held(t, order if t.rank else ()) for t in (x, low, high)]
    return [Tensor(writer.node("Min", [writer.node("Max", names[:2]), names[2]]), order, x.shape)]


@operation("select_n")
def _select(writer: Writer, eqn: Equation) -> list[Tensor]:
    if len(eqn.inputs) != 3:
        raise Unsupported("a choice between more than two")
    tensors = [writer.tensor(o) for o in eqn.inputs]
    shape = writer.program.shape(eqn.outputs[0])
    order = common_order(tensors, shape)
    which, first, second = (writer.held(t, order if t.rank else ()) for t in tensors)
    if writer.dtype(eqn.inputs[0]) != np.bool_:
        which = writer.node("Cast", [which], to=np.dtype(np.bool_))
    return [Tensor(writer.node("Where", [which, second, first]), order, shape)]

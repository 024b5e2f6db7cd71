"""Patterns of several JAX operations that ONNX has as one operation.

Each of these looks at the last operation of such a run and goes back through the program; the operations that it replaces are
dropped where nothing else reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sculpt.export.onnx.windows import reduced
from sculpt.export.onnx.writer import Tensor, Writer, idiom, number_of
from sculpt.ir.program import Equation, Literal, Operand

_VIEWS = ("broadcast_in_dim", "reshape", "stop_gradient", "copy")


def _given(writer: Writer, operand: Operand, *names: str) -> Equation | None:
    """The equation that gives an operand, if it is one of these."""
    eqn = None if isinstance(operand, Literal) else writer.equations.get(operand)
    return eqn if eqn is not None and eqn.name in names else None


def _behind(writer: Writer, operand: Operand) -> Operand:
    """The operand before it was broadcast or held from derivatives; maxima with -inf, which `jax.nn.softmax` takes, too."""
    while (eqn := _given(writer, operand, *_VIEWS, "max")) is not None:
        rest = [i for i in eqn.inputs if _number(writer, i) != -math.inf]
        if eqn.name == "max" and len(rest) != 1:
            break
        operand = rest[0]
    return operand


def _number(writer: Writer, operand: Operand) -> float | None:
    """The number that an operand is, if it is one."""
    array = (
        writer.tensor(operand).array
        if isinstance(operand, Literal) or operand not in writer.equations
        else None
    )
    return float(array.ravel()[0]) if array is not None and array.size == 1 else None


def _with_number(writer: Writer, operand: Operand, name: str, number: float) -> Operand | None:
    """The other operand of an equation `name` one of whose operands is a number."""
    eqn = _given(writer, operand, name)
    for x, other in () if eqn is None else (eqn.inputs, eqn.inputs[::-1]):
        found = _number(writer, other)
        if found is not None and math.isclose(found, number, rel_tol=1e-6):
            return x
    return None


def _either_way(eqn: Equation | None, match: Callable[[Operand, Operand], Tensor | None]) -> Tensor | None:
    """The first match of two operands, as they stand or the other way round."""
    for pair in () if eqn is None else (eqn.inputs, eqn.inputs[::-1]):
        found = match(*pair)
        if found is not None:
            return found
    return None


@idiom("div")
def _softmax(writer: Writer, eqn: Equation) -> Tensor | None:
    """`exp(x - max(x)) / sum(exp(x - max(x)))` along one axis."""
    numerator = _given(writer, eqn.inputs[0], "exp")
    total = _given(writer, _behind(writer, eqn.inputs[1]), "reduce_sum")
    if numerator is None or total is None or total.inputs[0] != eqn.inputs[0]:
        return None
    difference = _given(writer, numerator.inputs[0], "sub")
    largest = (
        None if difference is None else _given(writer, _behind(writer, difference.inputs[1]), "reduce_max")
    )
    if difference is None or largest is None or largest.inputs[0] != difference.inputs[0]:
        return None
    axes = total.params["axes"]
    if largest.params["axes"] != axes or len(axes) != 1:
        return None
    x = writer.tensor(difference.inputs[0])
    if not _spreads(writer, eqn.inputs[1], axes) or not _spreads(writer, difference.inputs[1], axes):
        return None
    return Tensor(writer.node("Softmax", [writer.held(x, x.order)], axis=x.place(axes[0])), x.order, x.shape)


def _spreads(writer: Writer, operand: Operand, axes: Sequence[int]) -> bool:
    """Whether a reduced value stands, broadcast, where the axes were that it was reduced over."""
    shape = writer.program.shape(operand)
    reduced_value = _behind(writer, operand)
    return tuple(n for d, n in enumerate(shape) if d not in axes) == writer.program.shape(reduced_value)


@idiom("div", "mul")
def _mean(writer: Writer, eqn: Equation) -> Tensor | None:
    """A sum divided by the number of its terms."""
    total = _given(writer, eqn.inputs[0], "reduce_sum")
    divisor = _number(writer, eqn.inputs[1])
    if total is None or divisor is None or writer.readers[eqn.inputs[0]] != 1:  # type: ignore[index]
        return None
    x, axes = writer.tensor(total.inputs[0]), total.params["axes"]
    sizes = [x.shape[d] for d in axes]
    if not all(isinstance(n, int) for n in sizes):
        return None
    number = divisor if eqn.name == "div" else 1.0 / divisor if divisor else 0.0
    return (
        reduced(writer, "ReduceMean", x, axes)
        if math.isclose(number, number_of(sizes), rel_tol=1e-6)
        else None
    )


@idiom("div", "mul")
def _average_pool(writer: Writer, eqn: Equation) -> Tensor | None:
    """A sum over windows divided by the size of the window."""
    total = _given(writer, eqn.inputs[0], "reduce_window_sum")
    divisor = _number(writer, eqn.inputs[1])
    if total is None or divisor is None:
        return None
    size = math.prod(total.params["window_dimensions"])
    number = divisor if eqn.name == "div" else 1.0 / divisor if divisor else 0.0
    if not math.isclose(number, size, rel_tol=1e-6):
        return None
    tensor = writer.tensor(eqn.inputs[0])
    scaled = writer.producer(tensor.name or "")
    assert scaled is not None and scaled.operator == "Mul"
    return Tensor(scaled.inputs[0], tensor.order, tensor.shape)


@idiom("div", "mul")
def _hard_sigmoid(writer: Writer, eqn: Equation) -> Tensor | None:
    """`min(max(x + 3, 0), 6) / 6`."""
    sixth = _number(writer, eqn.inputs[1])
    if sixth is None or not math.isclose(sixth, 6.0 if eqn.name == "div" else 1 / 6, rel_tol=1e-6):
        return None
    value: Operand | None = eqn.inputs[0]
    for name, number in (("min", 6.0), ("max", 0.0), ("add", 3.0)):
        value = None if value is None else _with_number(writer, value, name, number)
    if value is None:
        return None
    x = writer.tensor(value)
    return Tensor(
        writer.node("HardSigmoid", [writer.held(x, x.order)], alpha=1 / 6, beta=0.5), x.order, x.shape
    )


@idiom("mul")
def _gelu(writer: Writer, eqn: Equation) -> Tensor | None:
    """`x / 2 * erfc(-x / sqrt(2))` (Hendrycks and Gimpel, arXiv 1606.08415)."""

    def match(half: Operand, other: Operand) -> Tensor | None:
        x = _with_number(writer, half, "mul", 0.5)
        complement = _given(writer, other, "erfc")
        inner = (
            None if complement is None else _with_number(writer, complement.inputs[0], "mul", math.sqrt(0.5))
        )
        negative = None if inner is None else _given(writer, inner, "neg")
        if x is None or negative is None or negative.inputs[0] != x:
            return None
        tensor = writer.tensor(x)
        return Tensor(_gelu_of(writer, writer.held(tensor, tensor.order)), tensor.order, tensor.shape)

    return _either_way(eqn, match)


def _gelu_of(writer: Writer, x: str) -> str:
    if writer.opset >= 20:
        return writer.node("Gelu", [x])
    # Engines know these five by their order.
    root, one, half = (writer.constant(np.float32(n)) for n in (math.sqrt(2.0), 1.0, 0.5))
    inner = writer.node("Add", [writer.node("Erf", [writer.node("Div", [x, root])]), one])
    return writer.node("Mul", [writer.node("Mul", [x, inner]), half])


@idiom("add")
def _layer_norm(writer: Writer, eqn: Equation) -> Tensor | None:
    """`(x - mean) * (rsqrt(variance + epsilon) * scale) + bias` over the last axis (Ba et al., arXiv 1607.06450)."""

    def scaled(product: Operand, bias: Operand) -> Tensor | None:
        if _per_feature(writer, bias) is None:
            return None
        return _either_way(_given(writer, product, "mul"), lambda a, b: centred(a, b, bias))

    def centred(difference: Operand, factor: Operand, bias: Operand) -> Tensor | None:
        around = _given(writer, difference, "sub")
        if around is None:
            return None
        return _either_way(_given(writer, factor, "mul"), lambda a, b: normal(around, a, b, bias))

    def normal(around: Equation, root: Operand, scale: Operand, bias: Operand) -> Tensor | None:
        inverse = _given(writer, _behind(writer, root), "rsqrt")
        added = None if inverse is None else _given(writer, inverse.inputs[0], "add")
        epsilon = None if added is None else _number(writer, added.inputs[1])
        x, mean = around.inputs[0], _behind(writer, around.inputs[1])
        if (
            added is None
            or epsilon is None
            or _per_feature(writer, scale) is None
            or not _is_mean(writer, mean, x)
        ):
            return None
        variance = _behind(writer, added.inputs[0])
        variance = _with_number(writer, variance, "max", 0.0) or variance
        if not _is_variance(writer, variance, x, mean):
            return None
        tensor = writer.tensor(x)
        name = writer.node(
            "LayerNormalization",
            [
                writer.held(tensor),
                writer.constant(_per_feature(writer, scale), writer.tensor(scale).label),
                writer.constant(_per_feature(writer, bias), writer.tensor(bias).label),
            ],
            axis=-1,
            epsilon=epsilon,
        )
        return Tensor(name, tuple(range(tensor.rank)), tensor.shape)

    return _either_way(eqn, scaled)


def _per_feature(writer: Writer, operand: Operand) -> np.ndarray | None:
    """A constant that differs along the last axis only, as a vector."""
    if isinstance(operand, Literal) or operand in writer.equations:
        return None
    array = writer.tensor(operand).array
    return None if array is None or array.ndim < 2 or array.size != array.shape[-1] else array.ravel()


def _is_mean(writer: Writer, operand: Operand, x: Operand) -> bool:
    """Whether an operand is the mean of `x` over its last axis."""
    quotient = _given(writer, operand, "div")
    total = None if quotient is None else _given(writer, quotient.inputs[0], "reduce_sum")
    if quotient is None or total is None or total.inputs[0] != x:
        return False
    shape = writer.program.shape(x)
    # A compact network may divide by the width that it had.
    return total.params["axes"] == (len(shape) - 1,) and _number(writer, quotient.inputs[1]) == shape[-1]


def _is_variance(writer: Writer, operand: Operand, x: Operand, mean: Operand) -> bool:
    """Whether an operand is `mean(x^2) - mean(x)^2`, or `mean((x - mean)^2)`."""
    difference = _given(writer, operand, "sub")
    if difference is not None:
        square = _given(writer, difference.inputs[1], "square")
        return (
            square is not None
            and square.inputs[0] == mean
            and _is_mean_square(writer, difference.inputs[0], lambda inner: inner == x)
        )

    def is_centred(inner: Operand) -> bool:
        found = _given(writer, inner, "sub")
        return found is not None and found.inputs[0] == x and _behind(writer, found.inputs[1]) == mean

    return _is_mean_square(writer, operand, is_centred)


def _is_mean_square(writer: Writer, operand: Operand, of: Callable[[Operand], bool]) -> bool:
    quotient = _given(writer, operand, "div")
    total = None if quotient is None else _given(writer, quotient.inputs[0], "reduce_sum")
    square = None if total is None else _given(writer, total.inputs[0], "square")
    return square is not None and of(square.inputs[0]) and _is_mean(writer, operand, square.outputs[0])

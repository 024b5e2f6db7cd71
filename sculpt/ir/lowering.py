"""Algorithm and precision of convolutions and matrix products in scoring and training.

Both act on the program of the network, operation by operation, so they need nothing of the user's classes. On CPUs depthwise
convolutions of small windows are sums of shifted products wherever a network is scored, trained or recalibrated: XLA's own
are several times slower there (benchmarks/results/bench_depthwise.md).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.interpreter import Executable, execute
from sculpt.ir.jax_calls import apply
from sculpt.ir.program import CONTRACTIONS, Equation, FlatProgram, derivative, flatten

Convolution = Literal["lax", "im2col"]
"""`lax`: the convolution of XLA. `im2col`: patches of the image, then one matrix product, where a convolution allows it."""
Precision = Literal["float32", "bfloat16"]
"""Of the operands of convolutions and matrix products; everything else, sums included, stays as the network has it."""


_LARGEST_WINDOW = 25
"""Entries: of larger windows the sum takes long to compile, and gains little."""


def lowered(
    function: Callable[..., Any], convolution: Convolution = "lax", precision: Precision = "float32"
) -> Callable[..., Any]:
    """`function` with its convolutions and matrix products computed another way, own derivatives kept; itself where nothing changes.

    The result is to be traced (jit, scan, vmap): each call flattens the function for the shapes that it is given.
    """
    plain = convolution == "lax" and precision == "float32"
    if plain and jax.default_backend() != "cpu":
        return function

    @functools.wraps(function)
    def changed(*arguments: Any) -> Any:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.result_type(x)), arguments
        )
        program = flatten(function, *abstract)
        if plain and not _has_depthwise(program):
            return function(*arguments)
        bind = functools.partial(bind_lowered, convolution, precision)
        results = execute(_with_bodies(program, True), jax.tree.leaves(arguments), bind)
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(function, *abstract)), results)

    return changed


def _with_bodies(program: FlatProgram, own_derivatives: bool) -> Executable:
    """The program as written, whose bodies with convolutions or products in them are run operation by operation too.

    Functions with derivatives of their own keep them. Inside such a derivative they are run whole: a rule may well call the
    function itself.
    """
    bodies: dict[int, tuple[Executable, ...]] = {}
    derivatives: dict[int, Executable] = {}
    for eqn in program.equations:
        if not any(map(_has_product, eqn.bodies)):
            continue
        if eqn.name in ("custom_jvp_call", "custom_vjp_call"):
            if not own_derivatives:
                continue
            derivatives[id(eqn)] = _with_bodies(derivative(program, eqn), False)
        bodies[id(eqn)] = tuple(_with_bodies(body, own_derivatives) for body in eqn.bodies)
    return Executable(program, program.constants, {}, bodies, derivatives)


def _has_product(program: FlatProgram) -> bool:
    return any(eqn.name in CONTRACTIONS or any(map(_has_product, eqn.bodies)) for eqn in program.equations)


def _has_depthwise(program: FlatProgram) -> bool:
    return any(
        (
            eqn.name == "conv_general_dilated"
            and _is_depthwise(program.shape(eqn.inputs[0]), program.shape(eqn.inputs[1]), eqn.params)
        )
        or any(map(_has_depthwise, eqn.bodies))
        for eqn in program.equations
    )


def bind_lowered(
    convolution: Convolution,
    precision: Precision,
    eqn: Equation,
    operands: Sequence[Any],
    params: dict[str, Any],
) -> Any:
    """Applies a primitive, convolutions and products as they are to be computed."""
    if eqn.name not in CONTRACTIONS:
        return apply(eqn.primitive, operands, params)
    narrow = precision == "bfloat16" and all(x.dtype == jnp.float32 for x in operands)
    if narrow:
        operands = [x.astype(jnp.bfloat16) for x in operands]
        # A product accumulates in float32 and gives it; convolutions do so on some devices only, and round at the end.
        wanted = jnp.float32 if eqn.name == "dot_general" else None
        params = params | {"preferred_element_type": wanted}
    if eqn.name == "conv_general_dilated" and convolution == "im2col" and _is_plain(operands[0], params):
        result = _product_of_patches(operands[0], operands[1], params, jnp.float32 if narrow else None)
    elif (
        eqn.name == "conv_general_dilated"
        and jax.default_backend() == "cpu"
        and _is_depthwise(operands[0].shape, operands[1].shape, params)
    ):
        result = _sum_of_shifts(operands[0], operands[1], params)
    else:
        result = apply(eqn.primitive, operands, params)
    return result.astype(jnp.float32) if narrow else result


def _is_plain(image: Any, params: dict[str, Any]) -> bool:
    """Whether every output of a convolution is one inner product with a patch of the image."""
    return (
        params["feature_group_count"] == params["batch_group_count"] == 1
        and math.prod(params["lhs_dilation"]) == 1
        and image.ndim > 2
    )


def _is_depthwise(image: Sequence[int], kernel: Sequence[int], params: dict[str, Any]) -> bool:
    """Whether every channel of a convolution of arrays of these shapes is filtered by itself, through a small window."""
    numbers = params["dimension_numbers"]
    return (
        math.prod(kernel[axis] for axis in numbers.rhs_spec[2:]) <= _LARGEST_WINDOW
        and 1 < params["feature_group_count"] == image[numbers.lhs_spec[1]]
        and params["batch_group_count"] == 1
        and math.prod(params["lhs_dilation"]) == 1
    )


def _sum_of_shifts(image: Any, kernel: Any, params: dict[str, Any]) -> Any:
    """A depthwise convolution: for each entry of the window, the pixels that it meets times its weights, added up."""
    wanted = params["preferred_element_type"] or image.dtype
    # Sums of half precision are rounded once, at the end.
    half = jnp.issubdtype(wanted, jnp.floating) and jnp.finfo(wanted).bits < 32
    accumulate = jnp.float32 if half else wanted
    image, kernel = _channels_last(image.astype(accumulate), kernel.astype(accumulate), params)
    *window, _, outputs = kernel.shape
    # Channels that are filtered several times stand side by side.
    image = jnp.repeat(image, outputs // image.shape[-1], axis=-1)
    corners = _corners(image, window, params)
    flat = kernel.reshape(-1, *[1] * (image.ndim - 1), outputs)
    result = functools.reduce(operator.add, (corner * weights for corner, weights in zip(corners, flat)))
    return _as_written(result.astype(wanted), params)


def _product_of_patches(image: Any, kernel: Any, params: dict[str, Any], accumulate: Any) -> Any:
    """A convolution without groups as one matrix product of `[positions, window * inputs]` and `[.., outputs]`."""
    image, kernel = _channels_last(image, kernel, params)
    window, (inputs, outputs) = kernel.shape[:-2], kernel.shape[-2:]
    patches = jnp.concatenate(_corners(image, window, params), axis=-1)
    result = jax.lax.dot_general(
        patches,
        kernel.reshape(math.prod(window) * inputs, outputs),
        (((patches.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=accumulate or params["preferred_element_type"],
        precision=params["precision"],
    )
    return _as_written(result, params)


def _channels_last(image: Any, kernel: Any, params: dict[str, Any]) -> tuple[Any, Any]:
    """`[n, *sizes, inputs]` and `[*window, inputs of a group, outputs]`."""
    numbers = params["dimension_numbers"]
    image = jnp.transpose(image, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    kernel = jnp.transpose(kernel, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    return image, kernel


def _corners(image: Any, window: Sequence[int], params: dict[str, Any]) -> list[Any]:
    """For each entry of the window, row by row, the pixels that it meets: `[n, *sizes of the result, inputs]`."""
    zero = jnp.zeros((), image.dtype)
    image = jax.lax.pad(
        image, zero, [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)]
    )
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    sizes = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, d, s in zip(image.shape[1:-1], window, dilation, strides, strict=True)
    ]

    def corner(offset: Sequence[int]) -> Any:
        start = [o * d for o, d in zip(offset, dilation)]
        stop = [begin + (n - 1) * s + 1 for begin, n, s in zip(start, sizes, strides)]
        last = image.shape[-1]
        return jax.lax.slice(image, (0, *start, 0), (image.shape[0], *stop, last), (1, *strides, 1))

    return [corner(offset) for offset in np.ndindex(*window)]


def _as_written(result: Any, params: dict[str, Any]) -> Any:
    """`[n, *sizes, outputs]` in the layout that the program expects."""
    numbers = params["dimension_numbers"]
    back = [0] * result.ndim
    for place, axis in enumerate((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])):
        back[axis] = place
    return jnp.transpose(result, back)

"""Finds the layers whose weights a least-squares fit can solve for: a matrix times the rows that it reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.program import Equation, FlatProgram, Literal
from sculpt.tracing.layers import RENAMING, Layer, Leaf, find_layers
from sculpt.tracing.tracer import axis_flow

_MOST_WEIGHTS = 1 << 23
"""Of a kernel: inputs squared times outputs is what fitting multiplies, far more than the network itself where both are thousands."""


@dataclasses.dataclass(frozen=True)
class View:
    """A value that is a leaf of the parameters seen another way."""

    leaf: int
    steps: tuple[Equation, ...]

    def seen(self, array: Any) -> Any:
        """The value, given the leaf's array."""
        for step in self.steps:
            array = step.primitive.bind(array, **step.params)
        return array

    def places(self, program: FlatProgram, shape: Sequence[int]) -> np.ndarray:
        """int64 of the value's shape: which entry of the leaf of this `shape`, row by row, each of its entries is."""
        places: Any = np.arange(math.prod(shape)).reshape(shape)
        for step in self.steps:
            if step.name in ("reshape", "squeeze"):
                places = places.reshape(program.shape(step.outputs[0]))
            elif step.name == "transpose":
                places = places.transpose(step.params["permutation"])
            elif step.name == "broadcast_in_dim":
                result = program.shape(step.outputs[0])
                wide = [1] * len(result)
                for dim, size in zip(step.params["broadcast_dimensions"], places.shape):
                    wide[dim] = size
                places = np.broadcast_to(places.reshape(wide), result)
        return places


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLayer:
    """A convolution or a product with a kernel as `rows @ matrix`, at some of its places (images, and positions in them)."""

    name: str
    equation: Equation
    operand: int
    """Which operand the kernel is."""
    kernel: View
    kernel_order: tuple[int, ...]
    """The kernel's axes: those that are summed over, then those of outputs."""
    shape: tuple[int, int]
    """(inputs, outputs) of the matrix."""
    bias: tuple[int, np.ndarray] | None
    """The leaf that is added to the outputs and read nowhere else, and int `[outputs]`: which of its entries each output gets."""
    window: tuple[int, ...]
    """Size of a convolution's window."""
    order: tuple[int, ...]
    """The result's axes: those of places, then those of outputs."""
    places: tuple[np.ndarray, ...]
    """int `[rows]` for each axis of places."""

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """`[inputs, outputs]` of the kernel's leaf, in the leaf's dtype."""
        steps = tuple(step for step in self.kernel.steps if step.name != "convert_element_type")
        seen = dataclasses.replace(self.kernel, steps=steps).seen(leaf)
        return jnp.transpose(seen, self.kernel_order).reshape(self.shape)

    def of_matrix(self, matrix: jax.Array, like: jax.Array) -> jax.Array:
        """The leaf, of the shape of `like`, whose matrix this is."""
        leaf = jax.ShapeDtypeStruct(like.shape, matrix.dtype)
        return jax.linear_transpose(self.matrix, leaf)(matrix)[0]

    def rows_read(self, array: jax.Array) -> jax.Array:
        """`[rows, inputs]` of what the layer reads."""
        params = self.equation.params
        if self.equation.name != "conv_general_dilated":
            summed = params["dimension_numbers"][0][1 - self.operand]
            ordered = jnp.transpose(array, [*_others(array.ndim, summed), *summed])
            return ordered[self.places].reshape(-1, self.shape[0])
        numbers = params["dimension_numbers"]
        images = jnp.transpose(array, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
        spread = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"])]
        padded = jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
        image, *positions = self.places
        corners = [position * stride for position, stride in zip(positions, params["window_strides"])]
        dilation = params["rhs_dilation"]
        extent = [(size - 1) * d + 1 for size, d in zip(self.window, dilation)]

        def seen(image: jax.Array, *corner: jax.Array) -> jax.Array:
            # One dtype for all, also where JAX counts in 64 bits.
            start, sizes = (image, *corner, jnp.int32(0)), (1, *extent, padded.shape[-1])
            patch = jax.lax.dynamic_slice(padded, start, sizes)
            return jax.lax.slice(patch, (0,) * len(sizes), sizes, (1, *dilation, 1)).reshape(-1)

        return jax.vmap(seen)(*(jnp.asarray(part, jnp.int32) for part in (image, *corners)))

    def rows_given(self, array: jax.Array) -> jax.Array:
        """`[rows, outputs]` of the layer's result."""
        return jnp.transpose(array, self.order)[self.places].reshape(-1, self.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class LinearNetwork:
    """A network as a program, and those of its layers that can be fitted."""

    program: FlatProgram
    """Its inputs are the leaves of the parameters, those of the state, and the images."""
    views: Mapping[int, View]
    """By value, what is a leaf of the parameters."""
    layers: Mapping[int, LinearLayer]
    """By `id(equation)`, in the order of the program."""


def find_linear_layers(
    program: FlatProgram, leaves: Sequence[Leaf], rows: int, inputs: int = 1
) -> LinearNetwork:
    """What can be fitted, on at most `rows` places of each layer, drawn once and for all. The last `inputs` of the program are images.

    Not layers inside loops, convolutions in groups, and kernels that are read more than once, are computed from other parameters, or
    have more than 8,388,608 weights.
    """
    views = {value: View(leaf, ()) for leaf, value in enumerate(program.inputs[: len(leaves)])}
    readers: dict[int, list[Equation]] = {}
    for eqn in program.equations:
        source = eqn.inputs[0] if eqn.name in RENAMING else None
        if isinstance(source, int) and source in views:
            known = views[source]
            views[eqn.outputs[0]] = View(known.leaf, (*known.steps, eqn))
        for value in eqn.inputs:
            if isinstance(value, int):
                readers.setdefault(value, []).append(eqn)
    finder = _Finder(program, leaves, rows, views, readers)
    top = {id(eqn) for eqn in program.equations}
    found = find_layers(axis_flow(program), leaves, program.inputs[-inputs:])[0]
    layers = {
        id(layer.equation): linear
        for layer in found
        if id(layer.equation) in top
        for linear in finder.linear(layer)
    }
    return LinearNetwork(program, views, layers)


@dataclasses.dataclass(frozen=True)
class _Finder:
    program: FlatProgram
    leaves: Sequence[Leaf]
    rows: int
    views: Mapping[int, View]
    readers: Mapping[int, Sequence[Equation]]

    def linear(self, layer: Layer) -> Iterator[LinearLayer]:
        """The layer as a matrix product, if it is one."""
        eqn = layer.equation
        operand = eqn.inputs[layer.operand]
        if not layer.in_axes or isinstance(operand, Literal) or operand not in self.views:
            return
        if eqn.name == "ragged_dot_general":
            return
        view = self.views[operand]
        if not self._is_read_once(view.leaf) or any(s.name == "broadcast_in_dim" for s in view.steps):
            return
        params = eqn.params
        if layer.kind == "conv":
            if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
                return
        elif params["dimension_numbers"][1][0]:
            return
        positions, outputs = _result_axes(self.program, eqn, layer.operand)
        if not positions:
            return
        kernel = self.program.shape(operand)
        if not 0 < math.prod(kernel) <= _MOST_WEIGHTS:
            return
        window: tuple[int, ...] = ()
        if layer.kind == "conv":
            spec = params["dimension_numbers"].rhs_spec
            window = tuple(kernel[d] for d in spec[2:])
            summed = (*spec[2:], spec[1])
        else:
            summed = params["dimension_numbers"][0][layer.operand]
        inputs = math.prod(kernel[d] for d in summed)
        shape = self.program.shape(eqn.outputs[0])
        places = _drawn([shape[d] for d in positions], self.rows)
        yield LinearLayer(
            name=layer.name,
            equation=eqn,
            operand=layer.operand,
            kernel=view,
            kernel_order=(*summed, *_others(len(kernel), summed)),
            shape=(inputs, math.prod(shape[d] for d in outputs)),
            bias=self._bias(eqn, outputs),
            window=window,
            order=(*positions, *outputs),
            places=places,
        )

    def _is_read_once(self, leaf: int) -> bool:
        """Whether one operation reads a leaf, perhaps seen another way."""
        seen = [value for value, view in self.views.items() if view.leaf == leaf]
        uses = [e for value in seen for e in self.readers.get(value, []) if e.outputs[0] not in self.views]
        return len(uses) == 1 and not any(value in self.program.outputs for value in seen)

    def _bias(self, eqn: Equation, outputs: Sequence[int]) -> tuple[int, np.ndarray] | None:
        """What is added to a layer's outputs, if it is a leaf that is the same at all places."""
        readers = self.readers.get(eqn.outputs[0], [])
        if len(readers) != 1 or readers[0].name != "add" or eqn.outputs[0] in self.program.outputs:
            return None
        others = [i for i in readers[0].inputs if i != eqn.outputs[0]]
        if len(others) != 1 or isinstance(others[0], Literal) or others[0] not in self.views:
            return None
        view, shape = self.views[others[0]], self.program.shape(eqn.outputs[0])
        if not self._is_read_once(view.leaf):
            return None
        places = view.places(self.program, self.leaves[view.leaf].shape)
        if places.ndim != len(shape):
            return None
        first = places[tuple(slice(None) if d in outputs else slice(0, 1) for d in range(places.ndim))]
        # What is only repeated has no stride, and is as large as all images.
        repeated = all(
            s == 0 or n == 1 for d, (s, n) in enumerate(zip(places.strides, places.shape)) if d not in outputs
        )
        if not repeated and (places != first).any():
            return None
        wide = np.broadcast_to(first, [n if d in outputs else 1 for d, n in enumerate(shape)])
        return view.leaf, wide.transpose([*_others(wide.ndim, outputs), *outputs]).reshape(-1)


def _result_axes(program: FlatProgram, eqn: Equation, operand: int) -> tuple[list[int], list[int]]:
    """The axes of a layer's result that are places, in the order of what it reads, and those that its kernel gives."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.name == "conv_general_dilated":
        return [numbers.out_spec[0], *numbers.out_spec[2:]], [numbers.out_spec[1]]
    ndim = len(program.shape(eqn.outputs[0]))
    count = len(program.shape(eqn.inputs[operand])) - len(numbers[0][operand])
    outputs = list(range(ndim - count, ndim) if operand == 1 else range(count))
    return _others(ndim, outputs), outputs


def _drawn(sizes: Sequence[int], rows: int) -> tuple[np.ndarray, ...]:
    """`rows` places of an array of these sizes, or all of them where there are no more."""
    total = math.prod(sizes)
    if total <= rows:
        chosen = np.arange(total)
    else:
        chosen = np.sort(np.random.default_rng(0).choice(total, rows, replace=False))
    return np.unravel_index(chosen, sizes)


def _others(ndim: int, axes: Sequence[int]) -> list[int]:
    return [d for d in range(ndim) if d not in axes]

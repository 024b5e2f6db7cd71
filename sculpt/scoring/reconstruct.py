"""Reconstruction: what stays of every layer is fitted, in closed form, to what the dense layer gave; no gradient, a few hundred images.

Layer by layer in the order of the network, the weights W that a mask leaves of a kernel, and the bias b behind it, minimise

    sum over images and places of |x' W + b - y|^2 + ridge |W - W_masked|^2

where y is what the dense layer gives in the dense network and x' what the layer reads in the pruned one, whose layers before it have been
fitted already (He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks", arXiv 1707.06168, for one layer at a
time and channels; here for whatever a mask leaves).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg

from sculpt.arguments import checked, is_real
from sculpt.model import Model
from sculpt.pruning.masks import apply_masks, check_masks
from sculpt.tracing.layers import RENAMING, Layer, Leaf, find_layers
from sculpt.tracing.program import Equation, Literal, Program, flatten
from sculpt.tracing.trace import axis_flow, leaf_paths, shapes_of

_PATCHES = 1 << 26
"""Numbers of a layer's inputs that are looked at together."""


@checked
def reconstruct(model: Model, masks: Any, images: Any, *, ridge: float = 1e-3) -> Model:
    """Applies masks, and fits what they leave of every layer to what the dense layer gave on some images.

    Both networks run side by side, operation by operation, on all of the images at once. Left as masked are layers inside loops,
    convolutions in groups, and kernels that are read more than once or are computed from other parameters. BatchNorm keeps its
    statistics: what its layers give has been fitted to what they were taken of.

    Args:
      model: the dense network.
      masks: what `make_masks` returned: booleans like `model.params`.
      images: float32 `[n, ...]`, normalised as the model expects; a few hundred of the train split. Labels are not needed.
      ridge: how strongly weights are held where they were, in parts of the mean square of a layer's inputs; above 0.

    Returns:
      The model with masked weights exactly zero, and the others fitted.

    Raises:
      ValueError: if the masks are not of the model, the model does not take the images, there is none, `ridge` is not above 0, or
        activations are not finite.
    """
    if not is_real(ridge) or not ridge > 0:
        raise ValueError(f"ridge must be a number above 0, got {ridge!r}")
    check_masks(model, masks)
    x = jnp.asarray(images)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0 or not len(x):
        raise ValueError(
            f"expected normalised floating-point images [n, ...], got {x.dtype}{list(x.shape)}: normalise them first "
            "(splits.normalise, sculpt.nets.preprocess)"
        )
    try:
        program = flatten(model.apply, *shapes_of((model.params, model.state)), shapes_of(x))
    except Exception as error:  # each framework has its own
        raise ValueError(f"the model does not take images {x.dtype}{list(x.shape)}: {error}") from error
    fit = _Fit(program, model, masks, x, ridge)
    params = jax.tree.unflatten(jax.tree.structure(model.params), fit.run())
    return apply_masks(model.replace(params=params), masks)


@dataclasses.dataclass(frozen=True)
class _View:
    """A value that is a leaf of the parameters seen another way."""

    leaf: int
    steps: tuple[Equation, ...]


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A contraction as a matrix product: its kernel `[inputs, outputs]`, what it reads `[images and places, inputs]`."""

    eqn: Equation
    operand: int
    """Which operand the kernel is."""
    kernel: tuple[int, ...]
    """The kernel's shape."""
    ndim: int
    """Axes of the result."""

    @property
    def _is_conv(self) -> bool:
        return self.eqn.name == "conv_general_dilated"

    @property
    def _summed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.eqn.params["dimension_numbers"][0]

    @property
    def outputs(self) -> list[int]:
        """The axes of the result that the kernel gives."""
        if self._is_conv:
            return [self.eqn.params["dimension_numbers"].out_spec[1]]
        count = len(self.kernel) - len(self._summed[self.operand])
        return list(range(self.ndim - count, self.ndim) if self.operand == 1 else range(count))

    @property
    def by_images(self) -> bool:
        """Whether the first axis of what it reads and of its result is that of the images."""
        if self._is_conv:
            numbers = self.eqn.params["dimension_numbers"]
            return numbers.lhs_spec[0] == 0 == numbers.out_spec[0]
        return self.operand == 1 and 0 not in self._summed[0] and 0 not in self.outputs

    def of_kernel(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel `[inputs, outputs]`."""
        if self._is_conv:
            outputs_first = kernel.transpose(self.eqn.params["dimension_numbers"].rhs_spec)
            return outputs_first.reshape(len(outputs_first), -1).T
        summed = self._summed[self.operand]
        ordered = kernel.transpose([*summed, *_others(kernel.ndim, summed)])
        return ordered.reshape(math.prod(kernel.shape[d] for d in summed), -1)

    def of_inputs(self, array: jax.Array) -> jax.Array:
        """What is read `[images and places, inputs]`."""
        if not self._is_conv:
            summed = self._summed[1 - self.operand]
            ordered = jnp.transpose(array, [*_others(array.ndim, summed), *summed])
            return ordered.reshape(-1, math.prod(array.shape[d] for d in summed))
        params, numbers = self.eqn.params, self.eqn.params["dimension_numbers"]
        patches = jax.lax.conv_general_dilated_patches(
            array,
            [self.kernel[d] for d in numbers.rhs_spec[2:]],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            numbers,
        )
        return jnp.moveaxis(patches, numbers.out_spec[1], -1).reshape(-1, patches.shape[numbers.out_spec[1]])

    def of_result(self, array: jax.Array) -> jax.Array:
        """A result `[images and places, outputs]`."""
        count = math.prod(array.shape[d] for d in self.outputs)
        return jnp.transpose(array, [*_others(self.ndim, self.outputs), *self.outputs]).reshape(-1, count)


class _Fit:
    """Both networks, operation by operation."""

    def __init__(self, program: Program, model: Model, masks: Any, x: jax.Array, ridge: float) -> None:
        self._program = program
        self._ridge = ridge
        self._masks = [np.asarray(mask) for mask in jax.tree.leaves(masks)]
        self._leaves = list(jax.tree.leaves(apply_masks(model, masks).params))
        rest = [*jax.tree.leaves(model.state), x]
        self._dense = dict(zip(program.inputs, [*jax.tree.leaves(model.params), *rest], strict=True))
        self._pruned = dict(zip(program.inputs, [*self._leaves, *rest], strict=True))
        for values in (self._dense, self._pruned):
            values.update(program.constants)
        self._views = _views(program, len(self._leaves))
        self._readers: dict[int, list[Equation]] = {}
        for eqn in program.equations:
            for value in eqn.inputs:
                if isinstance(value, int):
                    self._readers.setdefault(value, []).append(eqn)
        self._layers = {id(layer.equation): layer for layer in self._found_layers(model)}

    def run(self) -> list[jax.Array]:
        """The leaves of the parameters, fitted."""
        last = {
            i: place
            for place, eqn in enumerate(self._program.equations)
            for i in eqn.inputs
            if isinstance(i, int)
        }
        weights = set(self._program.inputs)
        for place, eqn in enumerate(self._program.equations):
            for values in (self._dense, self._pruned):
                values.update(zip(eqn.outputs, _applied(eqn, values)))
            if id(eqn) in self._layers and self._fit(eqn, self._layers[id(eqn)]):
                self._pruned.update(zip(eqn.outputs, _applied(eqn, self._pruned)))
            for value in {i for i in eqn.inputs if isinstance(i, int)} - weights:
                if last[value] == place:
                    del self._dense[value], self._pruned[value]
        return self._leaves

    def _found_layers(self, model: Model) -> Iterator[Layer]:
        leaves = tuple(
            Leaf(i, path, tuple(np.shape(array)), jnp.asarray(array).dtype)
            for i, (path, array) in enumerate(zip(leaf_paths(model.params), jax.tree.leaves(model.params)))
        )
        layers, _ = find_layers(axis_flow(self._program), leaves, self._program.inputs[-1:])
        for layer in layers:
            operand = layer.equation.inputs[layer.operand]
            if not layer.in_axes or not self._is_read_once(layer.leaf):
                continue
            if isinstance(operand, Literal) or operand not in self._views:
                continue
            if any(step.name == "broadcast_in_dim" for step in self._views[operand].steps):
                continue
            if layer.kind == "conv" and layer.equation.params["feature_group_count"] == 1:
                if layer.equation.params["batch_group_count"] == 1:
                    yield layer
            elif layer.kind == "dense" and not layer.equation.params["dimension_numbers"][1][0]:
                yield layer

    def _is_read_once(self, leaf: int) -> bool:
        """Whether one operation reads a leaf, perhaps seen another way."""
        seen = [value for value, view in self._views.items() if view.leaf == leaf]
        uses = [e for value in seen for e in self._readers.get(value, []) if e.outputs[0] not in self._views]
        return len(uses) == 1 and not any(value in self._program.outputs for value in seen)

    def _fit(self, eqn: Equation, layer: Layer) -> bool:
        """Fits a layer; whether its kernel has changed."""
        operand = eqn.inputs[layer.operand]
        assert isinstance(operand, int)
        view = self._views[operand]
        matrix = _Matrix(
            eqn, layer.operand, self._program.shape(operand), len(self._program.shape(eqn.outputs[0]))
        )
        where = matrix.of_kernel(self._places(view))
        mask = self._masks[view.leaf].reshape(-1)[where]
        bias = self._bias(eqn, matrix)
        gram, product, inputs, missing, count = self._moments(matrix)
        if not (np.isfinite(gram).all() and np.isfinite(product).all()):
            raise ValueError(f"layer {layer.name} reads or gives numbers that are not finite on these images")
        if bias is not None:
            gram = gram - np.outer(inputs, inputs) / count
            product = product - np.outer(inputs, missing) / count
        change = _solved(gram, product, mask, self._ridge)
        kernel = np.asarray(self._leaves[view.leaf], np.float32).reshape(-1).copy()
        kernel[where.reshape(-1)] += change.reshape(-1).astype(np.float32)
        self._set(view.leaf, kernel)
        if bias is not None:
            leaf, units = bias
            shift = (missing - inputs @ change) / count
            values = np.asarray(self._leaves[leaf], np.float32).reshape(-1).copy()
            # Where one number is added to several outputs it moves by their mean.
            times = np.maximum(np.bincount(units, minlength=values.size), 1)
            values += np.bincount(units, shift, minlength=values.size) / times
            self._set(leaf, values * self._masks[leaf].reshape(-1))
        return bool(change.any())

    def _set(self, leaf: int, values: np.ndarray) -> None:
        """A new value for a leaf, and for what has been computed of it alone."""
        before = self._leaves[leaf]
        self._leaves[leaf] = jnp.asarray(values.reshape(np.shape(before)), before.dtype)
        self._pruned[self._program.inputs[leaf]] = self._leaves[leaf]
        for value, view in self._views.items():
            if view.leaf == leaf and view.steps and value in self._pruned:
                for step in view.steps:
                    self._pruned.update(zip(step.outputs, _applied(step, self._pruned)))

    def _places(self, view: _View) -> np.ndarray:
        """int64 of the shape of a view: which entry of the leaf, row by row, each of its entries is."""
        places: Any = np.arange(np.size(self._leaves[view.leaf])).reshape(np.shape(self._leaves[view.leaf]))
        for step in view.steps:
            if step.name in ("reshape", "squeeze"):
                places = places.reshape(self._program.shape(step.outputs[0]))
            elif step.name == "transpose":
                places = places.transpose(step.params["permutation"])
            elif step.name == "broadcast_in_dim":
                shape = self._program.shape(step.outputs[0])
                wide = [1] * len(shape)
                for dim, size in zip(step.params["broadcast_dimensions"], places.shape):
                    wide[dim] = size
                places = np.broadcast_to(places.reshape(wide), shape)
        return places

    def _bias(self, eqn: Equation, matrix: _Matrix) -> tuple[int, np.ndarray] | None:
        """The leaf that is added to a layer's outputs and is read nowhere else, and which of its entries each output gets."""
        readers = self._readers.get(eqn.outputs[0], [])
        if len(readers) != 1 or readers[0].name != "add":
            return None
        others = [i for i in readers[0].inputs if i != eqn.outputs[0]]
        if len(others) != 1 or isinstance(others[0], Literal) or others[0] not in self._views:
            return None
        view = self._views[others[0]]
        if not self._is_read_once(view.leaf):
            return None
        places, outputs = self._places(view), matrix.outputs
        if places.ndim != matrix.ndim:
            return None
        first = places[tuple(slice(None) if d in outputs else slice(0, 1) for d in range(places.ndim))]
        # What is only repeated has no stride, and is as large as all images.
        repeated = all(
            s == 0 or n == 1 for d, (s, n) in enumerate(zip(places.strides, places.shape)) if d not in outputs
        )
        if not repeated and (places != first).any():
            return None
        shape = self._program.shape(eqn.outputs[0])
        wide = np.broadcast_to(first, [n if d in outputs else 1 for d, n in enumerate(shape)])
        return view.leaf, wide.transpose([*_others(wide.ndim, outputs), *outputs]).reshape(-1)

    def _moments(self, matrix: _Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Sums over images and places of x'x'^T, x'm^T, x' and m, with m what the dense layer gives and this one does not, and their
        number."""
        read = matrix.eqn.inputs[1 - matrix.operand]
        array = jnp.asarray(read.value) if isinstance(read, Literal) else self._pruned[read]
        missing = self._dense[matrix.eqn.outputs[0]] - self._pruned[matrix.eqn.outputs[0]]
        step, inputs = len(missing), matrix.kernel
        if matrix.by_images:
            numbers = math.prod(missing.shape[1:]) * math.prod(inputs)
            outputs = math.prod(missing.shape[d] for d in matrix.outputs)
            step = max(1, _PATCHES * outputs**2 // max(numbers, 1))
        sums: list[Any] = [0.0] * 4
        for start in range(0, len(missing), step):
            part = slice(start, start + step) if matrix.by_images else slice(None)
            found = _sums(matrix.of_inputs(array[part]), matrix.of_result(missing[part]))
            sums = [total + np.asarray(own, np.float64) for total, own in zip(sums, found)]
        count = missing.size // math.prod(missing.shape[d] for d in matrix.outputs)
        return (*sums, count)  # type: ignore[return-value]


@jax.jit
def _sums(rows: jax.Array, residual: jax.Array) -> tuple[jax.Array, ...]:
    with jax.default_matmul_precision("highest"):
        rows, residual = rows.astype(jnp.float32), residual.astype(jnp.float32)
        return rows.T @ rows, rows.T @ residual, rows.sum(axis=0), residual.sum(axis=0)


def _solved(gram: np.ndarray, product: np.ndarray, mask: np.ndarray, ridge: float) -> np.ndarray:
    """float64 `[inputs, outputs]`: the change of the weights that stay; outputs of the same inputs are solved for together."""
    change = np.zeros(product.shape)
    patterns, which = np.unique(mask, axis=1, return_inverse=True)
    for number, pattern in enumerate(patterns.T):
        columns, rows = np.flatnonzero(which.reshape(-1) == number), np.flatnonzero(pattern)
        own = gram[np.ix_(rows, rows)]
        scale = np.trace(own) / max(len(rows), 1)
        if scale > 0:
            held = own + ridge * scale * np.eye(len(rows))
            change[np.ix_(rows, columns)] = linalg.solve(held, product[np.ix_(rows, columns)], assume_a="pos")
    return change


def _others(ndim: int, axes: Sequence[int]) -> list[int]:
    return [d for d in range(ndim) if d not in axes]


def _applied(eqn: Equation, values: Mapping[int, Any]) -> list[Any]:
    operands = [i.value if isinstance(i, Literal) else values[i] for i in eqn.inputs]
    if eqn.function is not None:
        return eqn.function(*operands)
    results = eqn.primitive.bind(*operands, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _views(program: Program, leaves: int) -> dict[int, _View]:
    views: dict[int, _View] = {value: _View(leaf, ()) for leaf, value in enumerate(program.inputs[:leaves])}
    for eqn in program.equations:
        source = eqn.inputs[0] if eqn.name in RENAMING else None
        if isinstance(source, int) and source in views:
            known = views[source]
            views[eqn.outputs[0]] = _View(known.leaf, (*known.steps, eqn))
    return views

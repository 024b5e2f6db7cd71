"""Layers (operations with a kernel among the parameters) and products of activations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from sculpt.ir.jax_calls import scan_parts, scan_steps, while_parts
from sculpt.ir.program import CONTRACTIONS, Equation
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.flow import Flow
from sculpt.tracing.rules import dot_numbers

Monomials = tuple[tuple[int, tuple[Atom, ...]], ...]
"""A polynomial in atom sizes: (coefficient, atoms whose sizes multiply) per monomial."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of `model.params`."""

    index: int
    """Position among `jax.tree.leaves(model.params)`."""
    path: str
    """Its place in the tree, such as "stage1_block0/conv1/kernel"."""
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Layer:
    """An operation with a kernel: a convolution or a matrix product with a parameter."""

    index: int
    """Layers are numbered in the order of the program."""
    name: str
    """Tree path of the kernel, without the last part."""
    kind: str
    """"conv" or "dense"."""
    leaf: int
    """Index of the kernel's leaf."""
    equation: Equation
    """The operation, where it stands (perhaps inside a loop)."""
    operand: int
    """Which operand of it is the kernel."""
    repeats: int
    """How often it runs for one image: the steps of the scans around it. A `while` body is counted once."""
    macs: int
    """Multiply-accumulates for one image. Positions over padding are counted, as is usual; those of a transposed convolution are the
    positions of its input."""
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    in_channels: int
    out_channels: int
    out_spatial: tuple[int, ...]
    window: tuple[Atom, ...]
    """Atoms of the kernel's spatial axes (size-one axes left out)."""
    window_axes: tuple[int, ...]
    """The leaf's axes that `window` belongs to."""
    out_axes: tuple[int, ...]
    """The leaf's axes that are the layer's output; empty where the kernel is no plain view of the leaf."""
    in_axes: tuple[int, ...]
    """The leaf's axes that the layer sums over beside `window_axes`; empty where what it multiplies by are not the leaf's own
    entries."""
    monomials: Monomials
    """`macs` as a polynomial."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of two computed values, such as attention scores."""

    name: str
    """The line it comes from."""
    macs: int
    """Multiply-accumulates for one image."""
    monomials: Monomials
    """`macs` as a polynomial."""


@dataclasses.dataclass(frozen=True)
class _View:
    """A value that is made of one parameter leaf alone."""

    leaf: int
    axes: tuple[int, ...] | None
    """The leaf's axis that each axis of the value is; None after a reshape."""
    plain: bool
    """Whether its entries are the leaf's own."""


RENAMING = ("convert_element_type", "copy", "transpose", "reshape", "squeeze", "broadcast_in_dim")
"""Primitives whose result has the entries of their operand, in another shape, order or dtype, or again and again."""


def transposed_dimensions(eqn: Equation, kernel: Sequence[int]) -> list[bool]:
    """Along which spatial dimensions a convolution is a transposed one: its input has gaps, or as much padding on both sides as the
    window reaches. A tap of the window meets each position of the input once there, and gaps and padding are not multiplied.
    """
    params = eqn.params
    taps = (kernel[d] for d in params["dimension_numbers"].rhs_spec[2:])
    reaches = [(n - 1) * dilation for n, dilation in zip(taps, params["rhs_dilation"])]
    return [
        gap > 1 or (reach > 0 and min(padding) >= reach)
        for gap, reach, padding in zip(params["lhs_dilation"], reaches, params["padding"])
    ]


def find_layers(
    flow: Flow, leaves: Sequence[Leaf], images: Sequence[int], batch_axis: int | None = 0
) -> tuple[tuple[Layer, ...], tuple[Product, ...]]:
    """Lists layers and products in program order; `batch_axis` of the program's inputs `images` is their batch, None: they have none."""
    program = flow.program
    terms = [] if batch_axis is None else [flow.terms[i] for i in images]
    finder = _Finder(leaves, tuple(term[batch_axis] for term in terms if len(term) > batch_axis))  # type: ignore[operator]
    views = {
        value: _View(i, tuple(range(len(leaves[i].shape))), True)
        for i, value in enumerate(program.inputs[: len(leaves)])
    }
    finder.visit(flow, views, set(images), 1)
    return tuple(finder.layers), tuple(finder.products)


class _Finder:
    def __init__(self, leaves: Sequence[Leaf], batches: Sequence[Axis]) -> None:
        self.leaves = leaves
        self.batches = batches
        """The axes of the images."""
        self.layers: list[Layer] = []
        self.products: list[Product] = []

    def visit(self, flow: Flow, views: dict[int, _View], image: set[int], repeats: int) -> set[int]:
        """Goes through a program; returns the positions of its outputs that depend on the image."""
        for eqn in flow.program.equations:
            if flow.program.is_table(eqn):
                continue
            depends = any(isinstance(i, int) and i in image for i in eqn.inputs)
            if eqn.bodies:
                image.update(self._bodies(flow, eqn, views, image, repeats))
                continue
            if eqn.name in CONTRACTIONS:
                self._contraction(flow, eqn, views, repeats)
            if depends:
                image.update(eqn.outputs)
            else:
                view = _view_of_result(flow, eqn, views)
                if view is not None:
                    views[eqn.outputs[0]] = view
        return {k for k, o in enumerate(flow.program.outputs) if isinstance(o, int) and o in image}

    def _bodies(
        self, flow: Flow, eqn: Equation, views: dict[int, _View], image: set[int], repeats: int
    ) -> set[int]:
        """Visits the bodies of an equation; returns its outputs that depend on the image."""
        found: set[int] = set()
        operands: list[list[Any]] = [list(eqn.inputs)] * len(eqn.bodies)
        stacked = len(eqn.inputs)
        if eqn.name == "cond":
            operands = [list(eqn.inputs[1:])] * len(eqn.bodies)
        elif eqn.name == "while":
            of_condition, of_body, carry = while_parts(eqn, eqn.inputs)
            operands = [[*of_condition, *carry], [*of_body, *carry]]
        elif eqn.name == "scan":
            scanned = scan_parts(eqn, eqn.inputs)[2]
            stacked -= len(scanned)
            over_images = any(self._of_images(flow, flow.term(o)[0]) for o in scanned)
            repeats = repeats if over_images else repeats * scan_steps(eqn)
        depends = any(isinstance(i, int) and i in image for i in eqn.inputs)
        for body, inputs in zip(flow.bodies[id(eqn)], operands):
            inner_views, inner_image = {}, set()
            for place, (value, operand) in enumerate(zip(body.program.inputs, inputs, strict=True)):
                if isinstance(operand, int) and operand in views:
                    view = views[operand]
                    if place >= stacked:
                        axes = None if view.axes is None else view.axes[1:]
                        view = dataclasses.replace(view, axes=axes)
                    inner_views[value] = view
                elif depends:
                    # A carry may come to depend on the image in a later step.
                    inner_image.add(value)
            reached = self.visit(body, inner_views, inner_image, repeats)
            found |= {eqn.outputs[k] for k in reached if k < len(eqn.outputs)}
        return set(eqn.outputs) if depends else found

    def _contraction(self, flow: Flow, eqn: Equation, views: dict[int, _View], repeats: int) -> None:
        kernels = [i for i, o in enumerate(eqn.inputs) if isinstance(o, int) and o in views]
        operand = kernels[-1] if kernels else 1
        term = flow.term(eqn.inputs[operand])
        output = flow.terms[eqn.outputs[0]]
        if eqn.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            lhs, rhs = map(flow.term, eqn.inputs)
            positions = (
                min(output[o], lhs[i], key=flow.axes.size) if transposed else output[o]
                for i, o, transposed in zip(
                    numbers.lhs_spec[2:],
                    numbers.out_spec[2:],
                    transposed_dimensions(eqn, flow.program.shape(eqn.inputs[1])),
                )
            )
            factors = [output[d] for d in numbers.out_spec[:2]]
            factors += [*positions, *(rhs[d] for d in numbers.rhs_spec[1:])]
        else:
            summed = dot_numbers(eqn)[0][operand]
            factors = [*output, *(term[d] for d in summed)]
        batch = {a for axis in self.batches for a in flow.axes.atoms(axis)}
        monomials = tuple(
            (c * repeats, tuple(a for a in atoms if a not in batch))
            for c, atoms in product([flow.axes.monomials(a) for a in factors if not self._of_images(flow, a)])
        )
        macs = sum(c * math.prod(flow.axes.atom_size(a) for a in atoms) for c, atoms in monomials)
        if not kernels:
            self.products.append(Product(f"{eqn.name} at {eqn.source}", macs, monomials))
        else:
            view = views[eqn.inputs[operand]]  # type: ignore[index]
            self.layers.append(self._layer(flow, eqn, operand, view, repeats, macs, monomials))

    def _of_images(self, flow: Flow, axis: Axis) -> bool:
        """Whether an axis is the images' own, taken apart or not."""
        return any(flow.axes.resolve(axis) == flow.axes.resolve(batch) for batch in self.batches)

    def _layer(
        self,
        flow: Flow,
        eqn: Equation,
        operand: int,
        view: _View,
        repeats: int,
        macs: int,
        monomials: Monomials,
    ) -> Layer:
        shape = flow.program.shape(eqn.inputs[operand])
        window: tuple[Atom, ...] = ()
        window_axes: tuple[int, ...] = ()
        if eqn.name == "conv_general_dilated":
            numbers = eqn.params["dimension_numbers"]
            kernel_size = tuple(shape[d] for d in numbers.rhs_spec[2:])
            if operand == 1 and view.plain and view.axes is not None:
                term = flow.term(eqn.inputs[1])
                wide = [d for d in numbers.rhs_spec[2:] if shape[d] > 1]
                window_axes = tuple(view.axes[d] for d in wide)
                window = tuple(flow.axes.atoms(term[d])[0] for d in wide)
            kind, strides = "conv", tuple(eqn.params["window_strides"])
            groups = eqn.params["feature_group_count"]
            channels = (shape[numbers.rhs_spec[1]] * groups, shape[numbers.rhs_spec[0]])
            out_shape = flow.program.shape(eqn.outputs[0])
            out_spatial = tuple(out_shape[d] for d in numbers.out_spec[2:])
            in_dims, out_dims = [numbers.rhs_spec[1]], [numbers.rhs_spec[0]]
        else:
            (sums, batches) = dot_numbers(eqn)
            summed, groups = sums[operand], ()
            if eqn.name == "ragged_dot_general" and operand == 1:
                groups = eqn.params["ragged_dot_dimension_numbers"].rhs_group_dimensions
            inputs = math.prod(shape[d] for d in summed)
            kind, strides, kernel_size, out_spatial = "dense", (), (), ()
            channels = (inputs, math.prod(n for d, n in enumerate(shape) if d not in (*summed, *groups)))
            in_dims = list(summed)
            out_dims = [d for d in range(len(shape)) if d not in (*summed, *batches[operand], *groups)]
        own = view.axes if view.plain and (operand == 1 or kind == "dense") else None
        in_axes = () if own is None else tuple(own[d] for d in in_dims)
        out_axes = () if view.axes is None else tuple(view.axes[d] for d in out_dims)
        path = self.leaves[view.leaf].path
        return Layer(
            len(self.layers), path.rsplit("/", 1)[0], kind, view.leaf, eqn, operand, repeats, macs, kernel_size,
            strides, *channels, out_spatial, window, window_axes, out_axes, in_axes, monomials,
        )  # fmt: skip


def _view_of_result(flow: Flow, eqn: Equation, views: dict[int, _View]) -> _View | None:
    """Follows a parameter through casts, views and element-wise changes (such as weight standardisation)."""
    shape = flow.program.shape(eqn.outputs[0])
    for operand in eqn.inputs:
        if not isinstance(operand, int) or operand not in views:
            continue
        before, view = flow.program.shape(operand), views[operand]
        if math.prod(before) != math.prod(shape):
            continue
        if eqn.name == "transpose":
            axes = None if view.axes is None else tuple(view.axes[d] for d in eqn.params["permutation"])
            return dataclasses.replace(view, axes=axes)
        if before == shape:
            plain = view.plain and eqn.name in RENAMING
            return dataclasses.replace(view, plain=plain)
        moved = None if view.axes is None or eqn.name != "reshape" else _moved_ones(before, shape)
        axes = None if moved is None else tuple(view.axes[d] for d in moved)  # type: ignore[index]
        return _View(view.leaf, axes, view.plain and eqn.name in RENAMING)
    return None


def _moved_ones(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...] | None:
    """Which axis each axis of a reshaped array was, where only axes of size one have moved (as of Keras' depthwise kernels
    `[height, width, channels, 1]`); None otherwise."""
    wide, ones = ([d for d, n in enumerate(before) if (n == 1) == single] for single in (False, True))
    if len(after) != len(before) or [n for n in after if n > 1] != [before[d] for d in wide]:
        return None
    return tuple((ones if n == 1 else wide).pop(0) for n in after)


def product(factors: Sequence[Sequence[tuple[int, tuple[Atom, ...]]]]) -> list[tuple[int, tuple[Atom, ...]]]:
    """The product of polynomials."""
    result: list[tuple[int, tuple[Atom, ...]]] = [(1, ())]
    for factor in factors:
        result = [(c * d, a + b) for c, a in result for d, b in factor]
    return result

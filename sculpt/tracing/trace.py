"""`trace`: the layers, coupled-axis groups and frozen axes of a model, found in its jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sculpt.model import Model
from sculpt.tracing.axes import Atom, Axes, Axis
from sculpt.tracing.program import Equation, Program, flatten
from sculpt.tracing.rules import Flow
from sculpt.tracing.zeros import unsound_atoms


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
class Group:
    """Coupled axes: units that can only be removed together, everywhere at once."""

    index: int
    name: str
    size: int
    """Number of units (channels, neurons)."""
    atom: Atom
    """The free atom of the trace's axes that these units are."""
    slots: tuple[tuple[int, int], ...]
    """Every (leaf index, axis) that the units occupy."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An axis of a parameter that cannot be pruned."""

    name: str
    """Leaf path and axis."""
    size: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """An operation with a kernel: a convolution or a matrix product with a parameter."""

    index: int
    name: str
    """Tree path of the kernel, without the last part."""
    kind: str
    """"conv" or "dense"."""
    leaf: int
    """Index of the kernel's leaf."""
    equation: int
    """Position of the operation in the flat program."""
    macs: int
    """Multiply-accumulates for one image; positions over padding are counted, as is usual."""
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    in_channels: int
    out_channels: int
    out_spatial: tuple[int, ...]
    window: tuple[Atom, ...]
    """Atoms of the kernel's spatial axes (size-one axes left out)."""
    window_axes: tuple[int, ...]
    """The kernel axes that `window` belongs to."""
    monomials: tuple[tuple[int, tuple[Atom, ...]], ...]
    """Multiply-accumulates as a polynomial: (coefficient, atoms whose sizes multiply) per monomial."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What `trace` found. Compares and hashes by identity: jitted code takes it as a static argument."""

    leaves: tuple[Leaf, ...]
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    """Shape of one image, without the batch."""
    num_classes: int
    program: Program
    flow: Flow
    """Axes of every value of `program`."""
    leaf_monomials: tuple[tuple[tuple[int, tuple[Atom, ...]], ...], ...]
    """Size of each parameter leaf as a polynomial in atom sizes."""

    @property
    def axes(self) -> Axes:
        return self.flow.axes

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense network for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def num_params(self) -> int:
        """Number of values in `params`."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves)

    def leaf_term(self, index: int) -> tuple[Axis, ...]:
        """The axes of a parameter leaf."""
        return self.flow.terms[self.program.inputs[index]]


def leaf_paths(tree: Any) -> list[str]:
    """The paths of a pytree's leaves, parts joined by "/" (the `value` of Flax NNX variables left out)."""
    paths = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
        if len(parts) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey):
            parts = parts[:-1]
        paths.append("/".join(parts))
    return paths


def shapes_of(tree: Any) -> Any:
    """The tree with arrays replaced by `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def trace(model: Model, example_input: Any) -> Trace:
    """Finds what can be pruned in a model, from the jaxpr of its evaluation function; never runs the network.

    Args:
      model: the model; its arrays may be `jax.ShapeDtypeStruct`s.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]`; only the shape past the batch and the dtype matter.

    Raises:
      ValueError: if no operation of the network reads a parameter, or the output is not `[batch, classes]`.
    """
    shape = tuple(np.shape(example_input))
    if not shape:
        raise ValueError("trace expected an example input [batch, ...], got a scalar")
    dtype = example_input.dtype if hasattr(example_input, "dtype") else np.asarray(example_input).dtype
    # Two images, so that the batch is told from axes of size one.
    image = jax.ShapeDtypeStruct((2, *shape[1:]), dtype)
    params, state = shapes_of(model.params), shapes_of(model.state)
    program = flatten(model.apply, params, state, image)
    paths = leaf_paths(params)
    leaves = tuple(
        Leaf(i, p, tuple(x.shape), x.dtype) for i, (p, x) in enumerate(zip(paths, jax.tree.leaves(params)))
    )
    read = {o for eqn in program.equations for o in eqn.inputs if isinstance(o, int)}
    if not read & set(program.inputs[: len(leaves)]):
        raise ValueError(
            f"trace found no operation that reads any of the {len(leaves)} parameters: pass them to the function as "
            "its `params` argument instead of closing over them"
        )
    output = program.shape(program.outputs[0])
    if len(program.outputs) != 1 or len(output) != 2:
        shapes = [program.shape(o) for o in program.outputs]
        raise ValueError(f"trace expected one output [batch, classes], got {shapes} for a batch of 2")
    flow = axis_flow(program)
    for value, axes in ((program.inputs[-1], "network input"), (program.outputs[0], "network output")):
        for axis in flow.term(value):
            flow.axes.freeze(axis, axes)
    for atom, reason in unsound_atoms(flow, program.inputs[: len(leaves)]).items():
        flow.axes.freeze(((atom,),), reason)
    layers = tuple(_layers(flow, leaves))
    groups = tuple(_groups(flow, leaves, layers))
    monomials = tuple(
        tuple(_product([flow.axes.monomials(a) for a in flow.terms[program.inputs[leaf.index]]]))
        for leaf in leaves
    )
    return Trace(
        leaves=leaves,
        groups=groups,
        frozen=tuple(_frozen(flow, leaves)),
        layers=layers,
        input_shape=shape[1:],
        num_classes=output[1],
        program=program,
        flow=flow,
        leaf_monomials=monomials,
    )


def axis_flow(program: Program) -> Flow:
    """Runs the axis-flow rules over a whole program."""
    flow = Flow(program, Axes())
    for value in (*program.inputs, *program.constants):
        flow.terms[value] = flow.fresh(program.shape(value))
    for eqn in program.equations:
        flow.step(eqn)
    return flow


def _groups(flow: Flow, leaves: Sequence[Leaf], layers: Sequence[Layer]) -> list[Group]:
    slots: dict[Atom, list[tuple[int, int]]] = {}
    for leaf in leaves:
        for dim, axis in enumerate(flow.terms[flow.program.inputs[leaf.index]]):
            for atom in flow.axes.atoms(axis):
                if flow.axes.frozen(atom) is None:
                    slots.setdefault(atom, []).append((leaf.index, dim))
    # Groups are listed in the order in which the network first computes them.
    order: dict[Atom, None] = {}
    for eqn in flow.program.equations:
        for output in eqn.outputs:
            for axis in flow.terms[output]:
                for atom in flow.axes.atoms(axis):
                    if atom in slots:
                        order.setdefault(atom)
    named: dict[str, int] = {}
    groups = []
    producer = {layer.leaf: layer for layer in reversed(layers)}
    for index, atom in enumerate([*order, *(a for a in slots if a not in order)]):
        outputs = [(i, d) for i, d in slots[atom] if i in producer and d == len(leaves[i].shape) - 1]
        leaf, dim = min(outputs, key=lambda slot: producer[slot[0]].equation, default=slots[atom][0])
        name = producer[leaf].name if leaf in producer else f"{leaves[leaf].path}:{dim}"
        named[name] = named.get(name, 0) + 1
        if named[name] > 1:
            name = f"{name}.{named[name]}"
        groups.append(Group(index, name, flow.axes.atom_size(atom), atom, tuple(dict.fromkeys(slots[atom]))))
    return groups


def _frozen(flow: Flow, leaves: Sequence[Leaf]) -> list[Frozen]:
    rows = []
    for leaf in leaves:
        for dim, axis in enumerate(flow.terms[flow.program.inputs[leaf.index]]):
            reasons = [flow.axes.frozen(a) for a in flow.axes.atoms(axis)]
            reasons = [r for r in reasons if r is not None]
            if leaf.shape[dim] == 1:
                reasons = ["size one"]
            if reasons:
                rows.append(Frozen(f"{leaf.path}:{dim}", leaf.shape[dim], "; ".join(dict.fromkeys(reasons))))
    return rows


def _layers(flow: Flow, leaves: Sequence[Leaf]) -> list[Layer]:
    from_leaf = {value: i for i, value in enumerate(flow.program.inputs[: len(leaves)])}
    batch = flow.terms[flow.program.inputs[-1]][0]
    batch_atoms = set(flow.axes.atoms(batch))
    layers: list[Layer] = []
    for position, eqn in enumerate(flow.program.equations):
        for output, operand in zip(eqn.outputs, eqn.inputs):
            # A cast or a copy of a parameter is still that parameter.
            renamed = eqn.name in ("convert_element_type", "copy", "transpose", "reshape")
            if renamed and isinstance(operand, int) and operand in from_leaf:
                from_leaf[output] = from_leaf[operand]
        if eqn.name not in ("conv_general_dilated", "dot_general"):
            continue
        kernels = [i for i in eqn.inputs if isinstance(i, int) and i in from_leaf]
        if kernels:
            layers.append(
                _layer(
                    flow, leaves, eqn, position, len(layers), kernels[-1], from_leaf[kernels[-1]], batch_atoms
                )
            )
    return layers


def _layer(
    flow: Flow,
    leaves: Sequence[Leaf],
    eqn: Equation,
    position: int,
    index: int,
    kernel: Any,
    leaf: int,
    batch: set[Atom],
) -> Layer:
    output = flow.terms[eqn.outputs[0]]
    shape = flow.program.shape(kernel)
    window: tuple[Atom, ...] = ()
    window_axes: tuple[int, ...] = ()
    if eqn.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        term = flow.term(eqn.inputs[1])
        factors = [*output, term[numbers.rhs_spec[1]], *(term[d] for d in numbers.rhs_spec[2:])]
        kernel_size = tuple(shape[d] for d in numbers.rhs_spec[2:])
        direct = eqn.inputs[1] == flow.program.inputs[leaf]
        if direct:
            window_axes = tuple(d for d in numbers.rhs_spec[2:] if shape[d] > 1)
            window = tuple(flow.axes.atoms(term[d])[0] for d in window_axes)
        kind, strides = "conv", tuple(eqn.params["window_strides"])
        groups = eqn.params["feature_group_count"]
        channels = (shape[numbers.rhs_spec[1]] * groups, shape[numbers.rhs_spec[0]])
        out_shape = flow.program.shape(eqn.outputs[0])
        out_spatial = tuple(out_shape[d] for d in numbers.out_spec[2:])
    else:
        (lhs_sum, rhs_sum), _ = eqn.params["dimension_numbers"]
        side, summed = (1, rhs_sum) if eqn.inputs[1] == kernel else (0, lhs_sum)
        term = flow.term(eqn.inputs[side])
        factors = [*output, *(term[d] for d in summed)]
        inputs = int(np.prod([shape[d] for d in summed]))
        kind, strides, kernel_size, out_spatial = "dense", (), (), ()
        channels = (inputs, int(np.prod(shape)) // inputs)
    monomials = []
    for coefficient, atoms in _product([flow.axes.monomials(a) for a in factors]):
        monomials.append((coefficient, tuple(a for a in atoms if a not in batch)))
    macs = sum(c * int(np.prod([flow.axes.atom_size(a) for a in atoms])) for c, atoms in monomials)
    name = leaves[leaf].path.rsplit("/", 1)[0]
    return Layer(
        index, name, kind, leaf, position, macs, kernel_size, strides, *channels, out_spatial, window, window_axes,
        tuple(monomials),
    )  # fmt: skip


def _product(
    factors: Sequence[list[tuple[int, tuple[Atom, ...]]]],
) -> list[tuple[int, tuple[Atom, ...]]]:
    product: list[tuple[int, tuple[Atom, ...]]] = [(1, ())]
    for factor in factors:
        product = [(c * d, a + b) for c, a in product for d, b in factor]
    return product

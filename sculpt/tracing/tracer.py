"""`trace`: the layers, coupled-axis groups and frozen axes of a model, found in its jaxpr."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

# Importing these four registers their rules.
import sculpt.tracing.bodies
import sculpt.tracing.indexing
import sculpt.tracing.rules
import sculpt.tracing.zero_rules  # noqa: F401
from sculpt.arguments import checked
from sculpt.ir.program import FlatProgram, ImpureProgram, flatten
from sculpt.model import Model
from sculpt.tracing.axes import Atom, Axes, Axis
from sculpt.tracing.flow import Flow, because
from sculpt.tracing.layers import Layer, Leaf, Monomials, Product, find_layers, product
from sculpt.tracing.zeros import find_unsound
from sculpt.trees import leaf_paths, shapes_of

TRACED_BATCH = 2
"""Examples that a network is traced for, where it takes any number."""


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
    """An axis of a parameter that cannot be pruned, or not as a whole."""

    leaf: int
    axis: int
    name: str
    """Leaf path and axis."""
    size: int
    in_part: bool
    """Whether some of it can be pruned, such as whole groups of the channels that a GroupNorm takes together."""
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What `trace` found. Compares and hashes by identity: jitted code takes it as a static argument. A copy is the trace itself; pickled,
    it is the model's functions, which are traced again where it is loaded."""

    leaves: tuple[Leaf, ...]
    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    layers: tuple[Layer, ...]
    products: tuple[Product, ...]
    """Matrix products and convolutions without a kernel of their own: of activations with each other, or with a part that was cut out of
    a parameter."""
    inputs: Any
    """Tree of `ShapeDtypeStruct`, of size 2 along `batch_axis`: what the network was traced on; most take one array."""
    batch_axis: int | None
    """The axis of the inputs along which there may be any number of examples; None: there is no such axis."""
    program: FlatProgram
    flow: Flow
    """Axes of every value of `program`."""
    leaf_monomials: tuple[Monomials, ...]
    """Size of each parameter leaf as a polynomial in atom sizes."""
    model: Model = dataclasses.field(repr=False)
    """The model that was traced, with shapes in the place of its arrays."""

    def __copy__(self) -> Trace:
        return self

    def __deepcopy__(self, _: Any) -> Trace:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _traced_again, (self.model, self.inputs, self.batch_axis, self.leaves, self.groups)

    def __repr__(self) -> str:
        return (
            f"Trace({len(self.layers)} layers, {len(self.groups)} groups of coupled axes, {self.macs:,} MACs, "
            f"{self.num_params:,} parameters)"
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch.

        Raises:
          ValueError: if the network takes other than one array.
        """
        return self.image.shape[1:]

    @property
    def input_dtype(self) -> np.dtype:
        """Dtype of an image; raises `ValueError` like `input_shape`."""
        return np.dtype(self.image.dtype)

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        """What the network takes, `[batch, ...]`; raises `ValueError` like `input_shape`."""
        arrays = jax.tree.leaves(self.inputs)
        if len(arrays) != 1:
            raise ValueError(f"expected a network of one input array, this one takes {len(arrays)}")
        return arrays[0]

    @property
    def axes(self) -> Axes:
        return self.flow.axes

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense network for one example along `batch_axis`, or for one call where that is None."""
        return sum(operation.macs for operation in (*self.layers, *self.products))

    @property
    def num_params(self) -> int:
        """Number of values in `params`."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves)

    def leaf_term(self, index: int) -> tuple[Axis, ...]:
        """The axes of a parameter leaf."""
        return self.flow.terms[self.program.inputs[index]]


def leaves_of(params: Any) -> tuple[Leaf, ...]:
    """The arrays of parameters (shapes are enough), in order."""
    arrays = zip(leaf_paths(params), jax.tree.leaves(params))
    return tuple(Leaf(i, path, tuple(x.shape), x.dtype) for i, (path, x) in enumerate(arrays))


@checked
def trace(model: Model, example_input: Any, batch_axis: int | None = 0) -> Trace:
    """Finds what can be pruned in a model, from the jaxpr of its evaluation function; never runs the network.

    Args:
      model: the model; its arrays may be `jax.ShapeDtypeStruct`s.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]`, or a pytree of them where `model.apply` takes one as its `x`;
        only shapes without the batch and dtypes matter.
      batch_axis: axis of the inputs along which there may be any number of examples: 1 for sequences `[time, batch, ...]`, None if there is
        none, as in a network of fixed nodes. MACs are per example along that axis, or per call. A network that does not take two
        examples is traced as if None were given, with a warning.

    Raises:
      ValueError: if no operation of the network reads a parameter, the input holds a scalar, there are mutable arrays (`jax.Ref`), or
        `batch_axis` is another number.
    """
    if batch_axis not in (0, 1, None):
        raise ValueError(f"batch_axis must be 0, 1 or None, got {batch_axis!r}")
    params, state = shapes_of(model.params), shapes_of(model.state)
    program, inputs, batch_axis = _evaluation_program(model, (params, state), example_input, batch_axis)
    leaves = leaves_of(params)
    read = {o for eqn in program.equations for o in eqn.inputs if isinstance(o, int)}
    if not read & set(program.inputs[: len(leaves)]):
        raise ValueError(
            f"trace found no operation that reads any of the {len(leaves)} parameters: pass them to the function as "
            "its `params` argument instead of closing over them"
        )
    flow = axis_flow(program)
    _freeze_random(flow)
    images = program.inputs[-len(jax.tree.leaves(inputs)) :]
    for value in images:
        flow.freeze(flow.term(value), "network input")
    for output in program.outputs:
        flow.freeze(flow.term(output), "network output")
    weights = program.inputs[: len(leaves)]
    others = program.inputs[len(leaves) : -len(images)]
    if not read.issuperset(v for v in (*weights, *others) if program.shape(v)):
        _follow_training(flow, model, (params, state, inputs), weights, others, read)
    for atom, reason in find_unsound(flow, weights).unsound.items():
        flow.axes.freeze(((atom,),), reason)
    layers, products = find_layers(flow, leaves, images, batch_axis)
    groups = tuple(_groups(flow, leaves, layers))
    monomials = tuple(
        tuple(product([flow.axes.monomials(a) for a in flow.terms[program.inputs[leaf.index]]]))
        for leaf in leaves
    )
    return Trace(
        leaves=leaves,
        groups=groups,
        frozen=tuple(_frozen(flow, leaves)),
        layers=layers,
        products=products,
        inputs=inputs,
        batch_axis=batch_axis,
        program=program,
        flow=flow,
        leaf_monomials=monomials,
        model=model.replace(params=params, state=state),
    )


def _evaluation_program(
    model: Model, arrays: tuple[Any, Any], example_input: Any, batch_axis: int | None
) -> tuple[FlatProgram, Any, int | None]:
    """The program for two examples, the inputs that it takes, and the axis of the examples; for inputs of the given shapes, and None, if
    the network does not take two."""
    given = jax.tree.map(_shape_of, example_input)
    inputs = given if batch_axis is None else jax.tree.map(lambda x: _two_of(x, batch_axis), example_input)
    try:
        return flatten(model.apply, *arrays, inputs), inputs, batch_axis
    except ImpureProgram:
        raise
    except Exception as error:  # each framework has its own
        program = None
        if inputs != given:
            with contextlib.suppress(Exception):
                program = flatten(model.apply, *arrays, given)
        if program is None:
            shapes = ", ".join(
                f"{x.dtype}{['batch' if d == batch_axis else n for d, n in enumerate(x.shape)]}".replace(
                    "'", ""
                )
                for x in jax.tree.leaves(inputs)
            )
            raise ValueError(f"the model does not take the example input {shapes}: {error}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(
        f"the network does not take two examples along axis {batch_axis} of its inputs ({reason}): traced for inputs of the given "
        "shapes, MACs are per call; pass batch_axis=None if that is right",
        stacklevel=4,
    )
    return program, given, None


def _traced_again(
    model: Model, inputs: Any, batch_axis: int | None, leaves: tuple[Leaf, ...], groups: tuple[Group, ...]
) -> Trace:
    """A trace that was pickled; policies refer to its groups by number.

    Raises:
      ValueError: if the trace is another one now.
    """
    found = trace(model, inputs, batch_axis)
    if (found.leaves, found.groups) != (leaves, groups):
        raise ValueError(
            "the pickled trace was made with another version of the network, of JAX or of this library: trace the model again"
        )
    return found


def _shape_of(example: Any) -> jax.ShapeDtypeStruct:
    array = example if hasattr(example, "dtype") else np.asarray(example)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _two_of(example: Any, axis: int) -> jax.ShapeDtypeStruct:
    """Two examples, so that the batch is told from axes of size one; arrays without that axis stay as they are."""
    array = _shape_of(example)
    if not array.shape:
        raise ValueError(
            f"trace expected an example input [batch, ...], an array or jax.ShapeDtypeStruct(shape, dtype), got {example!r}"
        )
    if len(array.shape) <= axis:
        return array
    return jax.ShapeDtypeStruct((*array.shape[:axis], TRACED_BATCH, *array.shape[axis + 1 :]), array.dtype)


def _freeze_random(flow: Flow) -> None:
    """Numbers drawn in evaluation stay as many as they are: of fewer each would be another."""
    for eqn in flow.program.equations:
        if eqn.name in ("random_bits", "rng_uniform") and not flow.program.is_table(eqn):
            flow.freeze(flow.terms[eqn.outputs[0]], because(eqn, "random numbers"))
        for body in flow.bodies.get(id(eqn), ()):
            _freeze_random(body)


def _follow_training(
    flow: Flow,
    model: Model,
    arguments: tuple[Any, ...],
    weights: Sequence[int],
    others: Sequence[int],
    read: set[int],
) -> None:
    """Couples what only training reads to what evaluation reads too: weights (such as those of an auxiliary head), and arrays of the state
    (such as the sums that a running mean is made of)."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        outputs, _ = jax.eval_shape(model.apply_train, *arguments, key)
        program = flatten(model.apply_train, *arguments, key)
    except Exception:  # each framework has its own; what cannot be trained reads nothing in training
        for value in set(weights) - read:
            flow.freeze(flow.term(value), "not read in evaluation")
        return
    training = Flow(program, flow.axes, [*map(flow.term, flow.program.inputs), ()])
    count = len(jax.tree.leaves(outputs))
    for term in training.results[:count]:
        flow.freeze(term, "network output")
    for value, term in zip(others, training.results[count:]):
        flow.unify(flow.term(value), term, "new state and old state differ in structure")
    for atom, reason in find_unsound(training, program.inputs[: len(weights)]).unsound.items():
        flow.axes.freeze(((atom,),), reason)
    atoms = {value: {a for axis in flow.term(value) for a in flow.axes.atoms(axis)} for value in weights}
    used = set().union(*(atoms[value] for value in read.intersection(weights)))
    for atom in set().union(*atoms.values()) - used:
        flow.axes.freeze(((atom,),), "not read in evaluation")


def axis_flow(program: FlatProgram) -> Flow:
    """Runs the axis-flow rules over a whole program, whose inputs are unrelated to begin with."""
    axes = Axes()
    inputs = [tuple(axes.fresh(n) for n in program.shape(value)) for value in program.inputs]
    return Flow(program, axes, inputs)


def _groups(flow: Flow, leaves: Sequence[Leaf], layers: Sequence[Layer]) -> list[Group]:
    slots: dict[Atom, list[tuple[int, int]]] = {}
    for leaf in leaves:
        for dim, axis in enumerate(flow.terms[flow.program.inputs[leaf.index]]):
            for atom in flow.axes.atoms(axis):
                if flow.axes.frozen(atom) is None:
                    slots.setdefault(atom, []).append((leaf.index, dim))
    # Groups are listed in the order in which the network first computes them.
    order: dict[Atom, None] = {}
    for axis in _computed_axes(flow):
        for atom in flow.axes.atoms(axis):
            if atom in slots:
                order.setdefault(atom)
    named: dict[str, int] = {}
    groups = []
    producer = {layer.leaf: layer for layer in reversed(layers)}
    prunable = [
        atom for atom in (*order, *(a for a in slots if a not in order)) if flow.axes.atom_size(atom) > 1
    ]
    for index, atom in enumerate(prunable):
        outputs = [(i, d) for i, d in slots[atom] if i in producer and d in producer[i].out_axes]
        leaf, dim = min(outputs, key=lambda slot: producer[slot[0]].index, default=slots[atom][0])
        name = producer[leaf].name if leaf in producer else f"{leaves[leaf].path}:{dim}"
        named[name] = named.get(name, 0) + 1
        if named[name] > 1:
            name = f"{name}.{named[name]}"
        groups.append(Group(index, name, flow.axes.atom_size(atom), atom, tuple(dict.fromkeys(slots[atom]))))
    return groups


def _computed_axes(flow: Flow) -> Iterator[Axis]:
    for eqn in flow.program.equations:
        for body in flow.bodies.get(id(eqn), ()):
            yield from _computed_axes(body)
        for output in eqn.outputs:
            yield from flow.terms[output]


def _has_single_units(axes: Axes, axis: Axis) -> bool:
    """Whether an axis is put together of parts one of which has a single unit, that cannot go: nothing would be left of it."""
    single = [segment for segment in axes.resolve(axis) if axes.size((segment,)) == 1]
    return any(all(axes.frozen(atom) is None for atom in segment) for segment in single)


def _frozen(flow: Flow, leaves: Sequence[Leaf]) -> list[Frozen]:
    rows = []
    for leaf in leaves:
        for dim, axis in enumerate(flow.terms[flow.program.inputs[leaf.index]]):
            atoms = flow.axes.atoms(axis)
            reasons = [r for r in map(flow.axes.frozen, atoms) if r is not None]
            free = [a for a in atoms if flow.axes.frozen(a) is None and flow.axes.atom_size(a) > 1]
            if leaf.shape[dim] == 1:
                reasons = ["size one"]
            elif not (free or reasons) or _has_single_units(flow.axes, axis):
                reasons.append("single units side by side")
            if reasons:
                rows.append(
                    Frozen(
                        leaf.index,
                        dim,
                        f"{leaf.path}:{dim}",
                        leaf.shape[dim],
                        bool(free),
                        "; ".join(dict.fromkeys(reasons)),
                    )
                )
    return rows

"""Writes a flat program as an ONNX graph: tensors with a layout, nodes, initializers, the table of operations.

JAX networks keep channels last, ONNX has them first. So each tensor of the graph remembers in which order it holds the axes of
the value that it stands for, and an axis order is a matter of names until an operation insists on one: a transposed value is the
same tensor in another order. Transpose nodes appear only where a tensor must be held otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import export

from sculpt.ir.program import Equation, FlatProgram, Literal, Operand, size_at


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A value of the program as the graph holds it."""

    name: str | None
    """In the graph; None for an array that is not in it yet."""
    order: tuple[int, ...]
    """Axis `k` of the tensor is axis `order[k]` of the value."""
    shape: tuple[Any, ...]
    """Of the value; sizes may be symbolic."""
    array: np.ndarray | None = None
    """The value itself, axes in their own order, where it is known."""
    label: str = "constant"
    """What to call an array."""

    @property
    def rank(self) -> int:
        return len(self.shape)

    def place(self, axis: int) -> int:
        """Where the tensor holds an axis of the value."""
        return self.order.index(axis)

    def relabelled(self, permutation: Sequence[int]) -> Tensor:
        """The value transposed: the same tensor under another order."""
        order = tuple(permutation.index(axis) for axis in self.order)
        shape = tuple(self.shape[d] for d in permutation)
        array = None if self.array is None else self.array.transpose(permutation)
        return Tensor(
            self.name, order if array is None else tuple(range(self.rank)), shape, array, self.label
        )


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxNode:
    """One ONNX operator applied to tensors, by name."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def renamed(self, old: str, new: str) -> OnnxNode:
        """The node with one tensor under another name."""
        inputs, outputs = (
            tuple(new if n == old else n for n in names) for names in (self.inputs, self.outputs)
        )
        return OnnxNode(self.operator, inputs, outputs, self.attributes)


class Unsupported(ValueError):
    """An operation that has no ONNX counterpart here; the message says why."""


class Writer:
    """A graph under construction.

    Args:
      program: takes arrays, then images (one array or several).
      arrays: the arrays.
      labels: their names.
      opset: version of ONNX's operators.
      inputs: by the name of each of the graph's inputs, the order in which it holds the axes of those images.
      result: name of the graph's output.
    """

    def __init__(
        self,
        program: FlatProgram,
        arrays: Sequence[Any],
        labels: Sequence[str],
        opset: int,
        inputs: Mapping[str, tuple[int, ...]],
        result: str,
    ) -> None:
        self.program = program
        self.opset = opset
        self.inputs, self._result = dict(inputs), result
        self.nodes: list[OnnxNode] = []
        self.arrays: dict[str, np.ndarray] = {}
        """By name."""
        self._digests: dict[str, str] = {}
        self._producers: dict[str, OnnxNode] = {}
        self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
        self._counts: dict[str, int] = {}
        self._tensors: dict[int, Tensor] = {}
        self.readers: dict[int, int] = {}
        """How many operands each value is."""
        self.equations: dict[int, Equation] = {o: eqn for eqn in program.equations for o in eqn.outputs}
        """The equation that gives each value."""
        for operand in (*(i for eqn in program.equations for i in eqn.inputs), *program.outputs):
            if not isinstance(operand, Literal):
                self.readers[operand] = self.readers.get(operand, 0) + 1
        values, images = program.inputs[: -len(inputs)], program.inputs[-len(inputs) :]
        for value, array, label in zip(values, arrays, labels, strict=True):
            array = np.asarray(array)
            self._tensors[value] = Tensor(None, tuple(range(array.ndim)), array.shape, array, label)
        for value, (name, layout) in zip(images, inputs.items(), strict=True):
            self._tensors[value] = Tensor(name, layout, program.shape(value))

    def tensor(self, operand: Operand) -> Tensor:
        """The tensor of an operand."""
        if isinstance(operand, Literal):
            array = np.asarray(operand.value)
            return Tensor(None, tuple(range(array.ndim)), array.shape, array)
        return self._tensors[operand]

    def put(self, eqn: Equation, tensors: Sequence[Tensor]) -> None:
        """Notes the results of an equation."""
        for output, tensor in zip(eqn.outputs, tensors, strict=True):
            if tensor.shape != self.program.shape(output):
                raise AssertionError(
                    f"the operation {eqn.name} gave {tensor.shape}, expected {self.program.shape(output)}"
                )
            self._tensors[output] = tensor

    def dtype(self, operand: Operand) -> np.dtype:
        """Of an operand."""
        if isinstance(operand, Literal):
            return np.asarray(operand.value).dtype
        return np.dtype(self.program.avals[operand].dtype)

    def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node of one output; returns the name of that."""
        return self.node_of(operator, inputs, 1, **attributes)[0]

    def node_of(
        self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node of several outputs; returns their names."""
        names = tuple(self._fresh(operator) for _ in range(outputs))
        self._add(OnnxNode(operator, tuple(inputs), names, attributes))
        return names

    def _add(self, node: OnnxNode) -> None:
        self.nodes.append(node)
        self._producers.update(dict.fromkeys(node.outputs, node))

    def producer(self, name: str) -> OnnxNode | None:
        """The node that gives a tensor."""
        return self._producers.get(name)

    def replace(self, node: OnnxNode, **changes: Any) -> None:
        """Changes a node that is there already."""
        place = next(i for i, known in enumerate(self.nodes) if known is node)
        self.nodes[place] = dataclasses.replace(node, **changes)
        self._producers.update(dict.fromkeys(node.outputs, self.nodes[place]))

    def _fresh(self, stem: str) -> str:
        self._counts[stem] = self._counts.get(stem, 0) + 1
        name = f"{stem}_{self._counts[stem]}"
        return self._fresh(stem) if name in self.arrays or self._is_end(name) else name

    def _is_end(self, name: str) -> bool:
        """Whether it is the name of an input or of the output of the graph, which nothing else may have."""
        return name in self.inputs or name == self._result

    def constant(self, array: Any, label: str = "constant") -> str:
        """The name of an array; equal ones are kept once."""
        array = np.asarray(array, order="C")
        digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
        if digest not in self._digests:
            name, number = label, 1
            while name in self.arrays or name in self._producers or self._is_end(name):
                number += 1
                name = f"{label}.{number}"
            self.arrays[name] = array
            self._digests[digest] = name
        return self._digests[digest]

    def integers(self, *values: int) -> str:
        """The name of a list of 64-bit integers, such as axes."""
        return self.constant(np.asarray(values, np.int64))

    def held(self, tensor: Tensor, order: Sequence[int] | None = None) -> str:
        """The name of a tensor held in an order; None: in the value's own."""
        order = tuple(range(tensor.rank)) if order is None else tuple(order)
        if tensor.array is not None:
            return self.constant(tensor.array.transpose(order), tensor.label)
        assert tensor.name is not None
        if order == tensor.order:
            return tensor.name
        permutation = tuple(tensor.place(axis) for axis in order)
        key = (tensor.name, permutation)
        if key not in self._transposed:
            self._transposed[key] = self.node("Transpose", [tensor.name], perm=permutation)
        return self._transposed[key]

    def sizes(self, shape: Sequence[Any]) -> str:
        """The name of a shape for Reshape, of which one size may be open.

        Raises:
          Unsupported: if more are.
        """
        opened = [n for n in shape if export.is_symbolic_dim(n)]
        if len(opened) > 1:
            raise Unsupported(f"shape {list(shape)} has several open sizes")
        return self.integers(*(-1 if export.is_symbolic_dim(n) else n for n in shape))

    def expanded_sizes(self, shape: Sequence[Any]) -> str:
        """The name of a shape for Expand. Open sizes are multiples of the images' batch, which is read from the graph's input.

        Raises:
          Unsupported: if they are anything else.
        """
        if not any(map(export.is_symbolic_dim, shape)):
            return self.integers(*shape)
        parts = []
        for size in shape:
            if export.is_symbolic_dim(size):
                one, two = (size_at(size, n) for n in (1, 2))
                if two != 2 * one:
                    raise Unsupported(f"size {size} is no multiple of the batch")
                parts.append(self._batch if one == 1 else self.node("Mul", [self._batch, self.integers(one)]))
            else:
                parts.append(self.integers(size))
        return self.node("Concat", parts, axis=0)

    @functools.cached_property
    def _batch(self) -> str:
        """The name of the number of images, a list of one integer."""
        images = self._tensors[self.program.inputs[-1]]
        assert images.name is not None
        return self.node(
            "Gather", [self.node("Shape", [images.name]), self.integers(images.place(0))], axis=0
        )

    def finish(self) -> None:
        """Gives the result its name and drops what nobody reads."""
        output = self._result
        result = self.held(self.tensor(self.program.outputs[0]))
        if self.producer(result) is None:
            self._add(OnnxNode("Identity", (result,), (output,), {}))
        else:
            self.nodes = [node.renamed(result, output) for node in self.nodes]
        needed, kept = {output}, []
        for node in reversed(self.nodes):
            if needed & set(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.arrays = {name: array for name, array in self.arrays.items() if name in needed}


Operation = Callable[[Writer, Equation], Sequence[Tensor]]
OPERATIONS: dict[str, Operation] = {}
"""Primitive name -> what writes it."""
Idiom = Callable[[Writer, Equation], Tensor | None]
IDIOMS: dict[str, list[Idiom]] = {}
"""Primitive name -> what recognises an operator of ONNX that ends in it; None where it is not there."""


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Registers what writes primitives of these names."""

    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def idiom(*names: str) -> Callable[[Idiom], Idiom]:
    """Registers what recognises an operator of ONNX that ends in primitives of these names."""

    def register(function: Idiom) -> Idiom:
        for name in names:
            IDIOMS.setdefault(name, []).append(function)
        return function

    return register


def write_equation(writer: Writer, eqn: Equation) -> None:
    """Writes one equation.

    Raises:
      Unsupported: if there is no ONNX for it.
    """
    for recognise in IDIOMS.get(eqn.name, ()):
        tensor = recognise(writer, eqn)
        if tensor is not None:
            writer.put(eqn, [tensor])
            return
    if eqn.name not in OPERATIONS:
        raise Unsupported("there is no ONNX for it here")
    writer.put(eqn, OPERATIONS[eqn.name](writer, eqn))


def number_of(shape: Sequence[Any]) -> int:
    """The product of known sizes."""
    return math.prod(int(n) for n in shape)

"""Chains: a layer and the scales and shifts after it, which can be folded into its weights.

After a convolution or a dense layer with constant weights, BatchNorm in evaluation is a scale and a shift per channel:
`(conv(x, k) - mean) * s + b = conv(x, k * s) + (b - mean * s)`. The same holds of any chain of additions, subtractions,
products and quotients with constants that differ between channels only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sculpt.ir.program import Equation, FlatProgram, Literal, Operand

_SHIFTS = ("add", "sub")
_SCALES = ("mul", "div", "neg")
FOLDED_DTYPES = (jnp.float32, jnp.float64)
"""Half precision is left as it is: a scaled weight would be rounded again."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A layer and the scales and shifts that go into it."""

    equation: int
    """Position of the layer among the program's equations."""
    operand: int
    """Which of its operands is the kernel."""
    axes: tuple[int | None, ...]
    """For every axis of the kernel that axis of the output; None for those that are summed over."""
    steps: tuple[int, ...]
    """Positions of the equations that go."""
    kernel: int
    """Id of the new kernel."""
    shift: int | None
    """Id of the array that is added after the layer; None where nothing is."""

    def shape_of_constants(self, output: Sequence[Any]) -> tuple[int, ...]:
        """Shape of what scales or shifts the output: 1 along the axes that are not the kernel's."""
        return tuple(n if d in self.axes else 1 for d, n in enumerate(output))


def find_chains(program: FlatProgram, constants: set[int]) -> tuple[Chain, ...]:
    """The layers with constant kernels that scales and shifts follow, which nothing else reads."""
    readers: dict[int, list[int]] = {}
    for place, eqn in enumerate(program.equations):
        for value in eqn.inputs:
            if not isinstance(value, Literal):
                readers.setdefault(value, []).append(place)
    results = {o for o in program.outputs if not isinstance(o, Literal)}
    chains: list[Chain] = []
    fresh = len(program.avals)
    for place, eqn in enumerate(program.equations):
        found = None if eqn.outputs[0] in constants else kernel_of(program, eqn, constants)
        if found is None:
            continue
        operand, axes = found
        # Of half precision are perhaps the kernel alone, and sums in full.
        values = (v for v in (eqn.inputs[operand], eqn.outputs[0]) if isinstance(v, int))
        if any(program.avals[v].dtype not in FOLDED_DTYPES for v in values):
            continue
        steps: list[int] = []
        value = eqn.outputs[0]
        while value not in results and len(readers.get(value, ())) == 1:
            (reader,) = readers[value]
            if not is_step(program, program.equations[reader], value, axes, constants):
                break
            steps.append(reader)
            value = program.equations[reader].outputs[0]
        operations = [program.equations[step].name for step in steps]
        # A bias by itself stays the addition that it is.
        if len(steps) > 1 or any(name in _SCALES for name in operations):
            shifts = any(name in _SHIFTS for name in operations)
            chains.append(Chain(place, operand, axes, tuple(steps), fresh, fresh + 1 if shifts else None))
            fresh += 2
    return tuple(chains)


def kernel_of(
    program: FlatProgram, eqn: Equation, constants: set[int]
) -> tuple[int, tuple[int | None, ...]] | None:
    """Which operand of a layer is constant, and the output's axis that each of its axes becomes."""
    constant = [not isinstance(i, Literal) and i in constants for i in eqn.inputs]
    if eqn.name == "conv_general_dilated":
        if constant != [False, True] or eqn.params["batch_group_count"] != 1:
            return None
        numbers = eqn.params["dimension_numbers"]
        return 1, tuple(
            numbers.out_spec[1] if d == numbers.rhs_spec[0] else None for d in range(len(numbers.rhs_spec))
        )
    if eqn.name != "dot_general" or sum(constant) != 1:
        return None
    sums, batches = eqn.params["dimension_numbers"]
    operand = constant.index(True)
    free = [
        [d for d in range(len(program.shape(i))) if d not in (*sums[k], *batches[k])]
        for k, i in enumerate(eqn.inputs)
    ]
    first = len(batches[0]) + (len(free[0]) if operand == 1 else 0)
    axes: list[int | None] = [None] * len(program.shape(eqn.inputs[operand]))
    for place, d in enumerate(batches[operand]):
        axes[d] = place
    for place, d in enumerate(free[operand]):
        axes[d] = first + place
    return operand, tuple(axes)


def is_step(
    program: FlatProgram, eqn: Equation, value: int, axes: Sequence[int | None], constants: set[int]
) -> bool:
    """Whether an equation scales or shifts `value` by a constant that differs along the kernel's own axes only."""
    aval, result = program.avals[value], program.avals[eqn.outputs[0]]
    if eqn.name not in (*_SHIFTS, *_SCALES) or (result.shape, result.dtype) != (aval.shape, aval.dtype):
        return False
    if eqn.name == "neg":
        return True
    if eqn.name == "div" and eqn.inputs[0] != value:
        return False
    other = eqn.inputs[1] if eqn.inputs[0] == value else eqn.inputs[0]
    if not isinstance(other, Literal) and other not in constants:
        return False
    shape = program.shape(other)
    return all(n == 1 or d in axes for d, n in enumerate(shape))


def folded_arrays(
    program: FlatProgram, chain: Chain, known: Mapping[int, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The new kernel, and what is added after the layer; worked out in double precision."""
    eqn = program.equations[chain.equation]
    aval = program.avals[eqn.outputs[0]]
    scale, shift = np.ones((1,) * len(aval.shape)), np.zeros((1,) * len(aval.shape))
    value = eqn.outputs[0]
    for place in chain.steps:
        step = program.equations[place]
        first = step.inputs[0] == value
        other = next((_array(i, known) for i in step.inputs if i != value), np.zeros(()))
        scale, shift = _after(step.name, first, scale, shift, other)
        value = step.outputs[0]
    shape = chain.shape_of_constants(aval.shape)
    kept = [a for a in chain.axes if a is not None]
    factor = np.broadcast_to(scale, shape).transpose(
        [*kept, *(d for d in range(len(shape)) if d not in kept)]
    )
    sizes = iter(factor.shape)
    along = tuple(1 if a is None else next(sizes) for a in chain.axes)
    kernel = _array(eqn.inputs[chain.operand], known) * factor.reshape(along)
    return kernel.astype(aval.dtype), np.broadcast_to(shift, shape).astype(aval.dtype)


def _array(operand: Operand, known: Mapping[int, Any]) -> np.ndarray:
    value = operand.value if isinstance(operand, Literal) else known[operand]
    return np.asarray(value).astype(np.float64)


def _after(
    name: str, first: bool, scale: np.ndarray, shift: np.ndarray, other: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift after one more step; `first` says whether the value is its first operand."""
    if name == "mul":
        return scale * other, shift * other
    if name == "div":
        return scale / other, shift / other
    if name == "neg":
        return -scale, -shift
    if name == "add":
        return scale, shift + other
    return (scale, shift - other) if first else (-scale, other - shift)

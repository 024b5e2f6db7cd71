"""Folding: what depends on weights alone is worked out once, and scales and shifts go into the layer before them.

After a convolution or a dense layer with constant weights, BatchNorm in evaluation is a scale and a shift per channel:
`(conv(x, k) - mean) * s + b = conv(x, k * s) + (b - mean * s)`. The same holds of any chain of additions, subtractions,
products and quotients with constants that differ between channels only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sculpt.arguments import checked
from sculpt.model import Model, Params, State
from sculpt.tracing.execute import Executable, as_written, execute
from sculpt.tracing.program import Equation, Literal, Operand, Program, flatten, inlined, with_known_sizes
from sculpt.tracing.trace import leaf_paths, shapes_of

_SHIFTS = ("add", "sub")
_SCALES = ("mul", "div", "neg")
_DTYPES = (jnp.float32, jnp.float64)
"""Half precision is left as it is: a scaled weight would be rounded again."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Chain:
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


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedProgram:
    """A program whose arrays are worked out: it takes them by position, then the images."""

    program: Program
    arrays: tuple[Any, ...]
    """The first inputs of the program."""
    names: tuple[str, ...]
    """Of the arrays: the paths of the weights that they come from."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedFunction:
    """The evaluation function of a folded model, called with its arrays."""

    program: Program
    """Takes the arrays, then images of an open batch size where the model's own code allows it."""
    names: tuple[str, ...]
    """Of the arrays."""

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        aval = self.program.avals[self.program.inputs[-1]]
        shape, dtype = jnp.shape(x), jax.dtypes.result_type(x)
        size = shape[0] if export.is_symbolic_dim(aval.shape[0]) and shape else aval.shape[0]
        if shape != (size, *aval.shape[1:]) or dtype != aval.dtype:
            expected = f"{aval.dtype}[{', '.join(map(str, aval.shape))}]"
            raise ValueError(f"the folded model takes {expected}, got {dtype}{list(shape)}")
        arrays = [params[name] if name in params else state[name] for name in self.names]
        program = _with_bodies(with_known_sizes(self.program, size))
        (result,) = execute(program, [*arrays, x], _bind)
        return result


def _with_bodies(program: Program) -> Executable:
    """The program with its loops and branches run body by body: as functions they know the batch size they were traced for."""
    bodies = {id(e): tuple(map(_with_bodies, e.bodies)) for e in program.equations if e.bodies}
    return dataclasses.replace(as_written(program), bodies=bodies)


def _bind(eqn: Equation, operands: list[Any], params: dict[str, Any]) -> Any:
    """Applies a primitive. The batch size as a value is known by now."""
    if eqn.name == "dim_as_value" and not export.is_symbolic_dim(params["dim"]):
        return jnp.asarray(params["dim"], eqn.primitive.abstract_eval(dim=1)[0].dtype)
    return eqn.primitive.bind(*operands, **params)


def _no_training(params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
    raise ValueError(
        "a folded model has no training mode: its BatchNorm is gone; train the model that it was folded from"
    )


@checked
def fold(model: Model, example_input: Any) -> Model:
    """The same function with BatchNorm, and whatever else depends on weights alone, folded into the layers.

    Works on any model, dense or compact, of any framework: what is folded is found in the program. The result is for
    evaluation: it can be exported, measured, traced and compacted, but has no training mode.

    Args:
      model: the model.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]`. Other batch sizes work too where the model's own code allows
        an open one.

    Returns:
      A model whose `params` is a dictionary from paths ("conv1/kernel", "conv1/bias") to arrays; arrays of other than floating-point
      numbers are its `state`.

    Raises:
      ValueError: if the model does not take the input, or returns other than one array.
    """
    folded = fold_program(model, example_input)
    arrays = dict(zip(folded.names, folded.arrays))
    trained = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    rest = {name: a for name, a in arrays.items() if name not in trained}
    return Model(FoldedFunction(folded.program, folded.names), _no_training, trained, rest)


def fold_program(model: Model, example_input: Any) -> FoldedProgram:
    """The program of a model's evaluation function, folded, and without what only derivatives need. Its batch size is open
    where the model's code allows it, and is that of the example otherwise.

    Raises:
      ValueError: if the model does not take the input, or returns other than one array.
    """
    program = inlined(_open_program(model, example_input))
    leaves = jax.tree.leaves((model.params, model.state))
    names = [*leaf_paths(model.params), *leaf_paths(model.state)]
    constants = _constants(program, len(leaves))
    chains = _chains(program, constants)
    read, factors = _read(program, constants, chains)
    known = _evaluated(program, constants, leaves, (*read, *factors))
    origins = _origins(program, constants, leaves)
    # Numbers that are no weights stay in the program.
    literals = {v: Literal(np.asarray(known[v])) for v in read if origins[v] is None and _is_number(known[v])}
    arrays: dict[int, Any] = {value: known[value] for value in read if value not in literals}
    called = {value: _origin_name(origins[value], names) for value in arrays}
    for chain in chains:
        kernel = program.equations[chain.equation].inputs[chain.operand]
        assert isinstance(kernel, int)
        called[chain.kernel] = _origin_name(origins[kernel], names)
        arrays[chain.kernel], shift = _folded_arrays(program, chain, known)
        if chain.shift is not None:
            arrays[chain.shift] = shift
            called[chain.shift] = "/".join([*called[chain.kernel].split("/")[:-1], "bias"])
    unique = _unique([called[value] for value in arrays])
    rewritten = _rewritten(program, constants, chains, tuple(arrays), literals)
    return FoldedProgram(rewritten, tuple(map(jnp.asarray, arrays.values())), unique)


def _is_number(array: jax.Array) -> bool:
    return array.ndim == 0 and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _open_program(model: Model, example_input: Any) -> Program:
    x = shapes_of(example_input)
    if not hasattr(x, "shape") or not x.shape:
        raise ValueError("expected an example input [batch, ...], one array")
    (batch,) = export.symbolic_shape("batch")
    problems = []
    for size in (batch, x.shape[0]):
        image = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
        # What an open batch size trips over is up to the model's code: any exception may come out of it.
        try:
            program = flatten(model.apply, shapes_of(model.params), shapes_of(model.state), image)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
            continue
        if len(program.outputs) != 1:
            raise ValueError(
                f"expected a model that returns one array, this one returns {len(program.outputs)}"
            )
        return program
    raise ValueError(f"the model does not take the example input {x.dtype}{list(x.shape)}: {problems[-1]}")


def _read(
    program: Program, constants: set[int], chains: Sequence[_Chain]
) -> tuple[dict[int, None], dict[int, None]]:
    """The constants that the operations that remain read, and those that go into layers."""
    absorbed = {step for chain in chains for step in chain.steps}
    replaced = {(chain.equation, chain.operand) for chain in chains}
    read: dict[int, None] = {}
    factors: dict[int, None] = {}
    for place, eqn in enumerate(program.equations):
        if eqn.outputs[0] in constants:
            continue
        for operand, value in enumerate(eqn.inputs):
            if not isinstance(value, Literal) and value in constants:
                goes = place in absorbed or (place, operand) in replaced
                (factors if goes else read)[value] = None
    read.update({o: None for o in program.outputs if not isinstance(o, Literal) and o in constants})
    return read, factors


def _rewritten(
    program: Program,
    constants: set[int],
    chains: Sequence[_Chain],
    arrays: tuple[int, ...],
    literals: Mapping[int, Literal],
) -> Program:
    """The program without what was worked out; its first inputs are `arrays`."""

    def read(operands: Sequence[Operand]) -> tuple[Operand, ...]:
        return tuple(o if isinstance(o, Literal) else literals.get(o, o) for o in operands)

    layers = {chain.equation: chain for chain in chains}
    absorbed = {step for chain in chains for step in chain.steps}
    avals = [*program.avals, *[None] * 2 * len(chains)]
    equations: list[Equation] = []
    for place, eqn in enumerate(program.equations):
        if place in absorbed or eqn.outputs[0] in constants:
            continue
        if place not in layers:
            equations.append(dataclasses.replace(eqn, inputs=read(eqn.inputs)))
            continue
        chain = layers[place]
        last = program.equations[chain.steps[-1]]
        inputs = tuple(chain.kernel if k == chain.operand else i for k, i in enumerate(eqn.inputs))
        avals[chain.kernel] = program.avals[eqn.inputs[chain.operand]]  # type: ignore[index]
        if chain.shift is None:
            equations.append(dataclasses.replace(eqn, inputs=inputs, outputs=last.outputs))
            continue
        aval = program.avals[eqn.outputs[0]]
        avals[chain.shift] = aval.update(shape=chain.shape_of_constants(aval.shape))
        equations.append(dataclasses.replace(eqn, inputs=inputs))
        addends = (eqn.outputs[0], chain.shift)
        equations.append(Equation(jax.lax.add_p, addends, last.outputs, {}, last.source))
    images = tuple(i for i in program.inputs if i not in constants)
    return Program(tuple(equations), tuple(avals), (*arrays, *images), read(program.outputs), {}, frozenset())


def _is_open(value: Any) -> bool:
    """Whether a static parameter depends on the batch size."""
    if isinstance(value, tuple):
        return any(map(_is_open, value))
    return export.is_symbolic_dim(value)


def _constants(program: Program, leaves: int) -> set[int]:
    constants = {*program.inputs[:leaves], *program.constants}
    for eqn in program.equations:
        fixed = not any(
            map(_is_open, (*eqn.params.values(), *(tuple(program.shape(o)) for o in eqn.outputs)))
        )
        if fixed and all(isinstance(i, Literal) or i in constants for i in eqn.inputs):
            constants.update(eqn.outputs)
    return constants


def _evaluated(
    program: Program, constants: set[int], leaves: Sequence[Any], wanted: Sequence[int]
) -> dict[int, jax.Array]:
    """The values of constants, worked out by one compiled program."""
    equations = tuple(eqn for eqn in program.equations if eqn.outputs[0] in constants)
    inputs = program.inputs[: len(leaves)]
    part = dataclasses.replace(program, equations=equations, inputs=inputs, outputs=tuple(wanted))
    results = jax.jit(lambda arrays: execute(as_written(part), arrays))(list(leaves))
    return dict(zip(wanted, results, strict=True))


def _origins(program: Program, constants: set[int], leaves: Sequence[Any]) -> dict[int, int | None]:
    """The largest leaf that each constant is made of (the first of several); None for what is made of no weights."""
    size = [int(np.prod(np.shape(leaf))) for leaf in leaves]
    origins: dict[int, int | None] = dict.fromkeys(program.constants)
    origins.update({value: leaf for leaf, value in enumerate(program.inputs[: len(leaves)])})
    for eqn in program.equations:
        if eqn.outputs[0] in constants:
            found = [origins[i] for i in eqn.inputs if not isinstance(i, Literal)]
            known = [leaf for leaf in found if leaf is not None]
            origins.update(dict.fromkeys(eqn.outputs, min(known, key=lambda k: (-size[k], k), default=None)))
    return origins


def _origin_name(leaf: int | None, names: Sequence[str]) -> str:
    return "constant" if leaf is None else names[leaf] or "array"


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names that occur again are numbered from 2 on."""
    found: dict[str, None] = {}
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name}.{number}"
        found[candidate] = None
    return tuple(found)


def _chains(program: Program, constants: set[int]) -> tuple[_Chain, ...]:
    readers: dict[int, list[int]] = {}
    for place, eqn in enumerate(program.equations):
        for value in eqn.inputs:
            if not isinstance(value, Literal):
                readers.setdefault(value, []).append(place)
    results = {o for o in program.outputs if not isinstance(o, Literal)}
    chains: list[_Chain] = []
    fresh = len(program.avals)
    for place, eqn in enumerate(program.equations):
        found = None if eqn.outputs[0] in constants else _kernel(program, eqn, constants)
        if found is None or program.avals[eqn.outputs[0]].dtype not in _DTYPES:
            continue
        operand, axes = found
        steps: list[int] = []
        value = eqn.outputs[0]
        while value not in results and len(readers.get(value, ())) == 1:
            (reader,) = readers[value]
            if not _is_step(program, program.equations[reader], value, axes, constants):
                break
            steps.append(reader)
            value = program.equations[reader].outputs[0]
        operations = [program.equations[step].name for step in steps]
        # A bias by itself stays the addition that it is.
        if len(steps) > 1 or any(name in _SCALES for name in operations):
            shifts = any(name in _SHIFTS for name in operations)
            chains.append(_Chain(place, operand, axes, tuple(steps), fresh, fresh + 1 if shifts else None))
            fresh += 2
    return tuple(chains)


def _kernel(
    program: Program, eqn: Equation, constants: set[int]
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


def _is_step(
    program: Program, eqn: Equation, value: int, axes: Sequence[int | None], constants: set[int]
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


def _folded_arrays(
    program: Program, chain: _Chain, known: Mapping[int, Any]
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

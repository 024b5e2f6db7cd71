"""Constant folding: computes what depends on weights alone once, and folds scales and shifts into layers (`chains`).

Before that, scales and shifts behind concatenations are brought before them (`joined`), and branches that give the same for every
image are taken out (`dead_branches`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sculpt.arguments import checked
from sculpt.export.folding.chains import Chain, find_chains, folded_arrays
from sculpt.export.folding.dead_branches import without_dead_branches
from sculpt.export.folding.joined import before_joins
from sculpt.inputs import arrays_of
from sculpt.ir.any_batch import batch_size, flatten_model
from sculpt.ir.interpreter import as_written, execute, execute_at
from sculpt.ir.program import Equation, FlatProgram, Literal, Operand, inlined, live_equations
from sculpt.model import Model, Params, State
from sculpt.trees import leaf_paths


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedProgram:
    """A program whose arrays are worked out: it takes them by position, then the images."""

    program: FlatProgram
    arrays: tuple[Any, ...]
    """The first inputs of the program."""
    names: tuple[str, ...]
    """Of the arrays: the paths of the weights that they come from."""
    inputs: Any
    """Shapes and dtypes of the images, an array or a pytree of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedFunction:
    """The evaluation function of a folded model, called with its arrays."""

    program: FlatProgram
    """Takes the arrays, then images of an open batch size where the model's own code allows it."""
    names: tuple[str, ...]
    """Of the arrays."""
    inputs: Any
    """Shapes and dtypes of the images, an array or a pytree of them."""

    def __call__(self, params: Params, state: State, x: Any) -> jax.Array:
        size = batch_size("the folded model", self.inputs, x)
        arrays = [params[name] if name in params else state[name] for name in self.names]
        (result,) = execute_at(self.program, size, [*arrays, *jax.tree.leaves(x)])
        return result


def _no_training(params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
    raise ValueError(
        "a folded model has no training mode: its BatchNorm is gone; train the model that it was folded from"
    )


@checked
def fold(model: Model, example_input: Any) -> Model:
    """The same function with BatchNorm, and whatever else depends on weights alone, folded into the layers, and without the branches that
    give the same for every image.

    Works on any model, dense or compact, of any framework: what is folded is found in the program. The result is for
    evaluation: it can be exported, measured, traced and compacted, but has no training mode.

    Args:
      model: the model.
      example_input: array or `ShapeDtypeStruct` `[batch, ...]`, or a pytree of them. Other batch sizes work too where the model's own code allows
        an open one.

    Returns:
      A model whose `params` is a dictionary from paths ("conv1/kernel", "conv1/bias") to arrays; arrays of other than finite
      floating-point numbers are its `state`.

    Raises:
      ValueError: if the model does not take the input, or returns other than one array.
    """
    folded = fold_program(model, example_input)
    arrays = dict(zip(folded.names, folded.arrays))
    trained = {name: a for name, a in arrays.items() if _is_trained(a)}
    rest = {name: a for name, a in arrays.items() if name not in trained}
    apply = FoldedFunction(folded.program, folded.names, folded.inputs)
    return Model(apply, _no_training, trained, rest, model.task)


def _is_trained(array: jax.Array) -> bool:
    # Infinite numbers are those of a constant, such as an attention mask.
    return jnp.issubdtype(array.dtype, jnp.floating) and bool(jnp.isfinite(array).all())


def fold_program(model: Model, example_input: Any) -> FoldedProgram:
    """The program of a model's evaluation function, folded, and without what only derivatives need. Its batch size is open
    where the model's code allows it, and is that of the example otherwise.

    Raises:
      ValueError: if the model does not take the input, or returns other than one array.
    """
    program = inlined(flatten_model(model, example_input))
    leaves = jax.tree.leaves((model.params, model.state))
    names = [*leaf_paths(model.params), *leaf_paths(model.state)]
    program = before_joins(
        program,
        lambda p: _constants(p, len(leaves)),
        functools.partial(_evaluated, program, _constants(program, len(leaves)), leaves),
    )
    constants = _constants(program, len(leaves))
    program = without_dead_branches(
        program, constants, functools.partial(_evaluated, program, constants, leaves)
    )
    constants = _constants(program, len(leaves))
    chains = find_chains(program, constants)
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
        arrays[chain.kernel], shift = folded_arrays(program, chain, known)
        if chain.shift is not None:
            arrays[chain.shift] = shift
            called[chain.shift] = "/".join([*called[chain.kernel].split("/")[:-1], "bias"])
    unique = _unique([called[value] for value in arrays])
    rewritten = _rewritten(program, constants, chains, tuple(arrays), literals)
    avals = [program.avals[value] for value in program.inputs[len(leaves) :]]
    inputs = jax.tree.unflatten(jax.tree.structure(arrays_of(example_input)), avals)
    return FoldedProgram(rewritten, tuple(map(jnp.asarray, arrays.values())), unique, inputs)


def _is_number(array: jax.Array) -> bool:
    return array.ndim == 0 and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _read(
    program: FlatProgram, constants: set[int], chains: Sequence[Chain]
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
    program: FlatProgram,
    constants: set[int],
    chains: Sequence[Chain],
    arrays: tuple[int, ...],
    literals: Mapping[int, Literal],
) -> FlatProgram:
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
    return FlatProgram(
        tuple(equations), tuple(avals), (*arrays, *images), read(program.outputs), {}, frozenset()
    )


def _is_open(value: Any) -> bool:
    """Whether a static parameter depends on the batch size."""
    if isinstance(value, tuple):
        return any(map(_is_open, value))
    return export.is_symbolic_dim(value)


def _constants(program: FlatProgram, leaves: int) -> set[int]:
    constants = {*program.inputs[:leaves], *program.constants}
    for eqn in program.equations:
        fixed = not any(
            map(_is_open, (*eqn.params.values(), *(tuple(program.shape(o)) for o in eqn.outputs)))
        )
        if fixed and all(isinstance(i, Literal) or i in constants for i in eqn.inputs):
            constants.update(eqn.outputs)
    return constants


def _evaluated(
    program: FlatProgram, constants: set[int], leaves: Sequence[Any], wanted: Sequence[int]
) -> dict[int, jax.Array]:
    """The values of constants; those that are no inputs are worked out by one compiled program."""
    inputs = program.inputs[: len(leaves)]
    known = dict(zip(inputs, leaves))
    others = tuple(value for value in wanted if value not in known)
    found: dict[int, Any] = {value: known[value] for value in wanted if value in known}
    if others:
        equations = tuple(live_equations([e for e in program.equations if e.outputs[0] in constants], others))
        part = dataclasses.replace(program, equations=equations, inputs=inputs, outputs=others)
        results = jax.jit(lambda arrays: execute(as_written(part), arrays))(list(leaves))
        found.update(zip(others, results, strict=True))
    return found


def _origins(program: FlatProgram, constants: set[int], leaves: Sequence[Any]) -> dict[int, int | None]:
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

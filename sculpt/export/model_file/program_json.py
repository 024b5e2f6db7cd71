"""JSON encoding of flat programs. Primitives are stored by name; large constants are stored apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend import core as jax_core
from jax.extend.core import primitives as extended

from sculpt.export.model_file.json_values import (
    decode_array,
    decode_shaped,
    decode_value,
    encode_array,
    encode_value,
    shaped,
)
from sculpt.ir.interpreter import by_bodies, execute
from sculpt.ir.jax_calls import PARAMETERS
from sculpt.ir.program import (
    OWN_DERIVATIVES,
    Equation,
    FlatProgram,
    Literal,
    Operand,
    derivative,
    flatten,
    inlined,
)

_SMALL = 16
"""Constants of at most so many numbers stand in the program itself."""
_DEEPEST = 50
"""Most programs inside each other."""


@functools.cache
def _primitives() -> dict[str, Any]:
    """JAX's own primitives, by name; those that are made anew for their name alone."""
    found = [*vars(extended).values(), *vars(jax.lax).values(), *vars(jax.lax.linalg).values()]
    table = {p.name: p for p in found if isinstance(p, jax_core.Primitive)}
    # Nothing public has these but what is traced with them.
    key = jax.eval_shape(jax.random.key, 0)
    data = jax.eval_shape(jax.random.key_data, key)
    for function, example in ((jax.random.key_data, key), (jax.random.wrap_key_data, data)):
        table.update(
            {e.primitive.name: e.primitive for e in flatten(lambda x, f=function: f(x), example).equations}
        )
    table.update({name: jax_core.Primitive(name) for name in (*PARAMETERS, "dim_as_value")})
    return table


class ProgramEncoder:
    """Writes programs. Their large constants gather in `constants`."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}
        """Name -> array."""
        self._names: dict[int, str] = {}

    def program(self, program: FlatProgram, own_derivatives: bool = True) -> dict[str, Any]:
        """A program as JSON; inside derivatives, functions with a derivative of their own go without it.

        Raises:
          ValueError: if there is an operation, a parameter or a constant in it that cannot be written; it names the line.
        """
        read = [*program.inputs, *(o for eqn in program.equations for o in (*eqn.inputs, *eqn.outputs))]
        values = dict.fromkeys(o for o in (*read, *program.outputs) if not isinstance(o, Literal))
        places = {value: place for place, value in enumerate(values)}

        def operand(value: Operand) -> Any:
            return _literal(value) if isinstance(value, Literal) else places[value]

        equations = []
        for eqn in (part for whole in program.equations for part in _anywhere(whole)):
            try:
                equations.append(self._equation(program, eqn, operand, own_derivatives))
            except TypeError as error:
                raise ValueError(f"{eqn.name} at {eqn.source} cannot be written: {error}") from None
        return {
            "values": [shaped(program.avals[value]) for value in values],
            "inputs": [places[i] for i in program.inputs],
            "outputs": [operand(o) for o in program.outputs],
            "constants": [
                [places[i], self._constant(array)] for i, array in program.constants.items() if i in places
            ],
            "equations": equations,
        }

    def _equation(
        self, program: FlatProgram, eqn: Equation, operand: Callable[[Operand], Any], own_derivatives: bool
    ) -> dict[str, Any]:
        if eqn.name not in _primitives():
            raise TypeError("a model file holds JAX's own array operations alone")
        known = _primitives()[eqn.name]
        if known is not eqn.primitive and eqn.name not in (*PARAMETERS, "dim_as_value"):
            raise TypeError("an operation of another origin, of the same name as one of JAX's own")
        params = {}
        for name in PARAMETERS.get(eqn.name, tuple(eqn.params)):
            try:
                params[name] = self._param(name, eqn.params[name])
            except TypeError as error:
                raise TypeError(f"its parameter {name} has {error}") from None
        written: dict[str, Any] = {
            "primitive": eqn.name,
            "inputs": [operand(i) for i in eqn.inputs],
            "outputs": [operand(o) for o in eqn.outputs],
            "params": params,
        }
        if eqn.bodies:
            written["bodies"] = [self.program(body, own_derivatives) for body in eqn.bodies]
        if own_derivatives and eqn.name in OWN_DERIVATIVES:
            written["derivative"] = self.program(inlined(derivative(program, eqn)), own_derivatives=False)
        return written

    def _param(self, name: str, value: Any) -> Any:
        if isinstance(value, jax.sharding.Sharding):
            # Where arrays lie is not for a file to say.
            return encode_value(None)
        if isinstance(value, (jax_core.ClosedJaxpr, jax_core.Jaxpr)):
            closed = isinstance(value, jax_core.ClosedJaxpr)
            jaxpr = value if closed else jax_core.ClosedJaxpr(value, ())
            body = flatten(jax_core.jaxpr_as_fun(jaxpr), *(_shape_of(a) for a in jaxpr.in_avals))
            return {"closed_jaxpr" if closed else "jaxpr": self.program(body)}
        if name == "policy" and value is not None:
            for policy in _POLICIES:
                if value is getattr(jax.checkpoint_policies, policy):
                    return {"policy": policy}
        return encode_value(value)

    def _constant(self, array: Any) -> Any:
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and np.size(array) <= _SMALL:
            return {"array": encode_array(np.asarray(array))}
        if id(array) not in self._names:
            name = str(len(self.constants))
            self._names[id(array)], self.constants[name] = name, array
        return {"constant": self._names[id(array)]}


_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
"""Names in `jax.checkpoint_policies` of what rematerialised regions may keep."""


def _anywhere(eqn: Equation) -> list[Equation]:
    """The equation without a word of where arrays lie, which is not for a file to say: putting some on a device is copying each."""
    if eqn.name not in ("device_put", "sharding_constraint"):
        return [eqn]
    return [
        Equation(extended.copy_p, (i,), (o,), {}, eqn.source)
        for i, o in zip(eqn.inputs, eqn.outputs, strict=True)
    ]


def _shape_of(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _literal(literal: Literal) -> Any:
    value = literal.value
    if hasattr(value, "dtype"):
        return {"array": encode_array(np.asarray(value, value.dtype))}
    return {"number": encode_value(value)}


def decode_program(data: Any, constants: Mapping[str, Any], depth: int = 0) -> FlatProgram:
    """The program that `ProgramEncoder.program` wrote.

    Args:
      data: its JSON.
      constants: name -> array.
      depth: programs that it is inside of.

    Raises:
      ValueError: if it does not make sense: unknown primitives, ids that do not exist, constants that are not there; other exceptions
        where what is inside is of wrong types. That operations fit their operands is not checked.
    """
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} programs inside each other")
    avals = [ShapedArray(*decode_shaped(text)) for text in data["values"]]
    defined: set[int] = set()

    def define(value: Any) -> int:
        if type(value) is not int or not 0 <= value < len(avals) or value in defined:
            raise ValueError(f"a value of id {value!r}, of {len(avals)} with each given once")
        defined.add(value)
        return value

    def operand(value: Any) -> Operand:
        if isinstance(value, dict):
            ((kind, content),) = value.items()
            if kind not in ("array", "number"):
                raise ValueError(f"an operand {kind!r}")
            return Literal(decode_value(value) if kind == "array" else decode_value(content))
        if type(value) is not int or value not in defined:
            raise ValueError(f"an operation on the value of id {value!r}, which nothing has given")
        return value

    inputs = tuple(map(define, data["inputs"]))
    known = {define(value): _constant(content, constants) for value, content in data["constants"]}
    for value, array in known.items():
        found, expected = shaped(array), shaped(avals[value])
        if found != expected:
            raise ValueError(f"a constant {found} where {expected} was expected")
    equations = []
    for written in data["equations"]:
        operands = tuple(map(operand, written["inputs"]))
        results = tuple(map(define, written["outputs"]))
        equations.append(_equation(written, operands, results, constants, depth))
    outputs = tuple(map(operand, data["outputs"]))
    return FlatProgram(tuple(equations), tuple(avals), inputs, outputs, known, frozenset())


def _equation(
    written: Any,
    inputs: tuple[Operand, ...],
    outputs: tuple[int, ...],
    constants: Mapping[str, Any],
    depth: int,
) -> Equation:
    name = written["primitive"]
    if name not in _primitives():
        raise ValueError(f"the unknown primitive {name!r}")
    if not outputs:
        raise ValueError(f"an operation {name} without results")
    params = {n: _param(value, constants, depth) for n, value in written["params"].items()}
    inner = [decode_program(body, constants, depth + 1) for body in written.get("bodies", ())]
    own = written.get("derivative")
    if name in PARAMETERS:
        if not inner or (name not in ("while", "cond") and len(inner) != 1):
            raise ValueError(f"{len(inner)} programs inside {name}")
    elif inner:
        raise ValueError(f"programs inside {name}, which has none")
    return Equation(
        _primitives()[name],
        inputs,
        outputs,
        params,
        "a model file",
        tuple(inner),
        None,
        None if own is None else decode_program(own, constants, depth + 1),
    )


def _param(value: Any, constants: Mapping[str, Any], depth: int) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind in ("jaxpr", "closed_jaxpr"):
            closed = _closed_jaxpr(decode_program(content, constants, depth + 1))
            return closed if kind == "closed_jaxpr" else closed.jaxpr
        if kind == "policy":
            if content not in _POLICIES:
                raise ValueError(f"the policy {content!r}, which is none of {', '.join(_POLICIES)}")
            return getattr(jax.checkpoint_policies, content)
    return decode_value(value)


def _closed_jaxpr(program: FlatProgram) -> Any:
    arguments: Sequence[Any] = [_shape_of(program.avals[i]) for i in program.inputs]
    return jax.make_jaxpr(lambda *a: execute(by_bodies(program), a))(*arguments)


def _constant(content: Any, constants: Mapping[str, Any]) -> Any:
    ((kind, value),) = content.items()
    if kind == "array":
        return decode_array(value)
    if kind != "constant" or value not in constants:
        raise ValueError(f"the constant {value!r}, which is not among the arrays")
    return constants[value]

"""The flat program: a jaxpr with its inner calls inlined, every value under an id of its own.

The same inner jaxpr object occurs many times in one network (every `relu` shares one), so an environment keyed by its
variables would merge layers silently. Here each call gets fresh ids. Loops, branches, rematerialised regions and functions
with derivatives of their own stay one equation with bodies: they mean more than the operations inside.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0
from jax.extend import core as jax_core

from sculpt.ir.high_level import as_low_level
from sculpt.ir.jax_calls import bodies, called, function_of, parameters

CONTRACTIONS = ("conv_general_dilated", "dot_general", "ragged_dot_general")
"""Primitives that multiply and sum: what costs something, and what can be a layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Literal:
    """A constant written into the program."""

    value: Any


Operand = int | Literal
"""The id of a value, or a literal."""


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One primitive applied to values."""

    primitive: Any
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    source: str
    """File, line and function that the equation comes from."""
    bodies: tuple[FlatProgram, ...] = ()
    """The programs inside a loop, a branch, or a function with its own derivative."""
    function: Callable[..., list[Any]] | None = None
    """The equation as a function of its operands, own derivatives included; only where there are bodies. Knows the sizes that it was
    traced with and no others."""
    own_derivative: FlatProgram | None = None
    """What `derivative` gives, where `with_derivatives` has asked for it."""

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class FlatProgram:
    """A straight list of equations over numbered values."""

    equations: tuple[Equation, ...]
    avals: tuple[Any, ...]
    """Shape and dtype of every value, by id."""
    inputs: tuple[int, ...]
    """Ids of the flattened arguments."""
    outputs: tuple[Operand, ...]
    constants: dict[int, Any]
    """Arrays that the function closed over, by id."""
    tables: frozenset[int]
    """Ids of values that depend on no input: the constants, positions and masks, and what is computed of them alone."""

    def is_table(self, eqn: Equation) -> bool:
        """Whether an equation gives tables."""
        return eqn.outputs[0] in self.tables

    def shape(self, operand: Operand) -> tuple[int, ...]:
        if isinstance(operand, Literal):
            return np.shape(operand.value)
        return tuple(self.avals[operand].shape)


class ImpureProgram(ValueError):
    """What is to be traced changes arrays in place."""


def flatten(function: Callable[..., Any], *arguments: Any) -> FlatProgram:
    """Traces `function` on arguments given as arrays or `ShapeDtypeStruct`s and inlines all calls.

    Nothing is run or allocated. Equations whose results nobody reads are dropped.

    Raises:
      ImpureProgram: if there are mutable arrays in it.
    """
    return _program(jax.make_jaxpr(function)(*arguments), "an unknown line")


def is_inexact(value: Any) -> bool:
    """Whether an array (or abstract value) is of floating or complex numbers, and so has a derivative."""
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    return jnp.issubdtype(dtype, jnp.inexact)


def derivative(program: FlatProgram, eqn: Equation) -> FlatProgram:
    """The derivative that an equation with a rule of its own (`custom_jvp_call`, `custom_vjp_call`) is given by that rule.

    Inputs are the operands, then the tangents of inexact operands (`custom_jvp_call`) or the cotangents of inexact results
    (`custom_vjp_call`); outputs are the results and their tangents, or the cotangents of inexact operands.
    """
    if eqn.own_derivative is not None:
        return eqn.own_derivative
    function = eqn.function
    assert function is not None
    operands = [_abstract(program, o) for o in eqn.inputs]
    results = [_abstract(program, o) for o in eqn.outputs]
    if eqn.name == "custom_jvp_call":
        others = [x for x in operands if is_inexact(x)]

        def forward(primals: Sequence[Any], known: Sequence[Any]) -> list[Any]:
            tangents = iter(known)
            filled = [next(tangents) if is_inexact(p) else np.zeros(p.shape, float0) for p in primals]
            out, tangents_out = jax.jvp(function, tuple(primals), tuple(filled))
            return [*out, *(t for p, t in zip(out, tangents_out) if is_inexact(p))]

        return flatten(forward, operands, others)
    others = [x for x in results if is_inexact(x)]

    def backward(primals: Sequence[Any], known: Sequence[Any]) -> list[Any]:
        cotangents = iter(known)
        out, pull = jax.vjp(function, *primals)
        filled = [next(cotangents) if is_inexact(p) else np.zeros(p.shape, float0) for p in out]
        return [c for p, c in zip(primals, pull(filled)) if is_inexact(p)]

    return flatten(backward, operands, others)


def with_derivatives(program: FlatProgram) -> FlatProgram:
    """The same program, value ids included, that holds the derivative of every equation with a rule of its own: for a program that
    is to be run at other sizes, which its equations do not know as functions."""

    def known(eqn: Equation) -> Equation:
        own = derivative(program, eqn) if eqn.name in OWN_DERIVATIVES else None
        bodies = tuple(map(with_derivatives, eqn.bodies))
        return dataclasses.replace(eqn, bodies=bodies, own_derivative=own)

    equations = tuple(known(eqn) if eqn.bodies else eqn for eqn in program.equations)
    return dataclasses.replace(program, equations=equations)


def _abstract(program: FlatProgram, operand: Operand) -> jax.ShapeDtypeStruct:
    if isinstance(operand, Literal):
        return jax.ShapeDtypeStruct(np.shape(operand.value), np.asarray(operand.value).dtype)
    aval = program.avals[operand]
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


OWN_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")
"""Primitives with a derivative of their own."""
_ONLY_FOR_DERIVATIVES = (*OWN_DERIVATIVES, "checkpoint", "remat2")
"""Primitives whose body is all that evaluation needs."""


def inlined(program: FlatProgram) -> FlatProgram:
    """The same program without what only derivatives need: the bodies of functions with a derivative of their own and of
    rematerialised regions stand in place of the calls. For evaluation; values get new ids."""
    avals = list(program.avals)
    equations: list[Equation] = []
    constants = dict(program.constants)

    def new(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def visit(inner: FlatProgram, values: dict[int, Operand]) -> tuple[Operand, ...]:
        for eqn in inner.equations:
            inputs = tuple(i if isinstance(i, Literal) else values[i] for i in eqn.inputs)
            if eqn.name in _ONLY_FOR_DERIVATIVES:
                body = eqn.bodies[0]
                known: dict[int, Operand] = dict(zip(body.inputs, inputs, strict=True))
                for value, array in body.constants.items():
                    known[value] = place = new(body.avals[value])
                    constants[place] = array
                results = visit(body, known)
            else:
                results = tuple(new(inner.avals[o]) for o in eqn.outputs)
                equations.append(dataclasses.replace(eqn, inputs=inputs, outputs=results))
            values.update(zip(eqn.outputs, results, strict=True))
        return tuple(o if isinstance(o, Literal) else values[o] for o in inner.outputs)

    outputs = visit(program, {i: i for i in (*program.inputs, *program.constants)})
    return FlatProgram(tuple(equations), tuple(avals), program.inputs, outputs, constants, frozenset())


def size_at(expression: Any, size: Any) -> Any:
    """A symbolic dimension with all that is open in it taken to be `size`, which may be symbolic itself."""
    found = expression._evaluate(dict.fromkeys(expression._get_vars(), size))
    return found if jax.export.is_symbolic_dim(found) else int(found)


def with_known_sizes(program: FlatProgram, size: Any) -> FlatProgram:
    """The same program, value ids included, with every symbolic dimension (of `jax.export`) taken to be `size`, which may be
    another symbolic one."""

    def known(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(known(v) for v in value)
        return size_at(value, size) if jax.export.is_symbolic_dim(value) else value

    equations = tuple(
        dataclasses.replace(
            eqn,
            params={name: known(value) for name, value in eqn.params.items()},
            bodies=tuple(with_known_sizes(body, size) for body in eqn.bodies),
            own_derivative=None if eqn.own_derivative is None else with_known_sizes(eqn.own_derivative, size),
        )
        for eqn in program.equations
    )
    avals = tuple(
        aval.update(shape=known(tuple(aval.shape))) if hasattr(aval, "shape") else aval
        for aval in program.avals
    )
    return dataclasses.replace(program, equations=equations, avals=avals)


def _program(closed: Any, caller: str, among_devices: bool = False) -> FlatProgram:
    builder = _Builder(among_devices)
    inputs = [builder.new(v.aval) for v in closed.jaxpr.invars]
    constants = [builder.constant(v.aval, value) for v, value in zip(closed.jaxpr.constvars, closed.consts)]
    outputs = builder.inline(closed.jaxpr, inputs, constants, caller)
    equations = live_equations(builder.equations, outputs)
    read = {i for eqn in equations for i in eqn.inputs if not isinstance(i, Literal)}
    read |= {i for i in outputs if not isinstance(i, Literal)}
    tables = read & set(builder.constants)
    for eqn in equations:
        if all(isinstance(i, Literal) or i in tables for i in eqn.inputs):
            tables.update(eqn.outputs)
    return FlatProgram(
        equations=tuple(equations),
        avals=tuple(builder.avals),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants={i: value for i, value in builder.constants.items() if i in read},
        tables=frozenset(tables),
    )


class _Builder:
    def __init__(self, among_devices: bool) -> None:
        self.among_devices = among_devices
        """Whether it is the body of a `shard_map`, or inside one."""
        self.avals: list[Any] = []
        self.equations: list[Equation] = []
        self.constants: dict[int, Any] = {}

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, aval: Any, value: Any) -> int:
        index = self.new(aval)
        self.constants[index] = value
        return index

    def inline(
        self,
        jaxpr: Any,
        inputs: Sequence[Operand],
        constants: Sequence[Operand],
        caller: str,
    ) -> list[Operand]:
        values: dict[Any, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        values.update(zip(jaxpr.constvars, constants, strict=True))

        def read(atom: Any) -> Operand:
            return Literal(atom.val) if isinstance(atom, jax_core.Literal) else values[atom]

        for traced in jaxpr.eqns:
            eqn = as_low_level(traced)
            operands = [read(v) for v in eqn.invars]
            source = _source(eqn, caller)
            _check_pure(eqn, source)
            call = called(eqn, self.among_devices)
            if call is not None:
                inner, arrays = call
                named = [self.constant(v.aval, c) for v, c in zip(inner.constvars, arrays)]
                results = self.inline(inner, operands, named, source)
            else:
                results = [self.new(v.aval) for v in eqn.outvars]
                among = self.among_devices or eqn.primitive.name == "shard_map"
                inside = tuple(_program(closed, source, among) for closed in bodies(eqn))
                self.equations.append(
                    Equation(
                        eqn.primitive,
                        tuple(operands),
                        tuple(results),
                        parameters(eqn),
                        source,
                        inside,
                        function_of(traced) if inside else None,
                    )
                )
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]


def _check_pure(eqn: Any, source: str) -> None:
    """Refuses what changes arrays in place: a list of equations over values does not say in what order that happens."""
    if any(hasattr(v.aval, "inner_aval") for v in (*eqn.invars, *eqn.outvars)):
        raise ImpureProgram(
            f"expected a network that computes new arrays of old ones, got one with a mutable array (jax.new_ref) at {source}; write "
            "x = x.at[place].set(value) instead of ref[place] = value"
        )


def live_equations(equations: Sequence[Equation], outputs: Sequence[Operand]) -> list[Equation]:
    """The equations without those whose results nobody reads."""
    needed = {o for o in outputs if not isinstance(o, Literal)}
    kept = []
    for eqn in reversed(equations):
        if needed & set(eqn.outputs):
            kept.append(eqn)
            needed |= {i for i in eqn.inputs if not isinstance(i, Literal)}
    return kept[::-1]


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Where code is that is not the user's own."""
    found = [importlib.util.find_spec(name) for name in ("jax", "jaxlib", "flax", "numpy")]
    folders = [
        folder for spec in found if spec is not None for folder in spec.submodule_search_locations or ()
    ]
    here = Path(__file__).parent
    return (*(os.path.join(folder, "") for folder in (*folders, here)), str(here.parent / "model.py"))


def _source(eqn: Any, caller: str) -> str:
    """The first frame of the user's own code; the call's where an inner function was traced apart from it."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        path = frame.file_name
        if not path.startswith(_libraries()) and "<" not in path:
            return f"{path.rsplit('/', 1)[-1]}:{frame.line_num} ({frame.function_name})"
    return caller

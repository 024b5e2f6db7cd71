"""The flat program: a jaxpr with its inner calls inlined, every value under an id of its own.

The same inner jaxpr object occurs many times in one network (every `relu` shares one), so an environment keyed by its
variables would merge layers silently. Here each call gets fresh ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
}
"""Call primitives and the parameter that holds their body."""


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

    @property
    def name(self) -> str:
        return self.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A straight list of equations over numbered values."""

    equations: tuple[Equation, ...]
    avals: tuple[Any, ...]
    """Shape and dtype of every value, by id."""
    inputs: tuple[int, ...]
    """Ids of the flattened arguments."""
    outputs: tuple[Operand, ...]
    constants: dict[int, Any]
    """Arrays that the function closed over, by id."""

    def shape(self, operand: Operand) -> tuple[int, ...]:
        if isinstance(operand, Literal):
            return np.shape(operand.value)
        return tuple(self.avals[operand].shape)


def flatten(function: Callable[..., Any], *arguments: Any) -> Program:
    """Traces `function` on arguments given as arrays or `ShapeDtypeStruct`s and inlines all calls.

    Nothing is run or allocated. Equations whose results nobody reads are dropped.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    builder = _Builder()
    inputs = [builder.new(v.aval) for v in closed.jaxpr.invars]
    constants = [builder.constant(v.aval, value) for v, value in zip(closed.jaxpr.constvars, closed.consts)]
    outputs = builder.inline(closed.jaxpr, inputs, constants)
    equations = _live_equations(builder.equations, outputs)
    read = {i for eqn in equations for i in eqn.inputs if not isinstance(i, Literal)}
    read |= {i for i in outputs if not isinstance(i, Literal)}
    return Program(
        equations=tuple(equations),
        avals=tuple(builder.avals),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        constants={i: value for i, value in builder.constants.items() if i in read},
    )


class _Builder:
    def __init__(self) -> None:
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
        caller: str = "an unknown line",
    ) -> list[Operand]:
        values: dict[Any, Operand] = dict(zip(jaxpr.invars, inputs, strict=True))
        values.update(zip(jaxpr.constvars, constants, strict=True))

        def read(atom: Any) -> Operand:
            return Literal(atom.val) if isinstance(atom, jax_core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            source = _source(eqn, caller)
            body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            if body is not None:
                inner, inner_constants = body, []
                if hasattr(body, "consts"):
                    inner = body.jaxpr
                    inner_constants = [self.constant(v.aval, c) for v, c in zip(inner.constvars, body.consts)]
                results = self.inline(inner, operands, inner_constants, source)
            else:
                results = [self.new(v.aval) for v in eqn.outvars]
                self.equations.append(
                    Equation(eqn.primitive, tuple(operands), tuple(results), dict(eqn.params), source)
                )
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]


def _live_equations(equations: Sequence[Equation], outputs: Sequence[Operand]) -> list[Equation]:
    needed = {o for o in outputs if not isinstance(o, Literal)}
    kept = []
    for eqn in reversed(equations):
        if needed & set(eqn.outputs):
            kept.append(eqn)
            needed |= {i for i in eqn.inputs if not isinstance(i, Literal)}
    return kept[::-1]


def _source(eqn: Any, caller: str) -> str:
    """The first frame of the user's own code; the call's where an inner function was traced apart from it."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        path = frame.file_name
        if not any(part in path for part in ("/jax/", "/flax/", "/sculpt/model.py", "/sculpt/tracing/", "<")):
            return f"{path.rsplit('/', 1)[-1]}:{frame.line_num} ({frame.function_name})"
    return caller


def run(
    program: Program, arguments: Sequence[Any], bind: Callable[[Equation, list[Any]], Any] | None = None
) -> list[Any]:
    """Runs `program` on flattened arguments; `bind(equation, operands)` may apply a primitive in its own way."""
    values: dict[int, Any] = dict(zip(program.inputs, arguments, strict=True))
    values.update(program.constants)

    def read(operand: Operand) -> Any:
        return operand.value if isinstance(operand, Literal) else values[operand]

    for eqn in program.equations:
        operands = [read(o) for o in eqn.inputs]
        results = bind(eqn, operands) if bind else eqn.primitive.bind(*operands, **eqn.params)
        if not eqn.primitive.multiple_results:
            results = [results]
        values.update(zip(eqn.outputs, results, strict=True))
    return [read(o) for o in program.outputs]

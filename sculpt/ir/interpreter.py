"""Interpreter of flat programs, as written or with other static sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.dtypes import float0

from sculpt.ir.jax_calls import (
    apply,
    remat_options,
    scan_options,
    scan_parts,
    scan_results,
    shard_options,
    while_parts,
)
from sculpt.ir.program import (
    Equation,
    FlatProgram,
    Literal,
    Operand,
    is_inexact,
    live_equations,
    with_known_sizes,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Executable:
    """A program with the static parameters to run it with."""

    program: FlatProgram
    constants: dict[int, Any]
    """Arrays in place of the program's own constants, by value id."""
    params: dict[int, dict[str, Any]]
    """Static parameters in place of an equation's own, by `id(equation)`."""
    bodies: dict[int, tuple[Executable, ...]]
    """The equation's bodies, by `id(equation)`; equations that are not named run as they were written."""
    derivatives: dict[int, Executable]
    """What `derivative` of the equation is to be replaced by, by `id(equation)`."""
    tables: dict[int, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    """By value id, what other than tables read of a table of the program that is computed whole."""
    instead: dict[int, Equation] = dataclasses.field(default_factory=dict)
    """Equations that are run in place of others, by `id(equation)`."""
    additions: dict[int, tuple[Addition, ...]] = dataclasses.field(default_factory=dict)
    """What is added to the one result of an equation, by `id(equation)`."""


Observer = Callable[[Equation, Sequence[Any]], None]
Binder = Callable[[Equation, list[Any], dict[str, Any]], Any]
Addition = Callable[[Callable[[int], Any], Binder | None], Any]
"""`(read, bind) -> array`, of the values of the program that are known by then."""


def as_written(program: FlatProgram) -> Executable:
    """The program with its own constants and parameters."""
    return Executable(program, program.constants, {}, {}, {})


def by_bodies(program: FlatProgram) -> Executable:
    """The program as written, whose loops, branches and own derivatives (those that `with_derivatives` has noted) are run operation
    by operation too: as functions they know only the sizes that they were traced with."""
    inner = [eqn for eqn in program.equations if eqn.bodies]
    bodies = {id(eqn): tuple(map(by_bodies, eqn.bodies)) for eqn in inner}
    derivatives = {id(e): by_bodies(e.own_derivative) for e in inner if e.own_derivative is not None}
    return dataclasses.replace(as_written(program), bodies=bodies, derivatives=derivatives)


def table_value(program: FlatProgram, operand: Operand) -> np.ndarray | None:
    """The value of a literal, or of one of the program's tables; None where it depends on inputs."""
    if isinstance(operand, Literal):
        return np.asarray(operand.value)
    if operand not in program.tables:
        return None
    tables = [eqn for eqn in program.equations if program.is_table(eqn)]
    part = dataclasses.replace(
        program, inputs=(), outputs=(operand,), equations=tuple(live_equations(tables, [operand]))
    )
    read = {o for eqn in part.equations for o in eqn.inputs} | {operand}
    if any(isinstance(array, Tracer) for value, array in program.constants.items() if value in read):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(execute(as_written(part), [])[0])


def execute_at(
    program: FlatProgram, size: Any, arguments: Sequence[Any], observe: Observer | None = None
) -> list[Any]:
    """Runs a program of an open batch size (or of this one) on arguments of the batch size `size`, which may be symbolic."""
    return execute(by_bodies(with_known_sizes(program, size)), arguments, _bind_known, observe)


def _bind_known(eqn: Equation, operands: list[Any], params: dict[str, Any]) -> Any:
    """Applies a primitive. The batch size as a value is known by now."""
    if eqn.name == "dim_as_value":
        return jnp.asarray(params["dim"], jax.dtypes.canonicalize_dtype(int))
    return apply(eqn.primitive, operands, params)


def execute(
    executable: Executable,
    arguments: Sequence[Any],
    bind: Binder | None = None,
    observe: Observer | None = None,
) -> list[Any]:
    """Runs a program on flattened arguments.

    Args:
      executable: the program and its parameters.
      arguments: one array per input of the program.
      bind: `(equation, operands, params) -> results` may apply a primitive in its own way.
      observe: is shown the results of every equation outside bodies.
    """
    program = executable.program
    values: dict[int, Any] = dict(zip(program.inputs, arguments, strict=True))
    values.update(executable.constants)

    def read(operand: Any, whole: bool = False) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        part = None if whole else executable.tables.get(operand)
        return values[operand] if part is None else part(values[operand])

    for eqn in program.equations:
        done = executable.instead.get(id(eqn), eqn)
        operands = [read(o, program.is_table(eqn)) for o in done.inputs]
        if eqn.bodies:
            results = _structured(eqn, operands, executable, bind)
        else:
            params = executable.params.get(id(eqn), done.params)
            results = bind(done, operands, params) if bind else apply(done.primitive, operands, params)
            if not done.primitive.multiple_results:
                results = [results]
            for addition in executable.additions.get(id(eqn), ()):
                results = [jax.lax.add(results[0], addition(read, bind))]
        if observe is not None:
            observe(eqn, results)
        values.update(zip(eqn.outputs, results, strict=True))
    return [read(o) for o in program.outputs]


def _structured(eqn: Equation, operands: list[Any], executable: Executable, bind: Binder | None) -> list[Any]:
    bodies = executable.bodies.get(id(eqn))
    if bodies is None:
        assert eqn.function is not None
        return eqn.function(*operands)
    functions = [lambda *a, body=body: execute(body, a, bind) for body in bodies]
    if eqn.name == "scan":
        return _scan(eqn, operands, functions[0])
    if eqn.name == "while":
        return _while(eqn, operands, *functions)
    if eqn.name == "cond":
        return list(jax.lax.switch(operands[0], functions, *operands[1:]))
    if eqn.name in ("checkpoint", "remat2"):
        return list(jax.checkpoint(functions[0], **remat_options(eqn))(*operands))
    if eqn.name == "shard_map":
        mapped = jax.shard_map(lambda *parts: tuple(functions[0](*parts)), **shard_options(eqn))
        return list(mapped(*operands))
    derivative = executable.derivatives.get(id(eqn))
    if derivative is None:
        return functions[0](*operands)
    if eqn.name == "custom_jvp_call":
        return _custom_jvp(eqn, operands, functions[0], lambda *a: execute(derivative, a, bind))
    return _custom_vjp(eqn, operands, functions[0], lambda *a: execute(derivative, a, bind))


def _scan(eqn: Equation, operands: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    consts, carry, stacked = scan_parts(eqn, operands)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        return scan_results(eqn, body(*consts, *carry, *slices))

    carry, rows = jax.lax.scan(step, carry, stacked, **scan_options(eqn))
    return [*carry, *rows]


def _while(
    eqn: Equation, operands: list[Any], condition: Callable[..., list[Any]], body: Callable[..., list[Any]]
) -> list[Any]:
    condition_consts, body_consts, carry = while_parts(eqn, operands)
    return jax.lax.while_loop(
        lambda carry: condition(*condition_consts, *carry)[0],
        lambda carry: body(*body_consts, *carry),
        carry,
    )


def _custom_jvp(
    eqn: Equation, operands: list[Any], body: Callable[..., list[Any]], derivative: Callable[..., list[Any]]
) -> list[Any]:
    function = jax.custom_jvp(lambda *primals: body(*primals))

    @function.defjvp
    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        results = derivative(*primals, *(t for p, t in zip(primals, tangents) if is_inexact(p)))
        primals_out, known = results[: len(eqn.outputs)], iter(results[len(eqn.outputs) :])
        return primals_out, [next(known) if is_inexact(p) else _no_tangent(p) for p in primals_out]

    return list(function(*operands))


def _custom_vjp(
    eqn: Equation, operands: list[Any], body: Callable[..., list[Any]], derivative: Callable[..., list[Any]]
) -> list[Any]:
    function = jax.custom_vjp(lambda *primals: body(*primals))

    def backward(primals: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        known = iter(derivative(*primals, *(c for c in cotangents if is_inexact(c))))
        return tuple(next(known) if is_inexact(p) else None for p in primals)

    function.defvjp(lambda *primals: (body(*primals), primals), backward)
    return list(function(*operands))


def _no_tangent(value: Any) -> np.ndarray:
    return np.zeros(np.shape(value), float0)

"""Sums over pruned units that are equal but not zero: adds the number of units times their value."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.interpreter import Addition, Binder, Executable, execute
from sculpt.ir.program import Equation, FlatProgram, Literal
from sculpt.pruning.compaction.rewriting import Sizes, rewrite
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.equal_units import Slice
from sculpt.tracing.flow import Flow


def with_equal_sums(
    executable: Executable,
    flow: Flow,
    kept: Mapping[Atom, np.ndarray],
    orders: Mapping[Atom, np.ndarray],
    sums: Mapping[int, Sequence[Slice]],
) -> Executable:
    """The executable that `rewrite` made of a program, with what the pruned units add to its sums.

    Args:
      executable: a rewritten program.
      flow: axes of the program at known sizes.
      kept: boolean `[atom size]` of every atom that lost units.
      orders: the units that stay, in their new order, of every atom whose units change places.
      sums: `Findings.sums` of the flow.
    """
    additions: dict[int, tuple[Addition, ...]] = {}
    bodies = dict(executable.bodies)
    for known, eqn in zip(flow.program.equations, executable.program.equations):
        if id(eqn) in bodies:
            inner = zip(bodies[id(eqn)], flow.bodies[id(known)])
            bodies[id(eqn)] = tuple(with_equal_sums(e, f, kept, orders, sums) for e, f in inner)
        parts = [part for part in sums.get(id(known), ()) if part.atoms <= kept.keys()]
        if parts:
            additions[id(eqn)] = tuple(
                _addition(flow, executable.program, eqn, part, kept, orders) for part in parts
            )
    return dataclasses.replace(executable, bodies=bodies, additions=additions)


def _addition(
    flow: Flow,
    program: FlatProgram,
    eqn: Equation,
    part: Slice,
    kept: Mapping[Atom, np.ndarray],
    orders: Mapping[Atom, np.ndarray],
) -> Addition:
    """What the units of `part.atoms` add that are pruned all at once: the sum over a single one of each, as often as there are such."""
    pruned = {atom: np.flatnonzero(~kept[atom]) for atom in part.atoms}
    one = {atom: np.arange(len(kept[atom])) == units[0] for atom, units in pruned.items()}
    own_orders = {atom: units for atom, units in orders.items() if atom not in pruned}
    summand = eqn.inputs[0]

    def sliced(whole: FlatProgram) -> FlatProgram:
        numbers = tuple(_filled(whole, value, number) for value, number in part.numbers.items())
        equations = (*numbers, *(whole.equations[place] for place in part.equations))
        return FlatProgram(equations, whole.avals, part.shared, (summand,), {}, frozenset())

    own_flow = copy.copy(flow)
    own_flow.program = sliced(flow.program)
    own = sliced(program) if program is not flow.program else own_flow.program
    alone = {**kept, **one}
    executable = rewrite(own_flow, own, alone, own_orders)
    sizes = Sizes(own_flow, own, alone, own_orders)
    term = sizes.term(eqn)
    runs = {dim: _runs(sizes, term[dim], part.atoms) for dim in eqn.params["axes"]}
    count = math.prod(map(len, pruned.values()))

    def addition(read: Callable[[int], Any], bind: Binder | None) -> Any:
        (value,) = execute(executable, [read(i) for i in part.shared], bind)
        for dim, places in runs.items():
            if places is not None:
                parts = [jax.lax.slice_in_dim(value, first, last, axis=dim) for first, last in places]
                value = jax.lax.concatenate(parts, dim)
        return _times(eqn.primitive.bind(value, **eqn.params), count)

    return addition


def _filled(program: FlatProgram, value: int, number: Any) -> Equation:
    """In place of a value that consists of one number."""
    aval = program.avals[value]
    params = {"shape": tuple(aval.shape), "broadcast_dimensions": (), "sharding": None}
    literal = Literal(np.asarray(number, aval.dtype))
    return Equation(jax.lax.broadcast_in_dim_p, (literal,), (value,), params, "")


def _runs(sizes: Sizes, axis: Axis, atoms: frozenset[Atom]) -> list[tuple[int, int]] | None:
    """First and last place of each run of entries of an axis that are units of all of `atoms` that it has; None if all entries are."""
    axes = sizes.flow.axes
    inside = atoms.intersection(axes.atoms(axis))
    places = sizes.places(axis)
    here = np.ones(len(places), bool)
    for atom in inside:
        here &= axes.labels(axis, atom)[places] >= 0
    if here.all():
        return None
    edges = np.flatnonzero(np.diff(np.pad(here.astype(np.int8), 1)))
    return [(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2])]


def _times(value: jax.Array, count: int) -> jax.Array:
    """In half precision a count would be rounded."""
    if value.dtype in (jnp.float16, jnp.bfloat16):
        return (value.astype(jnp.float32) * count).astype(value.dtype)
    return value * count

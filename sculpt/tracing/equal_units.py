"""Sums over pruned units that are equal but not zero, as in the two-pass variance.

`mean((x - mean)**2)` sums over channels. Masks make `x` zero at pruned channels, so the summand is `mean**2` at every one of them. The sum
is that over the kept channels, plus the number of pruned channels times that value. The value comes from the operations that give
the summand, run for a single pruned unit. A `Slice` lists these operations, from values that are zero at pruned units or that have no such
units (the mean) up to the summand.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from sculpt.ir.program import Equation, FlatProgram
from sculpt.tracing.axes import Atom, Axes, Axis, Term
from sculpt.tracing.flow import Flow
from sculpt.tracing.rules import ELEMENTWISE
from sculpt.tracing.zeros import ZeroPass

_UNIT_BY_UNIT = {
    *ELEMENTWISE,
    *("broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "split", "concatenate", "pad"),
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"),
}
"""Operations that give equal results at units where their operands are equal."""
_WITH_BODIES = ("custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
_MOST_ATOMS = 3
"""Sums over products of more atoms than these, none of which is zero, are not followed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The operations that give a summand at a single pruned unit of each of some atoms."""

    atoms: frozenset[Atom]
    equations: tuple[int, ...]
    """Their places among the program's equations, in order."""
    shared: tuple[int, ...]
    """Ids of values that they read and that do not have these atoms."""
    numbers: dict[int, Any]
    """What values that they read consist of there, by id: zero, or another number that is known."""


def find_slices(zeros: ZeroPass, eqn: Equation, atoms: Collection[Atom]) -> tuple[list[Slice], set[Atom]]:
    """What the pruned units of `atoms` add to a sum whose operand is not zero there.

    Returns:
      A slice for every set of atoms of which all units can be pruned at once at an entry of the sum, and the atoms whose pruned units are not
      known to be equal.
    """
    term = zeros.term(eqn.inputs[0])
    summed = [term[dim] for dim in eqn.params["axes"]]
    slices, unequal = _slices(zeros, eqn, [frozenset((atom,)) for atom in atoms])
    joint, apart = _slices(zeros, eqn, _together(zeros.flow.axes, summed, set(atoms) - unequal))
    return slices + joint, unequal | apart


def _slices(zeros: ZeroPass, eqn: Equation, sets: Iterable[frozenset[Atom]]) -> tuple[list[Slice], set[Atom]]:
    slices: list[Slice] = []
    unequal: set[Atom] = set()
    for atoms in sets:
        found = _slice(zeros, eqn.inputs[0], atoms) if len(atoms) <= _MOST_ATOMS else None
        if found is None:
            unequal |= atoms
        else:
            slices.append(found)
    return slices, unequal


def _together(axes: Axes, summed: Sequence[Axis], atoms: Collection[Atom]) -> set[frozenset[Atom]]:
    """The sets of two and more `atoms` that one entry of the summed axes can be units of."""
    sets: set[frozenset[Atom]] = {frozenset()}
    for axis in summed:
        inside = {frozenset(atoms).intersection(found) for _, found in axes.monomials(axis)}
        sets = {one | other for one in sets for other in inside}
    sizes = range(2, _MOST_ATOMS + 2)
    return {
        frozenset(part) for whole in sets for size in sizes for part in itertools.combinations(whole, size)
    }


def _slice(zeros: ZeroPass, value: Any, atoms: frozenset[Atom]) -> Slice | None:
    """The slice that gives a value at a pruned unit of each of `atoms`, or None if pruned units may differ."""
    program, flow = zeros.flow.program, zeros.flow
    shared: set[int] = set()
    numbers: dict[int, Any] = {}
    equations: set[int] = set()
    pending, seen = [value], {value}
    while pending:
        value = pending.pop()
        here = atoms.intersection(zeros.live(flow.terms[value]))
        known = zeros.zeros[value]
        if not here:
            shared.add(value)
            continue
        if here & known.atoms or known.constant is not None:
            numbers[value] = 0 if here & known.atoms else known.constant
            continue
        place = zeros.places.get(value)
        if place is None or here & _repeated(flow.axes, flow.terms[value]):
            return None
        eqn = program.equations[place]
        operands = [i for i in eqn.inputs if isinstance(i, int)]
        outside = atoms.intersection(zeros.live(axis for i in operands for axis in flow.terms[i])) - here
        if program.is_table(eqn) or id(eqn) in zeros.findings.sums or outside or not _unit_by_unit(flow, eqn):
            return None
        equations.add(place)
        pending += [i for i in operands if i not in seen]
        seen.update(operands)
    return Slice(atoms, tuple(sorted(equations)), tuple(sorted(shared)), numbers)


def _repeated(axes: Axes, term: Term) -> set[Atom]:
    """The atoms that a term multiplies by themselves: an entry can be two different units of one of them at once."""
    repeated: set[Atom] = set()
    before: set[Atom] = set()
    for axis in term:
        products = [atoms for _, atoms in axes.monomials(axis)]
        inside = {atom for atoms in products for atom in atoms}
        repeated |= before & inside
        repeated |= {atom for atoms in products for atom in atoms if atoms.count(atom) > 1}
        before |= inside
    return repeated


def _unit_by_unit(flow: Flow, eqn: Equation) -> bool:
    """Whether the results are equal at units where the operands are. Of functions with bodies only those that work element by element, in
    their derivative too."""
    if eqn.name not in _WITH_BODIES:
        return eqn.name in _UNIT_BY_UNIT
    own = flow.derivatives.get(id(eqn))
    return all(map(_pointwise, (*eqn.bodies, *(() if own is None else (own.program,)))))


def _pointwise(program: FlatProgram) -> bool:
    return not any(map(np.ndim, program.constants.values())) and all(
        eqn.name in ELEMENTWISE
        or (eqn.name == "broadcast_in_dim" and not program.shape(eqn.inputs[0]))
        or (eqn.name in _WITH_BODIES and all(map(_pointwise, eqn.bodies)))
        for eqn in program.equations
    )

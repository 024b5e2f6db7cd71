"""Finds the coupled axes that lie in a residual branch, which a skip connection bypasses."""

from __future__ import annotations

import jax
import numpy as np

from sculpt.ir.program import CONTRACTIONS, Equation
from sculpt.tracing.axes import Atom
from sculpt.tracing.flow import Flow
from sculpt.tracing.tracer import Trace

_PRODUCTS = ("mul", "div", *CONTRACTIONS)
"""What these give is the same for every image, perhaps zero, as soon as one of their operands is."""


def branch_atoms(trace: Trace, needed: frozenset[int] = frozenset()) -> frozenset[Atom]:
    """The atoms of groups without any unit of which the output still depends on the images, also where all of them have gone: of
    branches side by side the first may go. The layers of the leaves `needed` then depend on them too.

    Inside loops none is: what a loop gives is not told apart from what it was given.
    """
    flow = trace.flow
    images = set(trace.program.inputs[-len(jax.tree.leaves(trace.inputs)) :])
    depends = set(images)
    steps: list[tuple[Equation, frozenset[Atom]]] = []
    for eqn in trace.program.equations:
        if depends.intersection(i for i in eqn.inputs if isinstance(i, int)):
            depends.update(eqn.outputs)
            steps.append((eqn, _inside(flow, eqn)))
    vanishing = {o: _vanishing(flow, o) for eqn, _ in steps for o in eqn.outputs}
    layers = {id(layer.equation) for layer in trace.layers if layer.leaf in needed}
    stay = {o for eqn, _ in steps if id(eqn) in layers for o in eqn.outputs}

    def reaches_the_output(gone: set[Atom]) -> bool:
        alive = set(images)
        for eqn, inside in steps:
            reads = [i in alive for i in eqn.inputs if isinstance(i, int) and i in depends]
            if inside.isdisjoint(gone) and (all if eqn.name in _PRODUCTS else any)(reads):
                alive.update(o for o in eqn.outputs if vanishing[o].isdisjoint(gone))
        return stay <= alive and not alive.isdisjoint(o for o in trace.program.outputs if isinstance(o, int))

    found: set[Atom] = set()
    for group in trace.groups:
        if reaches_the_output(found | {group.atom}):
            found.add(group.atom)
    return frozenset(found)


def _vanishing(flow: Flow, value: int) -> frozenset[Atom]:
    """The atoms without which nothing is left of a value."""
    axes = flow.axes
    return frozenset(
        atom
        for axis in flow.terms[value]
        for atom in axes.atoms(axis)
        if not axes.keep(axis, {atom: np.zeros(axes.atom_size(atom), bool)}).any()
    )


def _inside(flow: Flow, eqn: Equation) -> frozenset[Atom]:
    """The atoms of all values in an equation's bodies."""
    found: set[Atom] = set()
    for body in flow.bodies.get(id(eqn), ()):
        for term in body.terms.values():
            for axis in term:
                found.update(flow.axes.atoms(axis))
        for inner in body.program.equations:
            found |= _inside(body, inner)
    return frozenset(found)

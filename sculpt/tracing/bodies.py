"""Axis-flow rules of equations with bodies: loops, branches, rematerialisation, custom derivatives."""

from __future__ import annotations

from sculpt.ir.jax_calls import scan_parts, scan_results, scan_steps, shard_counts, while_parts
from sculpt.ir.program import Equation, FlatProgram, Operand, derivative, is_inexact
from sculpt.tracing.axes import Axis, Term
from sculpt.tracing.flow import Flow, because, rule

_DIFFER = "axes of different structure meet"


@rule("checkpoint", "remat2")
def _checkpoint(flow: Flow, eqn: Equation) -> list[Term]:
    return flow.body(eqn, 0, [flow.term(o) for o in eqn.inputs])


@rule("shard_map")
def _shard_map(flow: Flow, eqn: Equation) -> list[Term]:
    if not eqn.bodies:
        return flow.unknown(eqn, "more than a map over the parts of a batch")
    before, after = shard_counts(eqn)
    reason = because(eqn, "split among devices")
    parts: dict[int, Axis] = {}

    def local(term: Term, count: int) -> Term:
        if count == 1:
            return term
        outer, inner = flow.axes.split(term[0], count, flow.axes.size(term[0]) // count, reason)
        flow.axes.freeze(outer, reason)
        parts.setdefault(count, outer)
        return (inner, *term[1:])

    results = flow.body(eqn, 0, [local(flow.term(o), count) for o, count in zip(eqn.inputs, before)])
    return [
        (flow.axes.merge((parts.get(n) or flow.axes.fresh(n, reason), term[0])), *term[1:]) if n > 1 else term
        for term, n in zip(results, after)
    ]


@rule("scan")
def _scan(flow: Flow, eqn: Equation) -> list[Term]:
    consts, carry, stacked = scan_parts(eqn, [flow.term(o) for o in eqn.inputs])
    for term in stacked:
        flow.axes.freeze(term[0], because(eqn, "steps of a scan"))
    # The axes inside are those of the stacked arrays: what is pruned is pruned in every step alike.
    results = flow.body(eqn, 0, [*consts, *carry, *(term[1:] for term in stacked)])
    new_carry, rows = scan_results(eqn, results)
    for before, after in zip(carry, new_carry):
        flow.unify(before, after, because(eqn, _DIFFER))
    steps = flow.axes.fresh(scan_steps(eqn), because(eqn, "steps of a scan"))
    return [*carry, *((steps, *term) for term in rows)]


@rule("while")
def _while(flow: Flow, eqn: Equation) -> list[Term]:
    of_condition, of_body, carry = while_parts(eqn, [flow.term(o) for o in eqn.inputs])
    flow.body(eqn, 0, [*of_condition, *carry])
    results = flow.body(eqn, 1, [*of_body, *carry])
    for before, after in zip(carry, results):
        flow.unify(before, after, because(eqn, _DIFFER))
    return carry


@rule("cond")
def _cond(flow: Flow, eqn: Equation) -> list[Term]:
    terms = [flow.term(o) for o in eqn.inputs[1:]]
    branches = [flow.body(eqn, index, terms) for index in range(len(eqn.bodies))]
    for other in branches[1:]:
        for x, y in zip(branches[0], other):
            flow.unify(x, y, because(eqn, _DIFFER))
    return branches[0]


@rule("custom_jvp_call", "custom_vjp_call")
def _custom(flow: Flow, eqn: Equation) -> list[Term]:
    terms = [flow.term(o) for o in eqn.inputs]
    results = flow.body(eqn, 0, terms)
    if not flow.with_derivatives:
        return results
    inexact = [term for o, term in zip(eqn.inputs, terms) if _inexact(flow.program, o)]
    inexact_results = [term for o, term in zip(eqn.outputs, results) if _inexact(flow.program, o)]
    if eqn.name == "custom_jvp_call":
        known, expected = inexact, [*results, *inexact_results]
    else:
        known, expected = inexact_results, inexact
    # The derivative has to be cut down too, for further training: its axes are those of the function.
    backward = Flow(derivative(flow.program, eqn), flow.axes, [*terms, *known], with_derivatives=False)
    for x, y in zip(backward.results, expected, strict=True):
        flow.unify(x, y, because(eqn, _DIFFER))
    flow.derivatives[id(eqn)] = backward
    return results


def _inexact(program: FlatProgram, operand: Operand) -> bool:
    return is_inexact(program.avals[operand]) if isinstance(operand, int) else is_inexact(operand.value)

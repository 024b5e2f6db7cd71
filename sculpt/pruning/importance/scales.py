"""Finds the scale parameters of normalisations in a program.

Found by what the program does with them, not by their names, so Linen, NNX and plain functions are treated alike.
"""

from __future__ import annotations

from sculpt.ir.jax_calls import scan_parts
from sculpt.ir.program import FlatProgram
from sculpt.tracing.tracer import Trace

_VIEWS = frozenset(("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"))
_CALLS = frozenset(("checkpoint", "custom_jvp_call", "custom_vjp_call", "remat2"))


def scale_leaves(trace: Trace) -> frozenset[int]:
    """Indices of the leaves that are a vector `[channels]` (or one per step of a scan) and a factor of a product.

    These are the scales of BatchNorm and its relatives (LayerNorm, GroupNorm, RMSNorm, LayerScale); biases are added and do
    not count. Vectors inside the bodies of `while` and `cond` are not looked for.
    """
    leaves = {value: leaf.index for value, leaf in zip(trace.program.inputs, trace.leaves)}
    vectors = {value for value, index in leaves.items() if len(trace.leaves[index].shape) == 1}
    found: set[int] = set()
    _visit(trace.program, leaves, vectors, found)
    return frozenset(found)


def _visit(program: FlatProgram, leaves: dict[int, int], vectors: set[int], found: set[int]) -> None:
    """Follows leaves and their views (value id -> leaf); `vectors` are the values among them that are one vector."""
    leaves, vectors = dict(leaves), set(vectors)
    for eqn in program.equations:
        known = [o if isinstance(o, int) and o in leaves else None for o in eqn.inputs]
        if eqn.name == "mul":
            found.update(leaves[value] for value in known if value in vectors)
        elif eqn.name in _VIEWS and known[0] is not None:
            leaves[eqn.outputs[0]] = leaves[known[0]]
            if known[0] in vectors:
                vectors.add(eqn.outputs[0])
        elif eqn.name in _CALLS or eqn.name == "scan":
            body = eqn.bodies[0]
            stacked = len(known) - len(scan_parts(eqn, known)[2]) if eqn.name == "scan" else len(known)
            inner = {i: leaves[value] for i, value in zip(body.inputs, known) if value is not None}
            inner_vectors = {i for i, value in zip(body.inputs[:stacked], known) if value in vectors}
            inner_vectors |= {i for i in body.inputs[stacked:] if i in inner and len(body.shape(i)) == 1}
            _visit(body, inner, inner_vectors, found)

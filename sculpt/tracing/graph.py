"""The network as a graph: layer, merge and coupled-axis nodes; data-flow, skip and coupling edges."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from sculpt.ir.jax_calls import while_parts
from sculpt.ir.program import Equation, Literal
from sculpt.tracing.flow import Flow
from sculpt.tracing.tracer import Trace

_JOINS = ("concatenate", "stack")
_MERGES = ("add", "add_any", "sub", *_JOINS)

NODE_KINDS = ("conv", "dense", "add", "concat", "axis")
EDGE_KINDS = ("flow", "skip", "coupling", "flow back", "skip back", "coupling back")
"""Each kind has its reverse: messages run both ways, under different types."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A vertex of the graph."""

    kind: str
    """One of `NODE_KINDS`."""
    name: str
    owner: int
    """Layer or group index; -1 for merge nodes."""
    depth: int
    """Longest path of data flow from the input, in nodes."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Nodes and typed, directed edges of a traced network."""

    nodes: tuple[Node, ...]
    senders: np.ndarray
    """int32 `[edges]`."""
    receivers: np.ndarray
    """int32 `[edges]`."""
    kinds: np.ndarray
    """int32 `[edges]`: index into `EDGE_KINDS`."""


def layer_node(trace: Trace, layer: int) -> int:
    """Node of a layer."""
    return next(
        i for i, n in enumerate(topology(trace).nodes) if n.kind in ("conv", "dense") and n.owner == layer
    )


def group_node(trace: Trace, group: int) -> int:
    """Node of a coupled-axis group."""
    return next(i for i, n in enumerate(topology(trace).nodes) if n.kind == "axis" and n.owner == group)


@functools.lru_cache(maxsize=64)
def topology(trace: Trace) -> Topology:
    """Finds the graph of a traced network.

    A value flows on through operations that are no nodes (normalisation, activation, pooling, reshape). A flow edge into
    a merge that jumps over at least one node on the other branch is a skip edge. Every layer is coupled to the groups
    that its kernel's axes belong to.
    """
    builder = _Builder(trace)
    # Only values that depend on the image carry data flow; masks of constants and parameters do not.
    images = trace.program.inputs[-len(jax.tree.leaves(trace.inputs)) :]
    builder.visit(trace.flow, dict.fromkeys(images, frozenset()))
    nodes, edges = builder.nodes, builder.edges
    first_axis = len(nodes)
    for group in trace.groups:
        nodes.append(Node("axis", group.name, group.index, 0))
    by_leaf: dict[int, list[int]] = {}
    for index, node in enumerate(nodes[:first_axis]):
        if node.kind in ("conv", "dense"):
            by_leaf.setdefault(trace.layers[node.owner].leaf, []).append(index)
    for group in trace.groups:
        touched = dict.fromkeys(i for leaf, _ in group.slots for i in by_leaf.get(leaf, []))
        coupled = first_axis + group.index
        edges.extend((i, coupled, EDGE_KINDS.index("coupling")) for i in touched)
        level = min((nodes[i].depth for i in touched), default=0)
        nodes[coupled] = dataclasses.replace(nodes[coupled], depth=level)
    both_ways = edges + [(r, s, k + 3) for s, r, k in edges]
    table = np.asarray(both_ways, np.int32).reshape(-1, 3)
    return Topology(tuple(nodes), table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())


Sources = dict[int, frozenset[int]]
"""Value id -> the nodes that it flows from."""


class _Builder:
    def __init__(self, trace: Trace) -> None:
        self.layer_of = {id(layer.equation): layer for layer in trace.layers}
        self.nodes: list[Node] = []
        self.edges: list[tuple[int, int, int]] = []

    def visit(self, flow: Flow, sources: Sources) -> list[frozenset[int] | None]:
        """Adds the nodes and edges of a program; returns the nodes that its outputs flow from."""
        for eqn in flow.program.equations:
            if flow.program.is_table(eqn):
                continue
            flowing = [i for i in eqn.inputs if not isinstance(i, Literal) and i in sources]
            origin = frozenset().union(*(sources[i] for i in flowing))
            if eqn.bodies:
                self._bodies(flow, eqn, sources, origin)
                continue
            layer = self.layer_of.get(id(eqn))
            if not flowing and layer is None:
                continue
            branches = [sources[i] for i in dict.fromkeys(flowing)]
            if layer is not None:
                origin = self._add(layer.kind, layer.name, layer.index, origin)
            elif eqn.name in _MERGES and len(set(branches)) > 1 and all(branches):
                kind = "concat" if eqn.name in _JOINS else "add"
                origin = self._add(kind, f"{kind}{len(self.nodes)}", -1, origin)
            for output in eqn.outputs:
                sources[output] = origin
        outputs = flow.program.outputs
        return [None if isinstance(o, Literal) else sources.get(o) for o in outputs]

    def _bodies(self, flow: Flow, eqn: Equation, sources: Sources, origin: frozenset[int]) -> None:
        results: list[frozenset[int]] = [frozenset()] * len(eqn.outputs)
        for body in flow.bodies[id(eqn)]:
            operands = eqn.inputs[len(eqn.inputs) - len(body.program.inputs) :]
            if eqn.name == "while":
                of_condition, of_body, carry = while_parts(eqn, eqn.inputs)
                own = of_body if body is flow.bodies[id(eqn)][1] else of_condition
                operands = (*own, *carry)
            inner = {
                value: sources[o]
                for value, o in zip(body.program.inputs, operands)
                if not isinstance(o, Literal) and o in sources
            }
            found = self.visit(body, inner)
            if len(found) == len(results):
                results = [before | (after or frozenset()) for before, after in zip(results, found)]
        reads_image = any(not isinstance(o, Literal) and o in sources for o in eqn.inputs)
        for output, nodes in zip(eqn.outputs, results):
            if reads_image or nodes:
                sources[output] = nodes or origin

    def _add(self, kind: str, name: str, owner: int, inputs: frozenset[int]) -> frozenset[int]:
        level = 1 + max((self.nodes[i].depth for i in inputs), default=-1)
        node = len(self.nodes)
        self.nodes.append(Node(kind, name, owner, level))
        deepest = max((self.nodes[i].depth for i in inputs), default=0)
        for source in sorted(inputs):
            skip = kind in ("add", "concat") and self.nodes[source].depth < deepest
            self.edges.append((source, node, EDGE_KINDS.index("skip" if skip else "flow")))
        return frozenset({node})

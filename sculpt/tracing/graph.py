"""The network as a graph: layer, merge and coupled-axis nodes; data-flow, skip and coupling edges."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from sculpt.tracing.program import Literal
from sculpt.tracing.trace import Trace

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
    program = trace.program
    layer_at = {layer.equation: layer for layer in trace.layers}
    nodes: list[Node] = []
    edges: list[tuple[int, int, int]] = []
    sources: dict[int, frozenset[int]] = {}
    image = program.inputs[-1]
    # Only values that depend on the image carry data flow; masks of constants and parameters do not.
    sources[image] = frozenset()

    def add(kind: str, name: str, owner: int, inputs: frozenset[int]) -> int:
        level = 1 + max((nodes[i].depth for i in inputs), default=-1)
        nodes.append(Node(kind, name, owner, level))
        return len(nodes) - 1

    for position, eqn in enumerate(program.equations):
        flowing = [i for i in eqn.inputs if not isinstance(i, Literal) and i in sources]
        if not flowing:
            continue
        origin = frozenset().union(*(sources[i] for i in flowing))
        branches = [sources[i] for i in dict.fromkeys(flowing)]
        layer = layer_at.get(position)
        if layer is not None:
            node = add(layer.kind, layer.name, layer.index, origin)
        elif (
            eqn.name in ("add", "add_any", "sub", "concatenate") and len(set(branches)) > 1 and all(branches)
        ):
            kind = "concat" if eqn.name == "concatenate" else "add"
            node = add(kind, f"{kind}{len(nodes)}", -1, origin)
        else:
            for output in eqn.outputs:
                sources[output] = origin
            continue
        deepest = max((nodes[i].depth for i in origin), default=0)
        for source in sorted(origin):
            skip = nodes[node].kind in ("add", "concat") and nodes[source].depth < deepest
            edges.append((source, node, EDGE_KINDS.index("skip" if skip else "flow")))
        for output in eqn.outputs:
            sources[output] = frozenset({node})
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

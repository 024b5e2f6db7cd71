"""Observations of the agent: per-site feature tables, and the network as a `jraph.GraphsTuple`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked
from sculpt.model import Params
from sculpt.pruning.costs import resource_used
from sculpt.pruning.families.family import Choice
from sculpt.pruning.masks import check_policies
from sculpt.pruning.space import Space, make_choices, retained_shares
from sculpt.tracing.graph import EDGE_KINDS, NODE_KINDS, topology

OPTIONS = 8
"""Node features have room for so many options of a site, so that all networks have features of the same size; no family offers
more for a kernel of two dimensions."""


@dataclasses.dataclass(frozen=True)
class SiteFeatures:
    """What is known of each option before anything is scored; float32 `[sites, max_options]`, 0 where invalid."""

    retained: jax.Array
    """Share of the site's weight energy that the option keeps; of the space's importance, for channels, if it has one."""
    cost: jax.Array
    """What the network uses of the space's resource / dense if this site alone takes the option."""
    kept: jax.Array
    """Fraction of the site's units that the option keeps."""


jax.tree_util.register_dataclass(SiteFeatures, ["retained", "cost", "kept"], [])


def site_features(space: Space, params: Params) -> SiteFeatures:
    """Tables over all options of all sites (jit-able)."""
    return _site_features(space, retained_shares(space, make_choices(space, params)))


def _site_features(space: Space, retained: jax.Array) -> SiteFeatures:
    return SiteFeatures(
        retained=retained,
        cost=jnp.where(space.valid, space.option_cost, 0.0),
        kept=jnp.asarray(space.kept),
    )


@checked
def to_graph(
    space: Space,
    params: Params,
    policy: Any = None,
    budget: Any = 1.0,
    choices: Sequence[Choice] | None = None,
) -> Any:
    """The traced network as a graph, the current policy embedded in it.

    Nodes are layers, merges (add, concat) and coupled-axis groups; edges are data flow, skips and couplings, each with
    its reverse under a type of its own. jit- and vmap-able over `policy` and `budget`.

    Args:
      space: the search space.
      params: parameters, whose weight statistics and retained shares (see `SiteFeatures`) are features.
      policy: integers `[sites]`; None stands for the dense network.
      budget: share of the resource to be met; what is left to remove is a feature of every node.
      choices: what `make_choices` gives for these parameters, where it is at hand.

    Returns:
      `jraph.GraphsTuple` of one graph: nodes float32 `[nodes, features]`, edges float32 `[edges, edge kinds]` (one-hot),
      globals float32 `[1, 3]` (budget, cost of the policy, what is left to remove).
    """
    import jraph

    graph = topology(space.trace)
    if policy is None:
        policy = jnp.zeros(space.num_sites, jnp.int32)
    policy = check_policies(space, policy)
    if choices is None:
        choices = make_choices(space, params)
    budget = jnp.asarray(budget, jnp.float32)
    ratio = resource_used(space, policy)
    summary = jnp.stack([budget, ratio, ratio - budget])
    return jraph.GraphsTuple(
        nodes=_node_features(space, params, retained_shares(space, choices), policy, summary),
        edges=jnp.asarray(np.eye(len(EDGE_KINDS), dtype=np.float32)[graph.kinds]),
        senders=jnp.asarray(graph.senders),
        receivers=jnp.asarray(graph.receivers),
        n_node=jnp.asarray([len(graph.nodes)], jnp.int32),
        n_edge=jnp.asarray([len(graph.senders)], jnp.int32),
        globals=summary[None, :],
    )


@functools.partial(jax.jit, static_argnums=0)
def _node_features(
    space: Space, params: Params, retained: jax.Array, policy: jax.Array, summary: jax.Array
) -> jax.Array:
    static = jnp.asarray(_static_features(space))
    weights, chosen = _weight_features(space, params), _policy_features(space, retained, policy)
    totals = jnp.broadcast_to(summary[None, :], (len(static), 3))
    return jnp.concatenate([static, weights, chosen, totals], axis=1)


def _static_features(space: Space) -> np.ndarray:
    """Kind, log sizes, kernel, stride, shares of MACs and parameters, depth; `[nodes, 17]`."""
    trace = space.trace
    graph = topology(trace)
    deepest = max(node.depth for node in graph.nodes) or 1
    params = {leaf.index: float(np.prod(leaf.shape)) / trace.num_params for leaf in trace.leaves}
    rows = []
    for node in graph.nodes:
        kind = [float(node.kind == k) for k in NODE_KINDS]
        sizes, kernel, stride, shares = [0.0] * 3, [0.0, 0.0], 0.0, [0.0, 0.0]
        spread = 0.0
        if node.kind in ("conv", "dense"):
            layer = trace.layers[node.owner]
            positions = float(np.prod(layer.out_spatial)) if layer.out_spatial else 1.0
            sizes = [np.log2(n) / 10 for n in (layer.in_channels, layer.out_channels, positions)]
            kernel = [n / 7 for n in (*layer.kernel_size, 1, 1)[:2]]
            stride = max(layer.strides, default=1) / 2
            shares = [layer.macs / trace.macs, params[layer.leaf]]
        elif node.kind == "axis":
            group = trace.groups[node.owner]
            sizes[1] = np.log2(group.size) / 10
            spread = len(group.slots) / 32
            touched = {leaf for leaf, _ in group.slots}
            shares = [
                sum(layer.macs for layer in trace.layers if layer.leaf in touched) / max(trace.macs, 1),
                sum(params[leaf] for leaf in touched),
            ]
        logs = [np.log10(max(s, 1e-6)) / 6 for s in shares]
        rows.append([*kind, *sizes, *kernel, stride, *shares, *logs, node.depth / deepest, spread])
    return np.asarray(rows, np.float32)


def _weight_features(space: Space, params: Params) -> jax.Array:
    """Log of mean magnitude and of spread of each layer's kernel; `[nodes, 2]`, zeros for other nodes."""
    leaves = jax.tree.leaves(params)
    rows = []
    for node in topology(space.trace).nodes:
        if node.kind in ("conv", "dense"):
            weights = jnp.abs(jnp.asarray(leaves[space.trace.layers[node.owner].leaf], jnp.float32))
            rows.append(jnp.log10(jnp.stack([weights.mean(), weights.std()]) + 1e-6) / 6)
        else:
            rows.append(jnp.zeros(2, jnp.float32))
    return jnp.stack(rows)


def _policy_features(space: Space, shares: jax.Array, policy: jax.Array) -> jax.Array:
    """Of the node's site: retained share under every option, the current choice one-hot, what it keeps and costs."""
    table = _site_features(space, shares)
    count = len(topology(space.trace).nodes)
    sites = np.arange(space.num_sites, dtype=np.int32)
    options = max(OPTIONS, space.max_options)
    retained = jnp.pad(table.retained, ((0, 0), (0, options - space.max_options)))
    current = jax.nn.one_hot(policy, options, dtype=jnp.float32)
    chosen = jnp.stack([t[sites, policy] for t in (table.retained, table.kept, table.cost)], axis=1)
    ones = jnp.ones((space.num_sites, 1), jnp.float32)
    rows = jnp.concatenate([ones, retained, current, chosen], axis=1)
    return jax.ops.segment_sum(rows, jnp.asarray(space.site_nodes), count)

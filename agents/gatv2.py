"""GATv2 graph attention layers: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?" (arXiv 2105.14491).

    e_ij = a^T LeakyReLU(W_s h_j + W_t h_i + W_e x_ij),   alpha_ij = softmax over j of e_ij,   h_i' = sum_j alpha_ij W_s h_j

for an edge from node j (sender) to node i (receiver) with features x_ij. Sums over edges, those of gradients included, are
products with 0/1 incidence matrices instead of scatter-adds: a few hundred nodes make that cheap, it suits a TPU, and the
bits are the same at every run where an atomic scatter-add on a GPU would not give that.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Graph = Any
"""A `jraph.GraphsTuple` of one graph; jraph annotates its fields too widely to compute with them."""
_NEGATIVE_SLOPE = 0.2
_EXACT = jax.lax.Precision.HIGHEST


def take_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `[len(index), width]` of `rows` `[n, width]`, with a gradient that sums in a fixed order."""
    return jnp.matmul(jax.nn.one_hot(index, rows.shape[0], dtype=rows.dtype), rows, precision=_EXACT)


def segment_softmax(
    scores: jax.Array, segments: jax.Array, num_segments: int, mask: jax.Array | None = None
) -> jax.Array:
    """Softmax over the rows of each segment.

    Args:
      scores: float32 `[edges, heads]`.
      segments: int32 `[edges]`, the segment (receiving node) of every row.
      num_segments: how many segments there are; some may be empty.
      mask: bool `[edges]`; a row that is False gets weight 0.

    Returns:
      float32 `[edges, heads]`. The weights of a segment add up to 1, or to 0 where no row of it counts; never NaN.
    """
    keep = jnp.ones(segments.shape, bool) if mask is None else mask
    scores = jnp.where(keep[:, None], scores, -1e9)
    highest = jax.ops.segment_max(jax.lax.stop_gradient(scores), segments, num_segments)
    highest = jnp.maximum(highest, -1e9)  # the maximum of an empty segment is -inf, which would turn into NaN
    weights = jnp.exp(scores - highest[segments]) * keep[:, None].astype(scores.dtype)
    incidence = jax.nn.one_hot(segments, num_segments, dtype=scores.dtype)
    totals = jnp.matmul(incidence.T, weights, precision=_EXACT)
    return weights / jnp.maximum(jnp.matmul(incidence, totals, precision=_EXACT), 1e-9)


class GATv2Layer(nn.Module):
    """One layer: multi-head attention over incoming edges and a self-loop, residual, LayerNorm."""

    width: int
    """Features of a node, in and out; a multiple of `heads`."""
    heads: int
    """Attention heads; each attends with `width / heads` features."""

    @nn.compact
    def __call__(
        self,
        nodes: jax.Array,
        edges: jax.Array,
        senders: jax.Array,
        receivers: jax.Array,
        node_mask: jax.Array | None = None,
    ) -> jax.Array:
        """New node features float32 `[n, width]`.

        Args:
          nodes: float32 `[n, width]`.
          edges: float32 `[e, edge_features]`.
          senders: int32 `[e]`.
          receivers: int32 `[e]`.
          node_mask: bool `[n]`, False for padding: such nodes send nothing and come out as zeros.
        """
        count, head_width = nodes.shape[0], self.width // self.heads
        itself = jnp.arange(count, dtype=senders.dtype)
        senders, receivers = jnp.concatenate([senders, itself]), jnp.concatenate([receivers, itself])
        sent = take_rows(nn.Dense(self.width, name="source")(nodes), senders)
        received = take_rows(nn.Dense(self.width, use_bias=False, name="target")(nodes), receivers)
        typed = nn.Dense(self.width, use_bias=False, name="edge")(edges)
        loop = self.param("loop", nn.initializers.normal(0.1), (1, self.width))
        typed = jnp.concatenate([typed, jnp.broadcast_to(loop, (count, self.width))])

        mixed = nn.leaky_relu(sent + received + typed, _NEGATIVE_SLOPE).reshape(-1, self.heads, head_width)
        attention = self.param("attention", nn.initializers.lecun_normal(), (self.heads, head_width))
        scores = jnp.einsum("ehd,hd->eh", mixed, attention, precision=_EXACT)
        real = None if node_mask is None else node_mask[senders] & node_mask[receivers]
        weights = segment_softmax(scores, receivers, count, real)
        messages = (weights[:, :, None] * sent.reshape(-1, self.heads, head_width)).reshape(-1, self.width)
        incidence = jax.nn.one_hot(receivers, count, dtype=nodes.dtype)
        attended = jnp.matmul(incidence.T, messages, precision=_EXACT)
        result = nn.LayerNorm(name="norm")(nodes + nn.gelu(attended))
        return result if node_mask is None else result * node_mask[:, None].astype(result.dtype)


class GraphEncoder(nn.Module):
    """Embeds every node of a graph: an input layer that also reads the graph's globals, then GATv2 layers."""

    width: int
    """Features of a node embedding."""
    layers: int
    """GATv2 layers: how many edges far a node sees."""
    heads: int
    """Attention heads of each layer."""

    @nn.compact
    def __call__(self, graph: Graph, node_mask: jax.Array | None = None) -> jax.Array:
        """Embeddings float32 `[n, width]` of one graph (nodes `[n, f]`, edges `[e, g]`, globals `[1, k]`)."""
        shared = jnp.broadcast_to(graph.globals, (graph.nodes.shape[0], graph.globals.shape[1]))
        nodes = nn.Dense(self.width, name="input")(jnp.concatenate([graph.nodes, shared], axis=1))
        nodes = nn.LayerNorm(name="input_norm")(nn.gelu(nodes))
        for layer in range(self.layers):
            attend = GATv2Layer(self.width, self.heads, name=f"layer{layer}")
            nodes = attend(nodes, graph.edges, graph.senders, graph.receivers, node_mask)
        return nodes

"""Importance by retained energy: how much of the squared weights a unit or a window carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.tracing import Group, Trace


def unit_energy(trace: Trace, group: Group, leaves: Sequence[Any]) -> jax.Array:
    """float32 `[group size]`: energy of each unit over the whole coupled group, summing to one per kernel.

    Every kernel that the group touches (as output or as input) counts alike, whatever its scale: a residual stream is
    not ranked by its largest layer alone. Vectors (biases, normalisation) are left out unless there is nothing else.
    """
    kernels = [slot for slot in group.slots if len(trace.leaves[slot[0]].shape) > 1] or list(group.slots)
    total = jnp.zeros(group.size, jnp.float32)
    for leaf, dim in kernels:
        weights = jnp.asarray(leaves[leaf], jnp.float32)
        per_index = jnp.square(weights).sum(axis=tuple(d for d in range(weights.ndim) if d != dim))
        labels = trace.axes.labels(trace.leaf_term(leaf)[dim], group.atom)
        # Indices that belong to other groups fall into an extra bin.
        energy = jax.ops.segment_sum(per_index, jnp.where(labels < 0, group.size, labels), group.size + 1)[
            :-1
        ]
        total = total + energy / jnp.maximum(energy.sum(), jnp.finfo(jnp.float32).tiny)
    return total


def window_energy(kernel: Any, axes: Sequence[int]) -> jax.Array:
    """float32 over the kernel's window axes: energy at each of its positions, summed over channels."""
    weights = jnp.square(jnp.asarray(kernel, jnp.float32))
    return weights.sum(axis=tuple(d for d in range(weights.ndim) if d not in axes))

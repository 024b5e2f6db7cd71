"""Importance from weights alone: energy, magnitude, normalisation scales, distance to the other units.

Notation: a group is coupled in the arrays k = 1..K, and `w_k[u]` are the entries of array k that go when unit u goes. Every
array counts alike, whatever its scale, so that a residual stream is not ranked by its largest layer alone. Arrays are the
kernels (two axes or more) that the units are an output or an input of; vectors (biases, normalisation) are left out unless
there is nothing else. A kernel whose input and output are both of the group counts once for either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.pruning.importance.scales import scale_leaves
from sculpt.pruning.importance.units import kernel_slots, share, slot_labels, sum_by_unit, vectors_by_unit
from sculpt.tracing.tracer import Group, Trace


def unit_energy(trace: Trace, group: Group, leaves: Sequence[Any]) -> jax.Array:
    """float32 `[group size]`: `sum_k |w_k[u]|^2 / |w_k|^2`, the share of the energy of each kernel that a unit carries."""
    total = jnp.zeros(group.size, jnp.float32)
    for leaf, axis in kernel_slots(trace, group):
        total = total + _energy_share(leaves[leaf], slot_labels(trace, group, leaf, axis), axis, group.size)
    return total


@functools.partial(jax.jit, static_argnames=("axis", "size"))
def _energy_share(kernel: jax.Array, labels: jax.Array, axis: int, size: int) -> jax.Array:
    """Compiled once for all kernels of a shape."""
    return share(sum_by_unit(jnp.square(_float32(kernel)), axis, labels, size))


def unit_l1(trace: Trace, group: Group, leaves: Sequence[Any]) -> jax.Array:
    """float32 `[group size]`: `sum_k |w_k[u]|_1 / sum_v |w_k[v]|_1` (Li et al. 2017, Pruning Filters for Efficient ConvNets,
    arXiv 1608.08710, over the whole coupled group)."""
    total = jnp.zeros(group.size, jnp.float32)
    for leaf, axis in kernel_slots(trace, group):
        total = total + share(_unit_sums(trace, group, leaf, axis, jnp.abs(_float32(leaves[leaf]))))
    return total


def unit_l2(trace: Trace, group: Group, leaves: Sequence[Any]) -> jax.Array:
    """float32 `[group size]`: `sum_k |w_k[u]|_2 / sum_v |w_k[v]|_2` (He et al. 2018, Soft Filter Pruning, arXiv 1808.06866,
    over the whole coupled group)."""
    total = jnp.zeros(group.size, jnp.float32)
    for leaf, axis in kernel_slots(trace, group):
        energy = _unit_sums(trace, group, leaf, axis, jnp.square(_float32(leaves[leaf])))
        total = total + share(jnp.sqrt(energy))
    return total


def unit_scale(trace: Trace, group: Group, leaves: Sequence[Any]) -> jax.Array:
    """float32 `[group size]`: `sum_k |gamma_k[u]| / sum_v |gamma_k[v]|` over the normalisation scales gamma_k of the group
    (Liu et al. 2017, Network Slimming, arXiv 1708.06519). A group without a scale is scored by `unit_energy`."""
    scales = scale_leaves(trace)
    slots = [slot for slot in group.slots if slot[0] in scales]
    if not slots:
        return unit_energy(trace, group, leaves)
    total = jnp.zeros(group.size, jnp.float32)
    for leaf, axis in slots:
        total = total + share(_unit_sums(trace, group, leaf, axis, jnp.abs(_float32(leaves[leaf]))))
    return total


def unit_distance(trace: Trace, group: Group, leaves: Sequence[Any]) -> jax.Array:
    """float32 `[group size]`: `sum_v |x[u] - x[v]|_2`, where `x[u]` joins `w_k[u] / |w_k|_2` over all kernels k.

    He et al. 2019, Filter Pruning via Geometric Median, arXiv 1811.00250: the lowest unit is the nearest to the geometric
    median, the one that the others replace best. This is not a norm: a unit of zeros is lowest only if it lies amid them, and the
    units of a group of two are always alike.
    """
    parts = []
    for leaf, axis in kernel_slots(trace, group):
        labels = slot_labels(trace, group, leaf, axis)
        vectors = vectors_by_unit(_float32(leaves[leaf]), axis, labels, group.size)
        norm = jnp.sqrt(jnp.square(vectors).sum())
        parts.append(vectors / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    joined = jnp.concatenate(parts, axis=1)
    # Differences one unit at a time: a product of all pairs loses the small distances to rounding.
    return jax.lax.map(lambda x: jnp.sqrt(jnp.square(joined - x[None, :]).sum(axis=1)).sum(), joined)


WEIGHT_SCORES: dict[str, Callable[[Trace, Group, Sequence[Any]], jax.Array]] = {
    "energy": unit_energy,
    "l1": unit_l1,
    "l2": unit_l2,
    "batch_norm": unit_scale,
    "geometric_median": unit_distance,
}
"""Kind -> `(trace, group, parameter leaves) -> float32 [group size]`; jit-able."""


@functools.partial(jax.jit, static_argnames="axes")
def window_energy(kernel: Any, axes: tuple[int, ...]) -> jax.Array:
    """float32 over the kernel's window axes: energy at each of its positions, summed over channels."""
    weights = jnp.square(jnp.asarray(kernel, jnp.float32))
    return weights.sum(axis=tuple(d for d in range(weights.ndim) if d not in axes))


def _float32(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def _unit_sums(trace: Trace, group: Group, leaf: int, axis: int, entries: jax.Array) -> jax.Array:
    return sum_by_unit(entries, axis, slot_labels(trace, group, leaf, axis), group.size)

"""The entries of one array that belong to each unit of a coupled group, summed or as vectors.

`labels` int32 `[size of an axis]` names the unit that each index of the axis belongs to, -1 where it belongs to none: a unit
may be many indices (after a flatten), and an axis may hold several groups (a concatenation).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sculpt.tracing.tracer import Group, Trace


def fitting_leaves(trace: Trace, params: Any) -> list[Any]:
    """The leaves of `params`, in the order of `trace.leaves`.

    Raises:
      ValueError: if their shapes are not those of the traced network.
    """
    leaves = jax.tree.leaves(params)
    shapes = [tuple(np.shape(leaf)) for leaf in leaves]
    expected = [leaf.shape for leaf in trace.leaves]
    if shapes != expected:
        names = [leaf.path for leaf in trace.leaves]
        wrong = [f"{n}: {e} expected, got {s}" for n, e, s in zip(names, expected, shapes) if e != s][:3]
        raise ValueError(
            f"params do not fit the traced network ({len(expected)} leaves expected, got {len(shapes)}) {wrong}; "
            "trace the model that these parameters belong to"
        )
    return leaves


def kernel_slots(trace: Trace, group: Group) -> list[tuple[int, int]]:
    """The (leaf, axis) slots of a group in kernels; vectors (biases, normalisation) only where there is nothing else."""
    return [slot for slot in group.slots if len(trace.leaves[slot[0]].shape) > 1] or list(group.slots)


def slot_labels(trace: Trace, group: Group, leaf: int, axis: int) -> np.ndarray:
    """int32 `[size of the axis]`: the unit of `group` that each index of a leaf's axis belongs to, or -1."""
    return trace.axes.labels(trace.leaf_term(leaf)[axis], group.atom)


def sum_by_unit(entries: jax.Array, axis: int, labels: ArrayLike, size: int) -> jax.Array:
    """`[size]`: the sum of the entries of each unit along `axis`, in the dtype of `entries`."""
    per_index = entries.sum(axis=tuple(d for d in range(entries.ndim) if d != axis))
    # Indices that belong to other groups fall into an extra bin.
    labels = jnp.asarray(labels)
    return jax.ops.segment_sum(per_index, jnp.where(labels < 0, size, labels), size + 1)[:-1]


def vectors_by_unit(entries: jax.Array, axis: int, labels: np.ndarray, size: int) -> jax.Array:
    """`[size, entries per unit]`: the entries of each unit, in one order for all units."""
    own = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :].astype(np.int32)
    return jnp.moveaxis(entries, axis, 0)[own].reshape(size, -1)


def share(scores: jax.Array) -> jax.Array:
    """Non-negative scores divided by their sum, so that arrays of any scale count alike; zeros stay zeros."""
    return scores / jnp.maximum(scores.sum(), jnp.finfo(scores.dtype).tiny)

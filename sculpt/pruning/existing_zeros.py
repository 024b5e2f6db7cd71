"""Masks of a network that is already sparse, read from its zeros."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked
from sculpt.inputs import check_finite
from sculpt.model import Model
from sculpt.pruning.importance.units import fitting_leaves, slot_labels
from sculpt.tracing.tracer import Trace


@checked
def masks_from_zeros(model: Model, trace: Trace) -> Any:
    """The masks of a network that another tool, or an earlier run, has pruned: a pytree like `model.params`, boolean, True where a weight stays.

    Zeros of kernels count as pruned. Zeros of other arrays, such as biases, may be where training begins: they count as pruned only for
    units (channels, neurons) that no kernel gives anything but zero. `apply_masks(model, masks)` is the same network; `finetune` and
    `hold_zeros` keep its zeros.

    Args:
      model: the sparse network, with dense shapes.
      trace: what `sculpt.trace` found in it.

    Raises:
      ValueError: if the model is not the traced one, or has arrays that are not finite.
    """
    leaves = [np.asarray(leaf) for leaf in fitting_leaves(trace, model.params)]
    check_finite(model)
    kernels = {layer.leaf for layer in trace.layers}
    masks = [leaf != 0 if i in kernels else np.ones(leaf.shape, bool) for i, leaf in enumerate(leaves)]
    inputs = {(layer.leaf, axis) for layer in trace.layers for axis in layer.in_axes}
    outputs = {(layer.leaf, axis) for layer in trace.layers for axis in layer.out_axes}
    for group in trace.groups:
        # Units that no kernel writes, such as those of an embedding, are zero where all of their entries are.
        written = [slot for slot in group.slots if slot[0] in kernels and slot not in inputs - outputs]
        used = np.zeros(group.size, bool)
        for leaf, axis in written or group.slots:
            labels = slot_labels(trace, group, leaf, axis)
            entries = (leaves[leaf] != 0).any(axis=_others(leaves[leaf], axis))
            used[labels[(labels >= 0) & entries]] = True
        for leaf, axis in group.slots:
            if leaf not in kernels:
                labels = slot_labels(trace, group, leaf, axis)
                dead = (labels >= 0) & ~used[labels]
                along = tuple(np.newaxis if d != axis else slice(None) for d in range(leaves[leaf].ndim))
                masks[leaf] &= ~(dead[along] & (leaves[leaf] == 0))
    return jax.tree.unflatten(jax.tree.structure(model.params), map(jnp.asarray, masks))


def _others(array: np.ndarray, axis: int) -> tuple[int, ...]:
    return tuple(d for d in range(array.ndim) if d != axis)

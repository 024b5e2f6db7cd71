"""First-order Taylor importance: the change in loss, to first order, if the weights of a unit were zero."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.inputs import rows
from sculpt.interrupts import check_interrupt
from sculpt.model import ApplyFn, Model
from sculpt.pruning.importance.units import slot_labels, sum_by_unit
from sculpt.task import Task
from sculpt.tracing.tracer import Trace


def taylor_scores(
    model: Model, trace: Trace, images: Any, labels: Any, images_per_batch: int
) -> list[jax.Array]:
    """Per group float32 `[group size]`: `mean_b sum_{s in u} |w_s dL_b/dw_s|` over micro-batches b.

    Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, arXiv 1906.10771: L_b is the mean loss (the cross-entropy, unless
    the model's task says otherwise) of micro-batch b in evaluation mode (running BatchNorm statistics), and s runs over all entries of the unit in the whole
    coupled group: kernels, biases, normalisation. The terms are changes of one loss, so they are added as they are; arrays are
    not scaled to count alike. A kernel whose input and output are both of the group counts once for either.

    Args:
      images: `[n, ...]` in the dtype that the model takes, or a pytree of arrays.
      labels: integers `[n]`, or what the model's task takes.
      images_per_batch: size of a micro-batch, which bounds memory and says what b is; the last may be smaller and weighs
        as many images as it has.
    """
    n = len(labels)
    size = min(images_per_batch, n)
    totals = [jnp.zeros(group.size, jnp.float32) for group in trace.groups]
    for start in range(0, n, size):
        check_interrupt()
        # The last batch is filled up with images that weigh nothing, so that one compiled program serves all.
        index = np.arange(start, start + size, dtype=np.int32)
        real = index < n
        scores = _batch_scores(
            model.apply,
            model.task,
            trace,
            model.params,
            model.state,
            rows(images, index % n),
            labels[index % n],
            real,
        )
        weight = jnp.float32(real.sum() / n)
        totals = [total + weight * score for total, score in zip(totals, scores)]
    return totals


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _batch_scores(
    apply: ApplyFn,
    task: Task,
    trace: Trace,
    params: Any,
    state: Any,
    images: Any,
    labels: jax.Array,
    real: jax.Array,
) -> list[jax.Array]:
    def loss(params: Any) -> jax.Array:
        losses = task.measure(apply(params, state, images), labels)[1]
        return jnp.where(real, losses, 0.0).sum() / real.sum().astype(jnp.float32)

    gradients = jax.tree.leaves(jax.grad(loss)(params))
    return sum_over_slots(trace, list(map(_change, jax.tree.leaves(params), gradients)))


def _change(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    # A weight that is zero already changes nothing, also where its gradient is NaN, as that of a norm at zero.
    change = jnp.abs(weight.astype(jnp.float32) * gradient.astype(jnp.float32))
    return jnp.where(weight == 0, 0.0, change)


def sum_over_slots(trace: Trace, entries: Sequence[jax.Array]) -> list[jax.Array]:
    """Per group float32 `[group size]`: entries (one array per leaf) summed over all slots of the group."""
    scores = []
    for group in trace.groups:
        total = jnp.zeros(group.size, jnp.float32)
        for leaf, axis in group.slots:
            labels = slot_labels(trace, group, leaf, axis)
            total = total + sum_by_unit(entries[leaf], axis, labels, group.size)
        scores.append(total)
    return scores

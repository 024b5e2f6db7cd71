"""A training batch and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.data.splits import normalise
from sculpt.inputs import rows
from sculpt.task import CLASSIFICATION, Task, cross_entropy, in_float32, mean_of_real
from sculpt.training.augment import AUGMENTATIONS, mix, rand_augment
from sculpt.training.config import FinetuneConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step learns from."""

    images: Any
    """Augmented and normalised, float32 `[n, ...]`, or other inputs, one array or a pytree of them, as they are."""
    labels: jax.Array
    """`[n, ...]`, of classifiers int32."""
    others: jax.Array | None
    """int32 `[n]`: labels of the images that were mixed in; None where none are."""
    share: jax.Array | None
    """float32 scalar: the share of `labels` in the target."""
    taught: jax.Array | None
    """The teacher's logits, float32 `[n, ..., classes]`; None without a teacher."""

    def parts(self, count: int) -> list[Batch]:
        """The batch in equal parts, or itself where one is asked for."""
        if count == 1:
            return [self]
        size = len(self.labels) // count
        return [self._rows(slice(start, start + size)) for start in range(0, count * size, size)]

    def _rows(self, index: slice) -> Batch:
        return dataclasses.replace(
            self,
            images=rows(self.images, index),
            labels=self.labels[index],
            others=None if self.others is None else self.others[index],
            taught=None if self.taught is None else self.taught[index],
        )

    def loss(self, outputs: Any, config: FinetuneConfig, task: Task) -> jax.Array:
        """float32 scalar, of what the network gives for the images."""
        if task != CLASSIFICATION:
            return task.measure(outputs, self.labels)[1].mean()
        logits = in_float32(outputs)
        loss = smoothed_cross_entropy(logits, self.labels, config.label_smoothing)
        if self.others is not None and self.share is not None:
            other = smoothed_cross_entropy(logits, self.others, config.label_smoothing)
            loss = self.share * loss + (1 - self.share) * other
        if self.taught is not None:
            apart = divergence(logits, self.taught, config.temperature)
            loss = (1 - config.distillation) * loss + config.distillation * apart
        return loss


def draw_batch(
    key: jax.Array,
    images: Any,
    labels: jax.Array,
    config: FinetuneConfig,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    teach: Callable[[Any], jax.Array] | None,
) -> Batch:
    """Varies and normalises raw images `[n, ...]` with labels `[n, ...]`; `teach` gives the teacher's logits, if there is one."""
    raw = AUGMENTATIONS[config.augment](key, images)
    if config.rand_augment:
        raw = rand_augment(jax.random.fold_in(key, 1), raw, config.rand_augment)
    x = normalise(raw, *normalisation)
    others, share = None, None
    if config.mixup or config.cutmix:
        x, order, share = mix(jax.random.fold_in(key, 2), x, config.mixup, config.cutmix)
        others = labels[order]
    taught = None if teach is None else teach(x).astype(jnp.float32)
    return Batch(x, labels, others, share, taught)


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Mean of `cross_entropy`, targets smoothed (arXiv 1512.00567, section 7)."""
    loss = cross_entropy(logits, labels).mean()
    if not smoothing:
        return loss
    spread = mean_of_real(jax.nn.log_softmax(logits).mean(axis=-1), labels).mean()
    return (1 - smoothing) * loss - smoothing * spread


def divergence(logits: jax.Array, taught: jax.Array, temperature: float) -> jax.Array:
    """`T^2 KL(teacher || student)` of softened predictions, nats, the mean over float32 `[n, ..., classes]` each.

    Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531: T^2 keeps the gradient's
    size whatever the temperature T.
    """
    wanted, found = jax.nn.log_softmax(taught / temperature), jax.nn.log_softmax(logits / temperature)
    return temperature**2 * (jnp.exp(wanted) * (wanted - found)).sum(axis=-1).mean()

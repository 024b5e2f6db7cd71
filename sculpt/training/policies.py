"""Fine-tunes many policies of one network, each under its own masks."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, is_whole
from sculpt.data.splits import Splits
from sculpt.model import Model
from sculpt.pruning.masks import apply_masks, check_policies, masks_from_choices
from sculpt.pruning.space import Space, make_choices
from sculpt.training.config import FinetuneConfig
from sculpt.training.finetuning import check_fading, check_request, open_checkpoints
from sculpt.training.run import TrainingDiverged, TrainRun


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TunedPolicies:
    """The networks of n policies, fine-tuned."""

    models: Model
    """All of them: each array of `params` and `state` has an axis more, the first, of length n. NaN where training diverged."""
    validation_accuracy: jax.Array
    """float32 `[n]`, in [0, 1], on the whole validation split; 0 where training diverged."""
    diverged: jax.Array
    """bool `[n]`: whether loss or weights were no longer finite."""

    def model(self, index: int) -> Model:
        """The network of one policy."""
        return jax.tree.map(lambda array: array[index], self.models)


@checked
def finetune_policies(
    model: Model,
    space: Space,
    policies: Any,
    splits: Splits,
    config: FinetuneConfig,
    key: jax.Array,
    *,
    policies_per_chunk: int = 1,
    teacher: Model | None = None,
    directory: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TunedPolicies:
    """Fine-tunes the same network under the masks of many policies.

    Every policy gets the same `key`, hence the same batches, and the result of
    `finetune(model, make_masks(space, model.params, policy), splits, config, key)`: its very bits with `policies_per_chunk=1`,
    the same up to rounding with more, which train side by side (vmap) on images that are read and augmented once. AdamW divides
    gradients by their size, so that rounding of small ones may move a weight by as much as the learning rate in each step.
    A policy whose training diverges does not stop the others.

    Args:
      model: the dense network.
      space: sites and patterns.
      policies: integers `[n, sites]`.
      splits: data; the test split is never read.
      config: settings of each training.
      key: `jax.random.key`.
      policies_per_chunk: how many train side by side. A convolution under vmap is a grouped one, which CPUs are slow at: leave
        1 there. On accelerators memory grows with it.
      teacher: a network that all follow, as in `finetune`.
      directory: where each chunk keeps its checkpoints, in a folder that is named by its first policy ("00000", ...). The same
        call goes on there: what is complete is read back, the rest resumed. None keeps none.
      on_progress: called with (policies done, policies in all).

    Raises:
      ValueError: if policies, splits, model and teacher do not fit together, there is nothing to fade for one of the policies
        (`config.gradual`), or `directory` holds another run.
    """
    policies = check_policies(space, policies)
    if policies.ndim != 2 or not len(policies):
        raise ValueError(f"expected policies [n, {space.num_sites}] with n >= 1, got {list(policies.shape)}")
    if not is_whole(policies_per_chunk, 1):
        raise ValueError(
            f"policies_per_chunk must be a whole number of at least 1, got {policies_per_chunk!r}"
        )
    check_request(model, splits, config, teacher)
    choices = make_choices(space, model.params)
    structure = jax.tree.structure(model.params)

    def masks_of(policy: np.ndarray) -> Any:
        return structure.unflatten(masks_from_choices(space, choices, policy))

    if config.gradual:
        for policy in policies:
            check_fading(model, masks_of(policy), config)
    size = min(policies_per_chunk, len(policies))
    tuned: list[TunedPolicies] = []
    for first in range(0, len(policies), size):
        chunk = policies[first : first + size]
        # The last chunk is filled up, so that all share one program.
        rows = chunk[np.minimum(np.arange(size), len(chunk) - 1)]
        folder = None if directory is None else Path(directory) / f"{first:05d}"
        part = _tune(model, [masks_of(row) for row in rows], splits, config, key, teacher, folder)
        tuned.append(jax.tree.map(operator.itemgetter(slice(len(chunk))), part))
        if on_progress is not None:
            on_progress(first + len(chunk), len(policies))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *tuned)


def _tune(
    model: Model,
    masks: list[Any],
    splits: Splits,
    config: FinetuneConfig,
    key: jax.Array,
    teacher: Model | None,
    directory: Path | None,
) -> TunedPolicies:
    """All masks side by side, or the only ones as `finetune` does it."""
    stacked = len(masks) > 1
    if stacked:
        every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *masks)
    else:
        every = masks[0]
        model = model if config.gradual else apply_masks(model, every)
    run = TrainRun.begin(model, every, splits, config, key, teacher, stacked=stacked)
    with open_checkpoints(directory, model, every, splits, config, key, teacher) as keeper:
        try:
            run.complete(keeper)
            diverged = np.asarray(run.train.diverged) >= 0
        except TrainingDiverged:
            diverged = np.asarray(True)
    found = run.result()
    accuracy = np.where(diverged, 0, run.validated((found.params, found.state))).astype(np.float32)
    tuned = TunedPolicies(found, jnp.asarray(accuracy), jnp.asarray(diverged))
    if not stacked:
        tuned = jax.tree.map(lambda array: array[None], tuned)
    return dataclasses.replace(
        tuned, models=jax.tree.map(functools.partial(_void, tuned.diverged), tuned.models)
    )


def _void(diverged: jax.Array, array: jax.Array) -> jax.Array:
    """`[n, ...]` with NaN for the networks that diverged."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jnp.where(diverged.reshape(-1, *[1] * (array.ndim - 1)), jnp.asarray(jnp.nan, array.dtype), array)

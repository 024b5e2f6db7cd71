"""Zeros held in a training loop of one's own: `hold_zeros`, the last link of an `optax.chain`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sculpt.model import Params
from sculpt.pruning.masks import check_mask_tree


def hold_zeros(masks: Any) -> optax.GradientTransformation:
    """Has `optax.apply_updates` leave every pruned weight at exactly zero, whatever momentum and weight decay ask for.

        optimizer = optax.chain(optax.adamw(1e-3), sculpt.hold_zeros(masks))

    For losses, data and loops that `sculpt.finetune` does not know. Last in the chain: what follows it could move weights
    again. Weights that are not zero yet become so with the first update. It keeps no state.

    Args:
      masks: pytree of booleans like the parameters, False where a weight is pruned (`sculpt.make_masks`).

    Raises:
      ValueError: from `init`, if the masks do not fit the parameters; from `update`, if it is called without them.
    """

    def init(params: Params) -> optax.EmptyState:
        check_mask_tree(params, masks)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        if params is None:
            raise ValueError("hold_zeros needs the parameters: optimizer.update(gradients, state, params)")
        return jax.tree.map(_held, updates, params, masks), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _held(update: jax.Array, weight: jax.Array, mask: Any) -> jax.Array:
    # In the weight's own precision, or the sum would be zero only almost.
    return jnp.where(mask, update.astype(weight.dtype), -weight)

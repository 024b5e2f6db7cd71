"""`hold_zeros`: an optax transformation that keeps pruned weights at zero in your own training loop."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from sculpt.model import Params
from sculpt.pruning.masks import check_mask_tree, mask_params


class HoldZerosState(NamedTuple):
    """State of `hold_zeros` without `inner`."""

    skipped: jax.Array
    """int32 scalar: steps whose updates were not finite, in which no weight that stays was changed."""


def hold_zeros(
    masks: Any, inner: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Has `optax.apply_updates` leave every pruned weight at exactly zero, whatever momentum and weight decay ask for.

        optimizer = sculpt.hold_zeros(masks, optax.adamw(1e-3))
        optimizer = sculpt.hold_zeros(masks, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))

    For losses, data and loops that `sculpt.finetune` does not know. `inner` sees zeros in the place of pruned weights and of their
    gradients: pruned weights do not count in global norms, and a gradient that is NaN at a pruned weight (that of a norm at zero)
    stays out. Pruned weights that are not zero yet become zero with the first update.

    Args:
      masks: pytree of booleans like the parameters, False where a weight is pruned (`sculpt.make_masks`).
      inner: the whole optimizer, whose state is the state. None: this is the last link of an `optax.chain`. The links before it then
        see gradients of pruned weights. Steps in which one of them makes updates of other weights NaN or infinite change no such
        weight, and are counted (`HoldZerosState.skipped`); outside `jax.jit` they give a warning.

    Raises:
      ValueError: if `inner` is no optax optimizer; from `init`, if the masks do not fit the parameters; from `update`, if it is
        called without them.
    """
    if inner is not None and not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"inner must be an optax optimizer, such as optax.adamw(1e-3), got {type(inner).__name__}"
        )
    optimizer = _last_link() if inner is None else optax.with_extra_args_support(inner)

    def init(params: Params) -> Any:
        check_mask_tree(params, masks)
        return optimizer.init(mask_params(params, masks))

    def update(
        updates: optax.Updates, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError("hold_zeros needs the parameters: optimizer.update(gradients, state, params)")
        masked = mask_params(updates, masks), state, mask_params(params, masks)
        updates, state = optimizer.update(*masked, **extra)
        return jax.tree.map(_held, updates, params, masks), state

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _held(update: jax.Array, weight: jax.Array, mask: Any) -> jax.Array:
    # In the weight's own precision, or the sum would be zero only almost.
    return jnp.where(mask, update.astype(weight.dtype), -weight)


def _last_link() -> optax.GradientTransformationExtraArgs:
    """Steps of other links' updates, unless those are not finite."""

    def init(_: Params) -> HoldZerosState:
        return HoldZerosState(jnp.int32(0))

    def update(
        updates: optax.Updates, state: HoldZerosState, _: Params | None = None, **__: Any
    ) -> tuple[optax.Updates, HoldZerosState]:
        sound = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)]).all()
        if not isinstance(sound, Tracer) and not sound:
            warnings.warn(
                "hold_zeros got updates that are not finite and changed no weight that stays; where gradients are not finite at "
                "pruned weights only, pass the whole optimizer: sculpt.hold_zeros(masks, inner=optax.chain(...))",
                RuntimeWarning,
                stacklevel=2,
            )
        taken = jax.tree.map(lambda leaf: jnp.where(sound, leaf, jnp.zeros_like(leaf)), updates)
        return taken, HoldZerosState(state.skipped + (~sound).astype(jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]

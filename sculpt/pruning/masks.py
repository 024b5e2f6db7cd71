"""Masks from a policy by table look-up, under jit and vmap."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sculpt.arguments import checked
from sculpt.model import Model, Params
from sculpt.pruning.families.family import Choice
from sculpt.pruning.space import Space, make_choices


def check_policies(space: Space, policies: Any) -> jax.Array:
    """Returns policies as int32 `[..., sites]`.

    Raises:
      ValueError: for a wrong length or dtype, or (where the values are known) an option that does not exist.
    """
    if not isinstance(policies, jax.Array):
        policies = np.asarray(policies)
    shape, dtype = jnp.shape(policies), jax.dtypes.result_type(policies)
    if shape and shape[-1] != space.num_sites and jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"expected policies as integers [..., {space.num_sites}], one for each site of the space, got {shape[-1]} numbers "
            f"({dtype}{list(shape)}); space.describe(policy) or `sculpt info` lists the sites"
        )
    if not shape or shape[-1] != space.num_sites or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"expected policies as integers [..., {space.num_sites}], got {dtype}{list(shape)}")
    if not isinstance(policies, Tracer):
        values = np.asarray(policies)
        bad = np.argwhere((values < 0) | (values >= space.num_options))
        if len(bad):
            site = space.sites[int(bad[0][-1])]
            value = int(values[tuple(bad[0])])
            raise ValueError(
                f"site {site.name!r} has options 0..{len(site.options) - 1}, the policy asks for {value}"
            )
    return jnp.asarray(policies, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def masks_from_choices(space: Space, choices: Sequence[Choice], policy: jax.Array) -> list[jax.Array]:
    """Boolean masks, one per parameter leaf, of a policy `[sites]` on choices made before."""
    kept: dict[int, jax.Array] = {}
    entries: dict[int, jax.Array] = {}
    for site, choice in zip(space.sites, choices):
        if site.kernel is not None and choice.entries is not None:
            option = policy[site.index].astype(jnp.uint8)
            entries[site.kernel.leaf] = (choice.entries & (np.uint8(1) << option)) > 0
        for atom, table in zip(site.atoms, choice.keeps):
            kept[atom] = table[policy[site.index]]
    axes, masks = space.trace.axes, []
    for leaf in space.trace.leaves:
        mask = entries.get(leaf.index, jnp.ones((1,) * len(leaf.shape), bool))
        for dim, axis in enumerate(space.trace.leaf_term(leaf.index)):
            if any(atom in kept for atom in axes.atoms(axis)):
                shape = [1] * len(leaf.shape)
                shape[dim] = leaf.shape[dim]
                mask = mask & jnp.reshape(axes.keep(axis, kept, jnp), shape)
        masks.append(jnp.broadcast_to(mask, leaf.shape))
    return masks


@checked
def make_masks(space: Space, params: Params, policy: Any) -> Any:
    """The masks of a policy: a pytree like `params`, boolean, True where a weight stays.

    Which channels go is decided by `space.importance`, or without it, as for all other patterns, by retained energy on `params`. On
    parameters that already carry the zeros of the policy the same units are chosen again, unless all weights of a unit that stays
    have become zero as well.

    Args:
      space: the search space.
      params: pytree that the trace was made of.
      policy: integers `[sites]`.

    Raises:
      ValueError: if the policy or the parameters do not fit the space.
    """
    policy = check_policies(space, policy)
    if policy.ndim != 1:
        raise ValueError(
            f"make_masks takes one policy [{space.num_sites}], got {list(policy.shape)}; use jax.vmap"
        )
    masks = masks_from_choices(space, make_choices(space, params), policy)
    return jax.tree.unflatten(jax.tree.structure(params), masks)


@jax.jit
def mask_params(params: Params, masks: Any) -> Params:
    """`params` with exact zeros where `masks` is False."""
    return jax.tree.map(lambda w, m: jnp.where(m, w, jnp.zeros((), w.dtype)), params, masks)


def check_masks(model: Model, masks: Any) -> Any:
    """Returns the masks.

    Raises:
      ValueError: if they are not a pytree of booleans like `model.params`.
    """
    check_mask_tree(model.params, masks)
    return masks


def check_mask_tree(params: Params, masks: Any) -> None:
    """Raises ValueError unless the masks are a pytree of booleans like `params`."""
    if jax.tree.structure(masks) != jax.tree.structure(params):
        raise ValueError(
            f"masks must be a pytree like params ({len(jax.tree.leaves(params))} leaves), got one of "
            f"{len(jax.tree.leaves(masks))} leaves"
        )
    for weight, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks)):
        if jnp.shape(weight) != jnp.shape(mask) or jax.dtypes.result_type(mask) != jnp.bool_:
            raise ValueError(
                f"expected a boolean mask {jnp.shape(weight)}, got {jax.dtypes.result_type(mask)}{jnp.shape(mask)}"
            )


@checked
def apply_masks(model: Model, masks: Any) -> Model:
    """A model whose zeros are in place.

    Raises:
      ValueError: if the masks are not a pytree of booleans like `model.params`.
    """
    return model.replace(params=mask_params(model.params, check_masks(model, masks)))

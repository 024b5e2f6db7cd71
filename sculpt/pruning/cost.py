"""What a policy costs: multiply-accumulates and parameters, theoretical and realised."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from sculpt.arguments import checked
from sculpt.model import Model
from sculpt.pruning.masks import check_policies
from sculpt.pruning.resources import kept_fractions
from sculpt.pruning.space import Space
from sculpt.tracing import trace


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one policy (scalars) or of several (`[n]`); float32.

    A site's fraction holds for whatever the other sites leave. That is exact, but where single entries of a kernel are chosen in
    one space with channels: how many of them lie in the channels that stay depends on the weights.
    """

    used: jax.Array
    """What a budget limits, used / dense: MACs, but for another resource of the space."""
    macs: jax.Array
    """Theoretical multiply-accumulates per image: only weights that stay are counted."""
    macs_ratio: jax.Array
    """`macs` / dense."""
    macs_realised: jax.Array
    """Multiply-accumulates per image after compaction: zeros that no smaller array can express are counted. For `rect_grouped` at
    the most: which filters share a window depends on the weights. Likewise where a branch has lost all channels: what only fed it is
    counted still, such as the scores of an attention without values."""
    macs_realised_ratio: jax.Array
    """`macs_realised` / dense."""
    params: jax.Array
    """Number of weights that stay."""
    params_ratio: jax.Array
    """`params` / dense."""


jax.tree_util.register_dataclass(Cost, [f.name for f in dataclasses.fields(Cost)], [])


@functools.partial(jax.jit, static_argnums=0)
def resource_used(space: Space, policies: jax.Array) -> jax.Array:
    """What policies int32 `[..., sites]` use of the space's resource / dense, float32 `[...]` (jit- and vmap-able)."""
    return space.resource.used(space, policies)


@checked
def cost(space: Space, policies: Any) -> Cost:
    """Costs of policies `[..., sites]`; every field is `[...]`. Closed form: no network is run. jit- and vmap-able.

    Raises:
      ValueError: if the policies do not fit the space.
    """
    return _cost(space, check_policies(space, policies))


@functools.partial(jax.jit, static_argnums=0)
def _cost(space: Space, policies: jax.Array) -> Cost:
    kept = kept_fractions(space, policies)
    ratio, params_ratio = space.macs.evaluate(kept), space.params.evaluate(kept)
    realised_ratio = space.macs.realised(space.compacts).evaluate(kept)
    return Cost(
        used=space.resource.used(space, policies),
        macs=ratio * space.macs.total,
        macs_ratio=ratio,
        macs_realised=realised_ratio * space.macs.total,
        macs_realised_ratio=realised_ratio,
        params=params_ratio * space.params.total,
        params_ratio=params_ratio,
    )


@checked
def layer_macs(space: Space, policy: Any) -> np.ndarray:
    """Theoretical multiply-accumulates of each layer under one policy, float64 `[layers]`."""
    policy = np.asarray(check_policies(space, policy))
    kept = np.ones(len(space.atoms) + 1)
    kept[:-1] = space.fractions[np.arange(len(space.atoms)), policy[space.atom_site]]
    values = space.macs.share.astype(np.float64) * kept[space.macs.atoms].prod(axis=1) * space.macs.total
    layers = len(space.trace.layers)
    return np.bincount(space.macs.owner, values, minlength=layers)[:layers]


@checked
def count_cost(model: Model, example_input: Any) -> tuple[int, int]:
    """Exact multiply-accumulates per image and number of parameters of a model as it stands.

    Counted on the model's own program: what a compacted model really does. Nothing is run.
    """
    traced = trace(model, example_input)
    return traced.macs, traced.num_params

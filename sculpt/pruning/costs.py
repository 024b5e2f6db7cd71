"""The cost of a policy: multiply-accumulates and parameters, theoretical and realised."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from sculpt.arguments import checked
from sculpt.model import Model
from sculpt.pruning.masks import check_policies
from sculpt.pruning.resources import Polynomial, kept_fractions, kept_units
from sculpt.pruning.space import Space
from sculpt.tracing.tracer import trace

_BLOCK = 1024
"""Policies that are counted at a time, so that few intermediate numbers are in memory."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one policy (Python numbers) or of several (NumPy, int64 and float64 `[n]`). Counts are exact whole numbers; compiled code,
    which has no such integers, gets float32 arrays.

    A site's fraction holds for whatever the other sites leave. That is exact, but where single entries of a kernel are chosen in
    one space with channels: how many of them lie in the channels that stay depends on the weights.
    """

    used: Any
    """What a budget limits, used / dense: MACs, but for another resource of the space."""
    macs: Any
    """Theoretical multiply-accumulates per image: only weights that stay are counted."""
    macs_ratio: Any
    """`macs` / dense."""
    macs_realised: Any
    """Multiply-accumulates per image after compaction: zeros that no smaller array can express are counted. For `rect_grouped` at
    the most: which filters share a window depends on the weights. Likewise where a branch has lost all channels: what only fed it is
    counted still, such as the scores of an attention without values."""
    macs_realised_ratio: Any
    """`macs_realised` / dense."""
    params: Any
    """Number of weights that stay."""
    params_ratio: Any
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
    checked_policies = check_policies(space, policies)
    if isinstance(checked_policies, Tracer):
        return _cost(space, checked_policies)
    choices = np.asarray(checked_policies)
    flat = choices.reshape(-1, space.num_sites)
    blocks = [_counts(space, flat[i : i + _BLOCK]) for i in range(0, len(flat), _BLOCK)]
    counts = np.concatenate(blocks, axis=1) if blocks else np.zeros((3, 0), np.int64)
    columns = [np.asarray(space.resource.used(space, choices))]
    for values, total in zip(counts, (space.macs.total, space.macs.total, space.params.total)):
        columns += [values.reshape(choices.shape[:-1]), values.reshape(choices.shape[:-1]) / max(total, 1)]
    return Cost(*(column.item() if column.ndim == 0 else column for column in map(np.asarray, columns)))


def _counts(space: Space, policies: np.ndarray) -> np.ndarray:
    """int64 `[3, n]`: MACs, realised MACs and parameters of policies `[n, sites]`."""
    kept = kept_units(space, policies)
    return np.stack([polynomial.count(kept).sum(axis=1) for polynomial in _polynomials(space)])


def _polynomials(space: Space) -> tuple[Polynomial, Polynomial, Polynomial]:
    return space.macs, space.macs.realised(space.compacts), space.params


@functools.partial(jax.jit, static_argnums=0)
def _cost(space: Space, policies: jax.Array) -> Cost:
    """In float32."""
    kept = kept_fractions(space, policies)
    columns = [space.resource.used(space, policies)]
    for polynomial in _polynomials(space):
        ratio = polynomial.evaluate(kept)
        columns += [ratio * polynomial.total, ratio]
    return Cost(*columns)


@checked
def layer_macs(space: Space, policy: Any) -> np.ndarray:
    """Theoretical multiply-accumulates of each layer under one policy, int64 `[layers]`."""
    choices = np.asarray(check_policies(space, policy))
    layers = np.zeros(len(space.trace.layers) + len(space.trace.products), np.int64)
    np.add.at(layers, space.macs.owner, space.macs.count(kept_units(space, choices)))
    return layers[: len(space.trace.layers)]


@checked
def count_cost(model: Model, example_input: Any, batch_axis: int | None = 0) -> tuple[int, int]:
    """Exact multiply-accumulates per image and number of parameters of a model as it stands.

    Counted on the model's own program: what a compacted model really does. Nothing is run. `batch_axis` as for `sculpt.trace`.
    """
    traced = trace(model, example_input, batch_axis)
    return traced.macs, traced.num_params

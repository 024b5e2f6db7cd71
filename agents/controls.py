"""Rivals of the agent: how much of what it finds would another way have found, with as many evaluations?

All of them propose policies through the same projection onto the budget, and what they propose is scored by the same
environment. Uniform and magnitude are rules without chance: they propose one policy over and over, which costs one
evaluation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sculpt.agents.config import Method
from sculpt.model import Params
from sculpt.pruning import Space, magnitude_policy, project, uniform_policy
from sculpt.scoring.archive import Archive
from sculpt.scoring.reward import Objective, quality

POPULATION = 64
"""Aging evolution keeps the youngest so many policies."""
TOURNAMENT = 16
"""Of these, so many are drawn, and the best becomes a parent."""
_STEP = 4.0  # logits by which a child resists each step away from its parent, against Gumbel noise of scale 1


def fixed_policy(method: Method, space: Space, params: Params, budget: float) -> jax.Array:
    """int32 `[sites]`: what the rule proposes; the dense policy for methods that are not rules.

    Raises:
      ValueError: if the budget cannot be reached.
    """
    if method == "uniform":
        return jnp.asarray(uniform_policy(space, budget), jnp.int32)
    if method == "magnitude":
        return jnp.asarray(magnitude_policy(space, params, budget), jnp.int32)
    return jnp.zeros(space.num_sites, jnp.int32)


def propose(
    method: Method,
    space: Space,
    number: int,
    budget: jax.Array,
    rule: jax.Array,
    archive: Archive,
    objective: Objective,
    key: jax.Array,
) -> jax.Array:
    """Policies int32 `[number, sites]` to be scored next; jit-able.

    Args:
      method: which control, not "agent".
      space: sites and patterns.
      number: how many.
      budget: float32 scalar.
      rule: int32 `[sites]`, from `fixed_policy`.
      archive: what was scored so far, which evolution breeds from.
      objective: what evolution selects by.
      key: for the draws.
    """
    if method in ("uniform", "magnitude"):
        return jnp.broadcast_to(rule, (number, space.num_sites))
    logits = jnp.zeros((number, space.num_sites, space.max_options), jnp.float32)
    breed_key, project_key = jax.random.split(key)
    if method == "evolution":
        targets, weights = _breed(space, number, archive, objective, breed_key)
        steps = jnp.abs(jnp.arange(space.max_options)[None, None] - targets[:, :, None]).astype(jnp.float32)
        logits = jnp.where(archive.count > 0, -_STEP * weights[:, :, None] * steps, logits)
    keys = jax.random.split(project_key, number)
    return jax.vmap(lambda row, k: project(space, row, budget, k).policy)(logits, keys)


def _breed(
    space: Space, number: int, archive: Archive, objective: Objective, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Aging evolution (Real et al., arXiv 1802.01548): tournament among the youngest, then a mutation at random sites.

    Returns targets int32 `[number, sites]` and, float32 alike, how much the projection is to respect each of them.
    """
    drawn_key, where_key, what_key = jax.random.split(key, 3)
    oldest = jnp.maximum(archive.count - POPULATION, 0)
    drawn = jax.random.randint(drawn_key, (number, TOURNAMENT), oldest, jnp.maximum(archive.count, 1))
    worth = quality(archive.accuracy, archive.loss, objective)[drawn]
    winner = jnp.take_along_axis(drawn, jnp.argmax(worth, axis=1)[:, None], axis=1)[:, 0]
    parents = archive.policies[winner]
    mutated = jax.random.uniform(where_key, parents.shape) < 1.0 / space.num_sites
    options = jnp.asarray(space.num_options, jnp.int32)[None]
    fresh = jnp.floor(jax.random.uniform(what_key, parents.shape) * options.astype(jnp.float32)).astype(
        jnp.int32
    )
    targets = jnp.where(mutated, jnp.minimum(fresh, options - 1), parents)
    return targets, jnp.where(mutated, 2.0, 1.0).astype(jnp.float32)

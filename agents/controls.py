"""Search methods to compare the agent with: rules, random, greedy sensitivity, evolution.

All of them propose policies through the same projection onto the budget, and what they propose is scored by the same
environment. Uniform, magnitude and LAMP are rules without chance: they propose one policy over and over, which costs one
evaluation. Greedy first scores options of every site by themselves, beyond the budget, all of them if half of its evaluations are
enough, and then draws near the policy that these scores favour. A table of logits learned by PPO is in `table`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.agents import cma_es
from sculpt.agents.archive import Archive
from sculpt.agents.config import RULES, Method, SearchConfig
from sculpt.agents.sensitivity import options_each, sensitivity_logits, singles, singles_first
from sculpt.model import Params
from sculpt.pruning.budget import lamp_policy, magnitude_policy, project, uniform_policy
from sculpt.pruning.space import Space
from sculpt.scoring.rewards import Objective, quality

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
    if method == "lamp":
        return jnp.asarray(lamp_policy(space, params, budget), jnp.int32)
    return jnp.zeros(space.num_sites, jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposals:
    """Policies to be scored next."""

    policies: jax.Array
    """int32 `[n, sites]`."""
    drawn: Any
    """What `after` needs of how they were drawn; None but for "cma_es"."""
    state: Any
    """The control's state behind them."""


def start(config: SearchConfig, space: Space, prior: jax.Array, key: jax.Array) -> Any:
    """The state of a control before its first proposal; `{}` where the archive is all that it goes by.

    `prior` is float32 `[sites, options]`: the logits to start from.
    """
    return cma_es.start(config.batch, prior, space.valid, key) if config.method == "cma_es" else {}


def propose(
    config: SearchConfig,
    space: Space,
    budget: jax.Array,
    rule: jax.Array,
    prior: jax.Array,
    archive: Archive,
    state: Any,
    key: jax.Array,
) -> Proposals:
    """Proposes `config.batch` policies; jit-able.

    Args:
      config: which control, not one that learns by PPO.
      space: sites and patterns.
      budget: float32 scalar.
      rule: int32 `[sites]`, from `fixed_policy`.
      prior: float32 `[sites, options]`: the logits to start from.
      archive: what was scored so far.
      state: from `start`, or the proposals before.
      key: for the draws.
    """
    number, method = config.batch, config.method
    each = options_each(config, space)
    if method in RULES:
        return Proposals(jnp.broadcast_to(rule, (number, space.num_sites)), None, state)
    draw_key, project_key = jax.random.split(key)
    if method == "cma_es":
        drawn, logits, state = cma_es.ask(number, space.valid, state, draw_key)
        policies = jax.vmap(lambda row: project(space, row, budget).policy)(logits)
        return Proposals(policies, drawn, state)
    logits = jnp.broadcast_to(prior, (number, *prior.shape))
    if method == "evolution":
        targets, weights = _breed(space, number, archive, config.objective, draw_key)
        steps = jnp.abs(jnp.arange(space.max_options)[None, None] - targets[:, :, None]).astype(jnp.float32)
        logits = jnp.where(archive.count > 0, -_STEP * weights[:, :, None] * steps, logits)
    elif method == "greedy":
        # Between options that were scored it goes by how much they keep: nothing but scores and sizes.
        favoured = sensitivity_logits(space, jnp.asarray(space.kept), each, archive)
        logits = jnp.broadcast_to(favoured, logits.shape)
    keys = jax.random.split(project_key, number)
    policies = jax.vmap(lambda row, k: project(space, row, budget, k).policy)(logits, keys)
    if method == "greedy":
        policies = singles_first(singles(space, each), archive.total, policies)
    return Proposals(policies, None, state)


def after(config: SearchConfig, proposals: Proposals, worth: jax.Array, key: jax.Array) -> Any:
    """The control's state after the worth float32 `[n]` of its proposals is known."""
    if config.method != "cma_es":
        return proposals.state
    return cma_es.tell(proposals.drawn, worth, proposals.state, key)


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

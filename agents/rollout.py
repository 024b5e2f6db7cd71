"""Rollouts: observe, choose, project onto the budget, step."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents import distributions
from sculpt.agents.actor_critic import PolicyNetwork, SiteInputs, forward
from sculpt.agents.environment import EnvParams, EnvState, PruningEnv, StepInfo
from sculpt.agents.gatv2 import Graph
from sculpt.agents.sensitivity import singles_first
from sculpt.pruning.budget import project
from sculpt.pruning.space import Space

_T = TypeVar("_T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Episodes of `rounds` (R) steps in each of n environments."""

    graphs: Graph
    """Observations: nodes `[R * n, N, F]`, globals `[R * n, 1, K]`; with one round only one of each budget is kept, for the others
    are like it."""
    policies: jax.Array
    """int32 `[R, n, sites]`: the actions executed, that is, after projection."""
    prices: jax.Array
    """float32 `[R, n]`: the price of each projection."""
    log_probs: jax.Array
    """float32 `[R, n, sites]`: log-probability of each executed action at its own price, when it was drawn."""
    values: jax.Array
    """float32 `[R + 1, n]`: the critic's values, the last one of the state after the cut."""
    rewards: jax.Array
    """float32 `[R, n]`."""
    continues: jax.Array
    """float32 `[R, n]`: 0 where an episode terminated, else 1 (a cut is not an end)."""
    info: StepInfo
    """Measurements, `[R, n]` each."""


def act(
    space: Space, logits: jax.Array, budget: jax.Array, key: jax.Array, projection: bool
) -> tuple[jax.Array, jax.Array]:
    """Draws one policy per row of `logits` float32 `[n, sites, options]`, each within its own `budget` float32 `[n]`.

    Returns:
      Policies int32 `[n, sites]` and prices float32 `[n]`; without projection plain samples and prices 0.
    """
    number = logits.shape[0]
    if not projection:
        return distributions.sample(logits, key), jnp.zeros(number, jnp.float32)
    projected = jax.vmap(functools.partial(project, space))(logits, budget, jax.random.split(key, number))
    return projected.policy, projected.price


def play(
    agent: PolicyNetwork,
    agent_params: dict,
    env: PruningEnv,
    env_params: EnvParams,
    state: EnvState,
    sites: SiteInputs,
    key: jax.Array,
    projection: bool,
    alone: np.ndarray,
) -> tuple[EnvState, Rollout]:
    """One episode in every environment of `env`, from the dense network on; as long as any are left, policies are taken from the
    `singles` `alone` instead of drawn."""
    reset_key, key = jax.random.split(key)
    start, state = env.reset(reset_key, env_params, state)

    def turn(carry: tuple, key: jax.Array) -> tuple[tuple, tuple]:
        graphs, state = carry
        act_key, step_key = jax.random.split(key)
        # In a one-shot episode all environments of a budget are in the same state: one forward pass serves them.
        seen = select_state(graphs, slice(0, len(env_params.budget))) if env.rounds == 1 else graphs
        logits, values = in_turn(forward(agent, agent_params, seen, sites), env.num_envs)
        policies, prices = act(env.space, logits, env.budgets(env_params), act_key, projection)
        policies = singles_first(alone, state.archive.total, policies)
        log_probs = distributions.log_prob(distributions.at_price(logits, prices, sites.cost), policies)
        graphs, state, rewards, terminated, _, info = env.step(step_key, state, policies, env_params)
        continues = 1.0 - terminated.astype(jnp.float32)
        step = (policies, prices, log_probs, values, rewards, continues, info)
        return (graphs, state), (seen.nodes, seen.globals, step)

    (last, state), (nodes, shared, steps) = jax.lax.scan(
        turn, (start, state), jax.random.split(key, env.rounds)
    )
    policies, prices, log_probs, values, rewards, continues, info = steps
    _, final = forward(agent, agent_params, last, sites)
    return state, Rollout(
        graphs=start._replace(
            nodes=nodes.reshape(-1, *nodes.shape[2:]), globals=shared.reshape(-1, *shared.shape[2:])
        ),
        policies=policies,
        prices=prices,
        log_probs=log_probs,
        values=jnp.concatenate([values, final[None]]),
        rewards=rewards,
        continues=continues,
        info=info,
    )


def in_turn(states: _T, number: int) -> _T:
    """What was worked out for `[k, ...]` states, for `[number, ...]` samples that take these states in turn."""
    return jax.tree.map(lambda rows: jnp.tile(rows, (number // len(rows), *[1] * (rows.ndim - 1))), states)


def select_state(graphs: Graph, index: slice) -> Graph:
    """The states `index` of a batch of states."""
    return graphs._replace(nodes=graphs.nodes[index], globals=graphs.globals[index])

"""The reward of the search: quality, minus a dynamic weight times the excess over the budget.

    reward = quality - weight * max(0, used - budget)

There is no cliff and no free band: the reward falls in proportion to the violation, from the first bit of it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from sculpt.arguments import checked_fields, is_real

Objective = Literal["accuracy", "loss"]
_KINDS = ("budget", "lagrangian", "schedule")


@checked_fields
@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How accuracy and cost are weighed against each other.

    Raises:
      ValueError: on an unknown kind, a negative or infinite number, or numbers that `kind` would ignore.
    """

    kind: Literal["budget", "lagrangian", "schedule"] = "budget"
    """"budget": quality alone, under a budget that the projection keeps. "lagrangian": the weight is a multiplier that rises
    by dual ascent while policies exceed the budget on average, and falls while they stay below. "schedule": the weight
    grows linearly over the search."""
    weight: float = 1.0
    """The weight at the start, in quality per dense network's worth of the resource above the budget (not for "budget")."""
    rate: float = 4.0
    """"lagrangian": step size of the ascent, per update. "schedule": by how much the weight has grown at the end."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"RewardConfig.kind must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        for name in ("weight", "rate"):
            value = getattr(self, name)
            if not is_real(value) or value < 0.0:
                raise ValueError(f"RewardConfig.{name} must be a number >= 0, got {value!r}")
        if self.kind == "budget" and (self.weight, self.rate) != (1.0, 4.0):
            raise ValueError(
                "RewardConfig.weight and rate only matter to kind='lagrangian' and kind='schedule'; "
                f"kind='budget' got weight={self.weight}, rate={self.rate}: leave them out or choose another kind"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardState:
    """The part of the reward that adapts."""

    weight: jax.Array
    """float32 scalar: quality that a dense network's worth of the resource above the budget costs."""


def init_reward(config: RewardConfig) -> RewardState:
    """The state at the first update."""
    return RewardState(jnp.float32(0.0 if config.kind == "budget" else config.weight))


def violation(used: jax.Array, budget: jax.Array) -> jax.Array:
    """How far `used` (any shape) exceeds `budget` (scalar): 0 within it."""
    return jnp.maximum(used - budget, 0.0)


def reward(state: RewardState, quality: jax.Array, used: jax.Array, budget: jax.Array) -> jax.Array:
    """Rewards, of the shape of `quality` and `used`; `budget` is a scalar or one for each."""
    return quality - state.weight * violation(used, budget)


def update_reward(
    config: RewardConfig, state: RewardState, used: jax.Array, budget: jax.Array, progress: jax.Array
) -> RewardState:
    """The state for the next update.

    Args:
      config: which reward it is.
      state: the state that this update's policies were rewarded with.
      used: float32, any shape: the costs of this update's policies.
      budget: float32, a scalar or one for each.
      progress: float32 scalar in [0, 1]: the share of the search that is done.
    """
    if config.kind == "lagrangian":
        return RewardState(jnp.maximum(state.weight + config.rate * jnp.mean(used - budget), 0.0))
    if config.kind == "schedule":
        return RewardState(jnp.asarray(config.weight + config.rate * progress, jnp.float32))
    return state


def quality(accuracy: jax.Array, loss: jax.Array, objective: Objective) -> jax.Array:
    """What is to be high: the accuracy in [0, 1], or minus the cross-entropy in nats."""
    return accuracy if objective == "accuracy" else -loss

"""Pruning as a gymnax-style environment: `reset(key, params)` and `step(key, state, action, params)`.

An episode refines the pruning of one network: the observation is the network's graph with the current assignment of
patterns in it, an action is the next assignment of a whole policy, and the reward is that policy's own. One environment
object stands for a batch of `num_envs` episodes that share one archive of scores, so that no policy is evaluated twice.
With one round (the default) it is a one-shot bandit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.archive import Archive, empty_archive, score_with_archive
from sculpt.agents.observation import to_graph
from sculpt.pruning.costs import resource_used
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import Scores, score_policies
from sculpt.scoring.problem import Problem
from sculpt.scoring.rewards import (
    Objective,
    RewardConfig,
    RewardState,
    init_reward,
    quality,
    reward,
    update_reward,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnvParams:
    """The task: handed to the compiled functions as arguments (a closure would fold the images as constants)."""

    problem: Problem
    """Network, images and labels to score policies on, from `make_problem`."""
    budget: jax.Array
    """float32 `[budgets]`: shares of the space's resource not to be exceeded; the episodes of a batch take them in turn."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnvState:
    """What changes from step to step."""

    policy: jax.Array
    """int32 `[num_envs, sites]`: the current assignment of every episode."""
    round: jax.Array
    """int32 scalar: rounds done in this episode."""
    archive: Archive
    """Scores so far, shared by all episodes."""
    reward: RewardState
    """The adaptive part of the reward."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What a step measured, for every episode; all float32 `[num_envs]`."""

    accuracy: jax.Array
    """In [0, 1]."""
    loss: jax.Array
    """Cross-entropy in nats."""
    quality: jax.Array
    """Accuracy or -loss, by the objective: the reward without its cost term."""
    used: jax.Array
    """What of the space's resource (MACs, by default) is used / dense."""


Scorer = Callable[[Problem, jax.Array, jax.Array], Scores]
"""`(problem, policies int32 [n, sites], count int32) -> Scores [n]`, of which only the first `count` are asked for."""


Observation = Any
"""`jraph.GraphsTuple` of all episodes (jraph annotates its fields too widely to compute with them)."""


def state_axes() -> Observation:
    """Where episodes are stacked in an `Observation`: node features and globals along axis 0; edges are shared by all."""
    import jraph

    axes: dict[str, Any] = dict.fromkeys(jraph.GraphsTuple._fields) | {"nodes": 0, "globals": 0}
    return jraph.GraphsTuple(**axes)


@dataclasses.dataclass(frozen=True)
class PruningEnv:
    """A batch of refinement episodes over one space. Static: hash and compare by value; `space` by identity."""

    space: Space
    """Sites and patterns."""
    num_envs: int = 1
    """Episodes side by side."""
    rounds: int = 1
    """Steps of an episode."""
    objective: Objective = "accuracy"
    """What the reward's quality is."""
    reward: RewardConfig = RewardConfig()
    """How cost enters the reward."""
    scorer: Scorer = score_policies
    """What scores policies."""

    def init(self, capacity: int) -> EnvState:
        """The state before the first episode: an empty archive for `capacity` distinct policies, everything dense."""
        return EnvState(
            policy=self._dense(),
            round=jnp.int32(0),
            archive=empty_archive(capacity, self.space.num_sites),
            reward=init_reward(self.reward),
        )

    def reset(
        self, key: jax.Array, params: EnvParams, state: EnvState | None = None
    ) -> tuple[Observation, EnvState]:
        """Starts episodes with nothing pruned.

        Args:
          key: not used, every episode starts from the dense network; here for the sake of the interface.
          params: the task.
          state: an earlier state, whose archive and reward weight carry on; None: an empty archive with room for one
            episode.

        Returns:
          Observations, one graph per episode, stacked as `state_axes` says, and the state.
        """
        del key
        before = self.init(self.num_envs * self.rounds) if state is None else state
        fresh = dataclasses.replace(before, policy=self._dense(), round=jnp.int32(0))
        return self.observe(fresh, params), fresh

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[Observation, EnvState, jax.Array, jax.Array, jax.Array, StepInfo]:
        """Scores the assignments `action` int32 `[num_envs, sites]` and moves on to them.

        Returns:
          (observations, state, reward float32 `[num_envs]`, terminated bool `[num_envs]`, truncated bool `[num_envs]`,
          info). Refinement has no end of its own, so an episode never terminates: it is cut (truncated) after `rounds`
          steps, where a learner should bootstrap from the value of the last observation. `key` is not used: a score is
          deterministic.
        """
        del key
        used = resource_used(self.space, action)
        archive, scores = score_with_archive(
            state.archive, action, used, functools.partial(self.scorer, params.problem)
        )
        worth = quality(scores.accuracy, scores.loss, self.objective)
        rewards = reward(state.reward, worth, used, self.budgets(params))
        after = EnvState(policy=action, round=state.round + 1, archive=archive, reward=state.reward)
        terminated = jnp.zeros(action.shape[0], bool)
        truncated = jnp.broadcast_to(after.round >= self.rounds, terminated.shape)
        info = StepInfo(scores.accuracy, scores.loss, worth, used)
        return self.observe(after, params), after, rewards, terminated, truncated, info

    def adapt(self, state: EnvState, used: jax.Array, params: EnvParams, progress: jax.Array) -> EnvState:
        """The state with its reward adapted to the costs `used` `[..., num_envs]` of the policies scored since the last time."""
        budgets = jnp.broadcast_to(self.budgets(params), used.shape)
        adapted = update_reward(self.reward, state.reward, used, budgets, progress)
        return dataclasses.replace(state, reward=adapted)

    def observe(self, state: EnvState, params: EnvParams) -> Observation:
        """Graphs of the current assignments, batched as `state_axes` says."""

        def one(policy: jax.Array, budget: jax.Array) -> Observation:
            return to_graph(self.space, params.problem.params, policy, budget, choices=params.problem.choices)

        return jax.vmap(one, out_axes=state_axes())(state.policy, self.budgets(params))

    def budgets(self, params: EnvParams) -> jax.Array:
        """float32 `[num_envs]`: the budget of every episode."""
        return params.budget[np.arange(self.num_envs) % len(params.budget)]

    def _dense(self) -> jax.Array:
        return jnp.zeros((self.num_envs, self.space.num_sites), jnp.int32)

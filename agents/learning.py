"""One search update as one compiled function: propose policies, score them, learn from the scores."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents import controls, ppo
from sculpt.agents.actor_critic import ActorCritic, SiteInputs
from sculpt.agents.archive import Archive
from sculpt.agents.config import LEARNERS, SearchConfig
from sculpt.agents.credit import init_credit
from sculpt.agents.environment import EnvParams, EnvState, PruningEnv, StepInfo
from sculpt.agents.rollout import play
from sculpt.agents.sensitivity import options_each, sensitivity_logits, singles
from sculpt.agents.table import TablePolicy
from sculpt.agents.transfer import check_fits, transplant
from sculpt.model import Params
from sculpt.scoring.rewards import Objective, RewardState, quality, reward, violation
from sculpt.training.config import FinetuneConfig

METRICS = (
    "evaluations", "unique", "best", "mean_reward", "reward_spread", "mean_accuracy", "budget_error", "reward_weight",
    "single_sites",
)  # fmt: skip
"""What every method measures, once an update."""
AGENT_METRICS = (
    "entropy", "kl", "epochs", "clip_fraction", "value_loss", "explained_variance", "credit_explained",
)  # fmt: skip
"""What the agent measures besides."""
Metrics = dict[str, float]
"""The measurements of one update, by name."""
TOLERANCE = 1e-5
"""A policy counts as within the budget up to this, in units of the dense network's resource (float32 rounding)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchTask:
    """The arrays of a search that do not change."""

    env: EnvParams
    """Network, images and budget."""
    sites: SiteInputs
    """What the agent knows of the sites."""
    rule: jax.Array
    """int32 `[sites]`: the policy that a fixed rule proposes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
    """Everything that changes; what a checkpoint holds."""

    update: jax.Array
    """int32 scalar: updates done."""
    env: EnvState
    """Archive and adaptive reward."""
    agent: Any
    """Parameters of the actor-critic, or of the table; `{}` for a control."""
    optimizer: Any
    """State of the agent's optimizer; `{}` for a control."""
    credit: Any
    """`CreditState` of the per-site regression; `{}` for a control."""
    control: Any
    """State of a control that has one; `{}` for others."""
    metrics: dict[str, jax.Array]
    """float32 `[updates]` each: measurements of every update so far."""


@dataclasses.dataclass(frozen=True)
class SearchProgram:
    """The static half of a search. Hash and compare by value, so that equal searches share compiled code."""

    env: PruningEnv
    """The environment."""
    config: SearchConfig
    """The settings, less those that only matter outside the update (they are set to fixed values)."""


def make_program(env: PruningEnv, config: SearchConfig) -> SearchProgram:
    """The program of a search with this environment; budget and sizes of arrays are not part of it."""
    outside = {
        "budget": 1.0,
        "front": (),
        "batch_size": config.batch,  # which the number of budgets decides
        "rerank": 0,
        "rerank_finetune": FinetuneConfig(),
        "checkpoint_every": 1,
    }
    return SearchProgram(
        env, dataclasses.replace(config, score_images=1, calibration_images=0, repair=None, **outside)
    )


def init_state(
    program: SearchProgram, task: SearchTask, key: jax.Array, learnt: Params | None = None
) -> SearchState:
    """The state before the first update; `key` initialises the agent, but for what was `learnt` elsewhere.

    Raises:
      ValueError: if that is of an agent of another size.
    """
    config, space = program.config, program.env.space
    env_state = program.env.init(config.updates * config.policies_per_update)
    agent, optimizer, credit, control = {}, {}, {}, {}
    if config.method in LEARNERS:
        agent = _init_agent(program, task, env_state, key)
        if learnt is not None:
            check_fits(learnt, agent)
            agent = transplant(learnt, agent)
        optimizer = ppo.make_optimizer(config).init(agent)
        credit = init_credit(space.num_sites, space.max_options)
    else:
        control = controls.start(config, space, task.sites.prior, key)
    names = METRICS + (AGENT_METRICS if config.method in LEARNERS else ())
    metrics = {name: jnp.zeros(config.updates, jnp.float32) for name in names}
    return SearchState(jnp.int32(0), env_state, agent, optimizer, credit, control, metrics)


def network_of(config: SearchConfig) -> ActorCritic | TablePolicy:
    """What learns: the graph network, or the table."""
    return ActorCritic(config.agent) if config.method == "agent" else TablePolicy()


@functools.partial(jax.jit, static_argnums=0)
def _init_agent(program: SearchProgram, task: SearchTask, env_state: EnvState, key: jax.Array) -> Any:
    graphs = program.env.observe(env_state, task.env)
    one = graphs._replace(nodes=graphs.nodes[0], globals=graphs.globals[0])
    return network_of(program.config).init(key, one, task.sites)["params"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def update(program: SearchProgram, task: SearchTask, state: SearchState, key: jax.Array) -> SearchState:
    """One update: propose a batch, score its new policies, learn. `key` belongs to the search and is folded with the update.

    Donates `state`. Call `snapshot(state)` first if you need it afterwards.
    """
    after, measured = _update(program, task, state, key)
    row = state.update
    metrics = {
        name: rows.at[row].set(measured[name].astype(rows.dtype)) for name, rows in state.metrics.items()
    }
    return dataclasses.replace(after, metrics=metrics)


@jax.jit
def snapshot(state: SearchState) -> SearchState:
    """A copy of `state` that later updates leave alone."""
    return jax.tree.map(jnp.copy, state)


def _update(
    program: SearchProgram, task: SearchTask, state: SearchState, key: jax.Array
) -> tuple[SearchState, dict[str, jax.Array]]:
    config, env = program.config, program.env
    key = jax.random.fold_in(key, state.update)
    turn = _learning_turn if config.method in LEARNERS else _control_turn
    env_state, learnt, rewards, info, measured = turn(program, task, state, key)
    done, policies = state.update + 1, config.policies_per_update
    single_sites = len(_alone(program)) - state.env.archive.total
    progress = done.astype(jnp.float32) / config.updates
    measured |= {
        "evaluations": env_state.archive.total.astype(jnp.float32),
        "unique": env_state.archive.count.astype(jnp.float32),
        "best": best_quality(env_state.archive, task.env.budget[0], config.objective),
        "mean_reward": jnp.mean(rewards),
        "reward_spread": jnp.std(rewards),
        "mean_accuracy": jnp.mean(info.accuracy),
        "budget_error": jnp.max(
            jnp.abs(info.used - jnp.broadcast_to(env.budgets(task.env), info.used.shape))
        ),
        "reward_weight": env_state.reward.weight,
        "single_sites": jnp.clip(single_sites, 0, policies).astype(jnp.float32),
    }
    env_state = env.adapt(env_state, info.used, task.env, progress)
    return dataclasses.replace(state, update=done, env=env_state, **learnt), measured


_Turn = tuple[EnvState, dict[str, Any], jax.Array, StepInfo, dict[str, jax.Array]]
"""State of the environment, changed fields of the search's state, rewards, measurements of the policies and of learning."""


def _learning_turn(program: SearchProgram, task: SearchTask, state: SearchState, key: jax.Array) -> _Turn:
    config, env = program.config, program.env
    agent = network_of(config)
    each, alone = options_each(config, env.space), _alone(program)
    left = len(alone) - state.env.archive.total
    sites = task.sites
    if each:
        archive = state.env.archive
        told = sensitivity_logits(env.space, sites.retained, each, archive)
        sites = dataclasses.replace(sites, prior=sites.prior + jnp.where(left > 0, 0.0, told))
    env_state, rollout = play(
        agent, state.agent, env, task.env, state.env, sites, key, config.projection, alone
    )
    batch, credit, credited = ppo.prepare(
        config, rollout, state.credit, env.space.max_options, len(task.env.budget)
    )
    entropy = ppo.entropy_weight(config, state.update)
    params, optimizer, measured = ppo.learn(
        state.agent, state.optimizer, agent, batch, sites, config, entropy
    )
    critic = rollout.values[:-1].reshape(-1)
    measured |= {
        "explained_variance": ppo.explained_variance(batch.returns, critic),
        "credit_explained": credited,
    }
    learnt = {"agent": params, "optimizer": optimizer, "credit": credit}
    if each:  # from policies that were not drawn nothing can be learned
        before = {name: getattr(state, name) for name in learnt}
        learnt = jax.tree.map(lambda new, old: jnp.where(left > 0, old, new), learnt, before)
    return env_state, learnt, rollout.rewards, rollout.info, measured


def _alone(program: SearchProgram) -> np.ndarray:
    """int32 `[m, sites]`: the policies of single sites that this search scores before any other."""
    return singles(program.env.space, options_each(program.config, program.env.space))


def _control_turn(program: SearchProgram, task: SearchTask, state: SearchState, key: jax.Array) -> _Turn:
    config, env = program.config, program.env
    propose_key, step_key, learn_key = jax.random.split(key, 3)
    proposals = controls.propose(
        config,
        env.space,
        task.env.budget[0],
        task.rule,
        task.sites.prior,
        state.env.archive,
        state.control,
        propose_key,
    )
    _, env_state = env.reset(step_key, task.env, state.env)
    _, env_state, rewards, _, _, info = env.step(step_key, env_state, proposals.policies, task.env)
    return env_state, {"control": controls.after(config, proposals, rewards, learn_key)}, rewards, info, {}


def metrics_of(metrics: dict[str, Any], index: int) -> Metrics:
    """The measurements of one update; without "best" as long as no policy has met the budget."""
    row = {name: float(rows[index]) for name, rows in metrics.items()}
    if not np.isfinite(row["best"]):
        del row["best"]
    return {"update": float(index + 1), **row}


def best_quality(archive: Archive, budget: jax.Array, objective: Objective) -> jax.Array:
    """Best quality within the budget so far, float32 scalar; -inf while no policy has met it."""
    met = (jnp.arange(archive.accuracy.size, dtype=jnp.int32) < archive.count) & (
        archive.used <= budget + TOLERANCE
    )
    return jnp.max(jnp.where(met, quality(archive.accuracy, archive.loss, objective), -jnp.inf))


def ranking(
    archive: Archive, state: RewardState, budget: float, objective: Objective
) -> tuple[np.ndarray, np.ndarray]:
    """Archived policies from best to worst; the archive's arrays are the host's.

    Those within the budget come first; then the higher reward; then, since accuracies on few images tie, the lower loss.

    Returns:
      Rows of the archive int64 `[count]` in that order, and the reward float32 `[count]` of each.
    """
    count = int(archive.count)
    used, loss = archive.used[:count], archive.loss[:count]
    worth = quality(archive.accuracy[:count], loss, objective)
    rewards = np.asarray(reward(state, jnp.asarray(worth), jnp.asarray(used), jnp.float32(budget)))
    excess = np.asarray(violation(jnp.asarray(used), jnp.float32(budget + TOLERANCE)))
    met = excess <= 0
    # Outside the budget the least violation comes first: it is what is left if nothing has met the budget.
    order = np.lexsort((loss, -rewards, np.where(met, 0.0, excess)))
    return order, rewards[order]

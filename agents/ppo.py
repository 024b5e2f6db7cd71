"""Proximal policy optimisation (Schulman et al., arXiv 1707.06347) over the sites of one network.

Probability ratios are clipped site by site: the ratio of a whole policy is a product over sites, and clipping it would
tighten the step as networks grow. The losses come from rlax.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import optax

from sculpt.agents import distributions
from sculpt.agents.actor_critic import PolicyNetwork, SiteInputs, forward
from sculpt.agents.config import SearchConfig
from sculpt.agents.credit import (
    CreditState,
    contributions,
    leave_one_out,
    site_advantages,
    update_credit,
)
from sculpt.agents.rollout import Rollout, in_turn

_MAX_GRADIENT_NORM = 1.0


@functools.cache
def load_rlax() -> types.ModuleType:
    """Imports rlax, which takes seconds and touches one deprecated name of JAX on the way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"jax\.core\.\w+ is deprecated", DeprecationWarning)
        import rlax
    return rlax


def make_optimizer(config: SearchConfig) -> optax.GradientTransformation:
    """Adam behind a clipped gradient norm; those of the critic and of the sites' own logits are clipped apart, so that they
    crowd nothing out."""

    def part(path: tuple, _: jax.Array) -> str:
        return path[0].key if path[0].key in ("critic", "own") else "actor"

    adam = optax.chain(optax.clip_by_global_norm(_MAX_GRADIENT_NORM), optax.adam(config.learning_rate))
    joined = optax.flatten(adam)  # one vector instead of forty leaves compiles and runs faster

    return optax.multi_transform(
        {"actor": joined, "critic": joined, "own": adam},
        lambda params: jax.tree_util.tree_map_with_path(part, params),
    )


def generalised_advantages(
    rewards: jax.Array, values: jax.Array, continues: jax.Array, discount: float, gae_lambda: float
) -> jax.Array:
    """GAE (Schulman et al., arXiv 1506.02438) through rlax: float32 `[R, n]`.

    Args:
      rewards: float32 `[R, n]`.
      values: float32 `[R + 1, n]`; the last row bootstraps at the cut.
      continues: float32 `[R, n]`, 0 at a true end of an episode.
      discount: per step.
      gae_lambda: trades bias (0) against variance (1).
    """
    chex.assert_rank([rewards, values, continues], 2)
    chex.assert_equal_shape([rewards, values[1:], continues])
    estimate = load_rlax().truncated_generalized_advantage_estimation
    return jax.vmap(lambda r, c, v: estimate(r, c * discount, gae_lambda, v), in_axes=1, out_axes=1)(
        rewards, continues, values
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """What PPO learns from: m = R * n samples."""

    rollout: Rollout
    advantages: jax.Array
    """float32 `[m, sites]`."""
    returns: jax.Array
    """float32 `[m]`: the critic's targets."""


def prepare(
    config: SearchConfig, rollout: Rollout, credit: CreditState, options: int, budgets: int = 1
) -> tuple[Experience, CreditState, jax.Array]:
    """Turns a rollout, whose environments take so many budgets in turn, into advantages and returns.

    Returns:
      The batch, the credit regression with this rollout in it, and the share of the reward's variance that the
      regression explains (float32 scalar).
    """
    number = rollout.rewards.size
    policies = rollout.policies.reshape(number, -1)
    rewards = rollout.rewards.reshape(number)
    credit = update_credit(credit, policies, rewards, options)
    explained = contributions(credit, policies, options)
    if config.discount > 0.0:
        advantage = generalised_advantages(
            rollout.rewards, rollout.values, rollout.continues, config.discount, config.gae_lambda
        )
        returns = advantage + rollout.values[:-1]
    else:  # each round stands for itself, measured against the other episodes of that budget in the same round
        rows = rollout.rewards.reshape(len(rollout.rewards), -1, budgets)
        advantage, returns = leave_one_out(rows, axis=1).reshape(rollout.rewards.shape), rollout.rewards
    advantages = site_advantages(advantage.reshape(number), explained, budgets)
    batch = Experience(rollout, advantages, jax.lax.stop_gradient(returns.reshape(number)))
    return batch, credit, explained_variance(rewards, jnp.sum(explained, axis=1))


def explained_variance(targets: jax.Array, predictions: jax.Array) -> jax.Array:
    """1 - var(targets - predictions) / var(targets), of two float32 `[m]`; 0 where the targets do not vary."""
    chex.assert_rank([targets, predictions], 1)
    spread = jnp.var(targets)
    return jnp.where(spread > 1e-12, 1.0 - jnp.var(targets - predictions) / jnp.maximum(spread, 1e-12), 0.0)


def ppo_loss(
    params: dict,
    agent: PolicyNetwork,
    batch: Experience,
    sites: SiteInputs,
    config: SearchConfig,
    entropy: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss to be minimised and its measurements.

    Args:
      params: the agent's.
      agent: the network.
      batch: samples.
      sites: what the agent knows of the sites.
      config: the clip ratio.
      entropy: float32 scalar, weight of the entropy.
    """
    rollout = batch.rollout
    number = batch.returns.shape[0]
    logits, values = in_turn(forward(agent, params, rollout.graphs, sites), number)
    logits = distributions.at_price(logits, rollout.prices.reshape(number), sites.cost)
    log_probs = distributions.log_prob(logits, rollout.policies.reshape(number, -1))
    shift = log_probs - rollout.log_probs.reshape(number, -1)
    ratios = jnp.exp(shift)
    surrogate = load_rlax().clipped_surrogate_pg_loss(
        ratios.reshape(-1), batch.advantages.reshape(-1), config.clip_ratio
    )
    mean_entropy = jnp.mean(distributions.entropy(logits))
    value_loss = 0.5 * jnp.mean((values - batch.returns) ** 2)
    measured = {
        "entropy": mean_entropy,
        "kl": jnp.mean(ratios - 1.0 - shift),  # Schulman's estimator: never negative
        "clip_fraction": jnp.mean((jnp.abs(ratios - 1.0) > config.clip_ratio).astype(jnp.float32)),
        "value_loss": value_loss,
    }
    return surrogate - entropy * mean_entropy + value_loss, measured


def entropy_weight(config: SearchConfig, done: jax.Array) -> jax.Array:
    """float32 scalar: weight of the entropy in the update after `done` ones, an int32 scalar."""
    final = config.entropy if config.final_entropy is None else config.final_entropy
    progress = done.astype(jnp.float32) / max(config.updates - 1, 1)
    return config.entropy + (final - config.entropy) * progress


def learn(
    params: dict,
    optimizer_state: optax.OptState,
    agent: PolicyNetwork,
    batch: Experience,
    sites: SiteInputs,
    config: SearchConfig,
    entropy: jax.Array,
) -> tuple[dict, optax.OptState, dict[str, jax.Array]]:
    """Full-batch steps of PPO, `config.epochs` or until the KL divergence exceeds its limit.

    Returns new parameters, optimizer state and the measurements before the last step, and how many "epochs" there were.
    """
    optimizer = make_optimizer(config)

    def epoch(carry: tuple, _: None) -> tuple[tuple, dict[str, jax.Array]]:
        going, before = carry
        gradients, measured = jax.grad(ppo_loss, has_aux=True)(
            before[0], agent, batch, sites, config, entropy
        )
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes Python floats with an integer count
            updates, optimizer_state = optimizer.update(gradients, before[1], before[0])
        after = optax.apply_updates(before[0], updates), optimizer_state
        if config.kl_limit is not None:
            going &= measured["kl"] <= config.kl_limit
            after = jax.tree.map(lambda new, old: jnp.where(going, new, old), after, before)
        return (going, after), measured | {"epochs": going.astype(jnp.float32)}

    (_, learnt), measured = jax.lax.scan(
        epoch, (jnp.bool_(True), (params, optimizer_state)), length=config.epochs
    )
    epochs = jnp.sum(measured.pop("epochs"))
    return *learnt, jax.tree.map(lambda rows: rows[-1], measured) | {"epochs": epochs}

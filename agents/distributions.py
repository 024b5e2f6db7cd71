"""One categorical distribution per site, over the options that the site really has.

The action that is scored is the projected one: the budget shifts the logits by `price * cost`, the same price for all
sites. So the probability of an executed action is taken under softmax(logits - price * cost), with the sample's own
price held constant.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from sculpt.pruning.budget import INVALID


def mask_invalid(logits: jax.Array, valid: jax.Array) -> jax.Array:
    """`logits` `[sites, options]` with `INVALID` wherever `valid` `[sites, options]` is False."""
    return jnp.where(valid, logits, INVALID)


def at_price(logits: jax.Array, price: jax.Array, cost: jax.Array) -> jax.Array:
    """The logits that a budget leaves: `logits - price * cost`.

    Args:
      logits: float32 `[n, sites, options]`.
      price: float32 `[n]`, one per sample.
      cost: float32 `[sites, options]`, what each option costs.
    """
    chex.assert_rank([logits, price, cost], [3, 1, 2])
    return logits - jax.lax.stop_gradient(price)[:, None, None] * cost[None]


def log_prob(logits: jax.Array, actions: jax.Array) -> jax.Array:
    """Log-probability float32 `[n, sites]` of `actions` int32 `[n, sites]` under softmax of `logits` `[n, sites, options]`."""
    chex.assert_rank([logits, actions], [3, 2])
    chosen = jax.nn.one_hot(actions, logits.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits), 0.0), axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats, float32 `[n, sites]`, of softmax of `logits` `[n, sites, options]`."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)


def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draws int32 `[n, sites]` from softmax of `logits` `[n, sites, options]`."""
    return jax.random.categorical(key, logits).astype(jnp.int32)

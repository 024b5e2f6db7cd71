"""Per-site credit assignment: turns one score per policy into an advantage per site.

Two baselines. A sample is measured against the mean of the others in its batch
(leave-one-out; Kool, van Hoof, Welling, "Buy 4 REINFORCE samples, get a baseline for free", 2019), which does not bias the gradient. And a
site's advantage may leave out whatever the other sites explain (an action-dependent factorised baseline; Wu et al., arXiv
1803.07246); that part is estimated by ridge regression of the scores on the choices, over batches whose weight decays. The
second would be unbiased if sites chose independently and the regression knew past batches only. Here the projection ties
sites, and the batch at hand takes part in its own regression: that shortens the gradient by a few percent (measured on a toy
problem: 0.95 to 0.97 of its length, direction cosine 0.9998) and learns from the very first batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

DECAY = 0.97
"""Weight of the past batches, per batch."""
RIDGE = 3.0
"""Ridge penalty, in samples: an option seen that often has half of its effect believed."""


def leave_one_out(scores: jax.Array, axis: int = 0) -> jax.Array:
    """Each of the scores float32 `[..., n, ...]` less the mean of the other n - 1 along the axis."""
    number = scores.shape[axis]
    return (scores - jnp.mean(scores, axis=axis, keepdims=True)) * (number / max(number - 1, 1))


def standardise(values: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over all of `values` (any shape); zeros where all are equal."""
    centred = values - jnp.mean(values)
    return centred / (jnp.sqrt(jnp.mean(centred**2)) + 1e-6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CreditState:
    """Decayed sums of the regression; d = sites * options."""

    weight: jax.Array
    """float32 scalar: (decayed) number of samples."""
    choices: jax.Array
    """float32 `[d]`: sum of the one-hot choices x."""
    gram: jax.Array
    """float32 `[d, d]`: sum of x x^T."""
    score: jax.Array
    """float32 scalar: sum of the scores y."""
    moment: jax.Array
    """float32 `[d]`: sum of x y."""


def init_credit(sites: int, options: int) -> CreditState:
    """The state before any batch."""
    size = sites * options
    zero, row = jnp.float32(0.0), jnp.zeros(size, jnp.float32)
    return CreditState(zero, row, jnp.zeros((size, size), jnp.float32), zero, row)


def _one_hot(policies: jax.Array, options: int) -> jax.Array:
    return jax.nn.one_hot(policies, options, dtype=jnp.float32).reshape(policies.shape[0], -1)


def update_credit(
    state: CreditState, policies: jax.Array, scores: jax.Array, options: int, decay: float = DECAY
) -> CreditState:
    """Adds a batch of policies int32 `[n, sites]` with scores float32 `[n]`; what was there before decays."""
    x = _one_hot(policies, options)
    return CreditState(
        weight=decay * state.weight + policies.shape[0],
        choices=decay * state.choices + jnp.sum(x, axis=0),
        gram=decay * state.gram + x.T @ x,
        score=decay * state.score + jnp.sum(scores),
        moment=decay * state.moment + x.T @ scores,
    )


def contributions(state: CreditState, policies: jax.Array, options: int, ridge: float = RIDGE) -> jax.Array:
    """What each choice of policies int32 `[n, sites]` adds to the score, by the regression: float32 `[n, sites]`."""
    number, sites = policies.shape
    weight = jnp.maximum(state.weight, 1.0)
    mean = state.choices / weight
    gram = state.gram - weight * mean[:, None] * mean[None, :] + ridge * jnp.eye(mean.size, dtype=jnp.float32)
    effect = jnp.linalg.solve(gram, state.moment - mean * state.score)
    centred = _one_hot(policies, options) - mean[None]
    return jnp.sum((centred * effect[None]).reshape(number, sites, options), axis=-1)


def site_advantages(advantage: jax.Array, contribution: jax.Array, budgets: int = 1) -> jax.Array:
    """Standardised advantage float32 `[n, sites]` of every site: `advantage` `[n]` less what the other sites explain.

    `contribution` is float32 `[n, sites]`, from `contributions`. Samples take the `budgets` in turn, and are compared with those of
    the same one.
    """
    others = jnp.sum(contribution, axis=1, keepdims=True) - contribution
    own = (advantage[:, None] - others).reshape(-1, budgets, others.shape[1])
    return standardise(leave_one_out(own)).reshape(others.shape)

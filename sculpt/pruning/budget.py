"""Projection onto the budget: every scored policy meets the budget by construction."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, is_real
from sculpt.model import Params
from sculpt.pruning.costs import resource_used
from sculpt.pruning.space import Space, make_choices, retained_shares

_BISECTIONS = 48
INVALID = -1e9
"""Logit of an option that a site does not have: finite, so that no gradient turns into NaN, and of probability 0."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """A policy within the budget, and the price that made it so."""

    policy: jax.Array
    """int32 `[sites]`."""
    price: jax.Array
    """float32 scalar: what the whole of the dense network's resource costs in logits."""


jax.tree_util.register_dataclass(Projection, ["policy", "price"], [])


@checked
def check_budget(space: Space, budget: float) -> None:
    """Raises ValueError unless some policy meets the budget (of the space's resource, used / dense)."""
    low, high = space.reachable
    number = budget.item() if isinstance(budget, np.ndarray | jax.Array) and budget.size == 1 else budget
    if not is_real(number) or not 0 < number <= 1:
        raise ValueError(
            f"budget is the share of {space.resource.name} that is kept, a number in (0, 1]; got {budget!r}"
        )
    if number < low:
        # Theoretical MACs alone count them as removed.
        in_place = "" if space.compacts.all() or low < 1 else " (zeros that stay in place are kept)"
        raise ValueError(
            f"budget {budget} cannot be reached: with families {', '.join(space.families)} this network can keep "
            f"{low:.4f} to {high:.4f} of its {space.resource.name}{in_place}; raise the budget or add a family"
        )


@functools.partial(jax.jit, static_argnums=0)
def project(space: Space, logits: jax.Array, budget: Any, key: jax.Array | None = None) -> Projection:
    """Turns preferences into a policy that meets the budget.

    Chooses `argmax(logits + gumbel - price * cost)` at every site, with one price for the whole network, found by
    bisection on the exact cost of the policy (a Lagrange multiplier; negative where the preferences leave slack). What
    slack the price cannot express is filled greedily, each time by the option that is liked most of those that keep more. Everything is
    jit- and vmap-able.

    Args:
      space: the search space.
      logits: float32 `[sites, max_options]`; entries of options that do not exist are ignored.
      budget: largest share of the space's resource, a number or a scalar array, within `space.reachable`.
      key: draws the Gumbel noise, so that without a binding budget the policy is a sample of `softmax(logits)`; None
        takes the most liked policy.
    """
    valid = jnp.asarray(space.valid)
    liked = logits
    if key is not None:
        liked = liked + jax.random.gumbel(key, logits.shape, logits.dtype)
    liked = jnp.where(valid, liked, INVALID)
    cost = jnp.asarray(space.option_cost)
    budget = jnp.asarray(budget, jnp.float32) + 1e-6

    def choose(price: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.where(valid, liked - price * cost, INVALID * 1e3), axis=1).astype(jnp.int32)

    # A price beyond this outweighs every preference at every site.
    spread = jnp.max(jnp.where(valid, liked, -jnp.inf)) - jnp.min(jnp.where(valid, liked, jnp.inf))
    limit = (spread + 1.0) / _smallest_step(space)

    # The policy that fits is carried along: choosing it again from its price could round a tie the other way.
    def halve(
        _: int, bounds: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, fitting = bounds
        middle = (low + high) / 2
        policy = choose(middle)
        fits = resource_used(space, policy) <= budget
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high), jnp.where(fits, policy, fitting)

    _, price, policy = jax.lax.fori_loop(0, _BISECTIONS, halve, (-limit, limit, choose(limit)))
    return Projection(fill(space, policy, liked, budget), price)


def _smallest_step(space: Space) -> float:
    steps = np.abs(np.diff(np.where(space.valid, space.option_cost, np.nan), axis=1))
    steps = steps[np.isfinite(steps) & (steps > 1e-7)]
    return float(steps.min()) if steps.size else 1.0


def fill(space: Space, policy: jax.Array, liked: jax.Array, budget: Any) -> jax.Array:
    """Spends the slack: takes the best-liked option that keeps more and still fits, until none does. It need not cost more: a latency may
    fall where a layer grows.

    Args:
      policy: int32 `[sites]`, within the budget.
      liked: float32 `[sites, max_options]`.
      budget: largest share of the space's resource.
    """
    sites, options = space.num_sites, space.max_options
    valid, kept = jnp.asarray(space.valid), jnp.asarray(space.kept)
    site_index = np.repeat(np.arange(sites, dtype=np.int32), options)
    option_index = np.tile(np.arange(options, dtype=np.int32), sites)

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        policy, _, count = state
        changed = jnp.tile(policy[None], (sites * options, 1))
        changed = changed.at[np.arange(sites * options), site_index].set(option_index)
        ratios = resource_used(space, changed).reshape(sites, options)
        rows = np.arange(sites, dtype=np.int32)
        fits = valid & (ratios <= budget) & (kept > kept[rows, policy][:, None])
        gain = jnp.where(fits, liked - liked[rows, policy][:, None], -jnp.inf).reshape(-1)
        best = jnp.argmax(gain)
        found = gain[best] > -jnp.inf
        return jnp.where(found, changed[best], policy), found, count + 1

    start = (policy, jnp.asarray(True), jnp.int32(0))
    filled, _, _ = jax.lax.while_loop(lambda s: s[1] & (s[2] < 4 * sites), step, start)
    return filled


@checked
def random_policies(space: Space, key: jax.Array, n: int, budget: float | None = None) -> jax.Array:
    """Draws policies int32 `[n, sites]`: every option alike, or with a budget its projection.

    Raises:
      ValueError: if n < 1 or the budget cannot be reached.
    """
    if not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"random_policies(space, key, n) needs a whole number n >= 1, got {n!r}")
    if budget is not None:
        check_budget(space, budget)
    logits = jnp.zeros((space.num_sites, space.max_options), jnp.float32)
    keys = jax.random.split(key, n)
    if budget is None:
        masked = jnp.where(jnp.asarray(space.valid), logits, INVALID)
        return jax.vmap(lambda k: jax.random.categorical(k, masked, axis=1).astype(jnp.int32))(keys)
    return _project_batch(space, logits, jnp.float32(budget), keys)


@functools.partial(jax.jit, static_argnums=0)
def _project_batch(space: Space, logits: jax.Array, budget: jax.Array, keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: project(space, logits, budget, key).policy)(keys)


@checked
def uniform_policy(space: Space, budget: float) -> jax.Array:
    """int32 `[sites]`: the same keep fraction everywhere, the largest that meets the budget, slack filled.

    Only the first family of the space is pruned where that is enough; the others stay dense.
    """
    check_budget(space, budget)
    return _uniform(space, jnp.float32(budget))


@functools.partial(jax.jit, static_argnums=0)
def _uniform(space: Space, budget: jax.Array) -> jax.Array:
    kept = jnp.where(jnp.asarray(space.valid), jnp.asarray(space.kept), jnp.inf)
    first = np.asarray([site.family == space.families[0] for site in space.sites])
    fractions = np.linspace(0.0, 1.0, 129, dtype=np.float32)
    everywhere = jnp.argmin(jnp.abs(kept[None] - fractions[:, None, None]), axis=2).astype(jnp.int32)
    policies = jnp.concatenate([jnp.where(first, everywhere, 0), everywhere])
    ratios = resource_used(space, policies)
    fits = ratios <= budget + 1e-6
    pruned_first_only = jnp.arange(len(policies)) < len(fractions)
    score = jnp.where(fits, ratios + pruned_first_only.astype(jnp.float32), -1.0)
    best = jnp.where(score.max() >= 0, policies[jnp.argmax(score)], jnp.asarray(space.num_options - 1))
    liked = jnp.where(jnp.asarray(first)[:, None], -kept, INVALID)
    return fill(space, best, liked, budget + 1e-6)


@checked
def magnitude_policy(space: Space, params: Params, budget: float) -> jax.Array:
    """int32 `[sites]`: the policy that keeps the most weight energy for what it costs, one global threshold for all sites.

    Maximises the sum over sites of log retained energy minus price times cost.
    """
    check_budget(space, budget)
    return project(space, energy_logits(space, params), budget).policy


@checked
def lamp_policy(space: Space, params: Params, budget: float) -> jax.Array:
    """int32 `[sites]`: one global threshold on LAMP scores (Lee et al., arXiv 2010.07611), slack filled.

    The score of what an option removes beyond the option before it is its energy, divided by the energy of all that is not
    weaker: `1 - retained / retained before`. A site is pruned as long as its scores are below the threshold, which is the
    lowest that meets the budget. Costs play no part in it. Windows are no nested options: theirs are taken in the order of the
    site, and none goes before the one before it.
    """
    check_budget(space, budget)
    return _lamp(space, energy_logits(space, params), jnp.float32(budget))


@functools.partial(jax.jit, static_argnums=0)
def _lamp(space: Space, logits: jax.Array, budget: jax.Array) -> jax.Array:
    retained = jnp.exp(logits / 3.0)
    valid = jnp.asarray(space.valid)
    scores = 1.0 - retained[:, 1:] / jnp.maximum(retained[:, :-1], 1e-6)
    # What comes later in a site cannot go before what comes earlier.
    highest = jax.lax.cummax(jnp.where(valid[:, 1:], scores, jnp.inf), axis=1)
    thresholds = jnp.sort(highest.reshape(-1))
    policies = (highest[None] <= thresholds[:, None, None]).sum(axis=2, dtype=jnp.int32)
    policies = jnp.minimum(policies, jnp.asarray(space.num_options - 1)[None])
    fits = resource_used(space, policies) <= budget + 1e-6
    policy = policies[jnp.argmax(fits)]
    liked = jnp.concatenate([jnp.zeros((len(highest), 1)), -highest], axis=1)
    return fill(space, policy, jnp.where(valid, liked, INVALID), budget + 1e-6)


def energy_logits(space: Space, params: Params) -> jax.Array:
    """float32 `[sites, max_options]`: 3 log(retained energy), a prior that favours what loses little."""
    retained = retained_shares(space, make_choices(space, params))
    return jnp.where(space.valid, 3.0 * jnp.log(jnp.maximum(retained, 1e-6)), INVALID)

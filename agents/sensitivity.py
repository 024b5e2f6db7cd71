"""Sensitivity: the change in loss when one site alone is pruned, measured before the search.

A policy's score is nearly a sum over its sites, and the scores of so few policies know more of the terms than the energy of the weights
does: an agent that begins with them finds more than one that begins with both, or with the energy alone. Greedy search goes by nothing
else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.archive import Archive
from sculpt.agents.config import LEARNERS, SearchConfig
from sculpt.pruning.space import Space

_TRUST = 8.0
"""Logits of an option whose effect on the loss is the mean of all; the draw adds Gumbel noise of scale 1."""
_AT_MOST = 0.5
"""Share of the evaluations, at the most, that are spent on single sites: by greedy search for as many options as there is room for, by
others for one option of each."""
_FARTHEST = 2.0
"""Beyond the last scored option the line through it and the one before is followed so many times their distance."""


def options_each(config: SearchConfig, space: Space) -> int:
    """How many options of every site a search scores by themselves; 0: it begins without that, or, greedy search, has too few
    evaluations."""
    greedy, learns = config.method == "greedy", config.method in LEARNERS and config.projection
    # In a single update all policies are drawn before any is scored.
    if config.updates < 2 or not (greedy or (learns and config.sensitivity > 0.0)):
        return 0
    evaluations = config.updates * config.policies_per_update
    for each in range(space.max_options - 1, 0, -1):
        share = _AT_MOST if greedy or each == 1 else min(config.sensitivity, _AT_MOST)
        if _count_singles(space, each) <= share * evaluations:
            return each
    return 0


def starts_from_energy(config: SearchConfig, space: Space) -> bool:
    """Whether the first proposals of a search favour options that retain energy."""
    if config.warm_start is not None:
        return config.warm_start
    return config.method == "cma_es" or (config.method in LEARNERS and options_each(config, space) == 0)


def _count_singles(space: Space, each: int) -> int:
    """How many policies `singles` has, `each` being above 0."""
    return 1 + int(np.minimum(each, space.num_options - 1).sum())


def singles(space: Space, each: int) -> np.ndarray:
    """int32 `[m, sites]`: the dense policy, then up to `each` options of every site with all other sites dense; none for 0."""
    if each == 0:
        return np.zeros((0, space.num_sites), np.int32)
    rows = [np.zeros(space.num_sites, np.int32)]
    for site, scored in enumerate(_scored(space, each)):
        for option in scored:
            rows.append(np.zeros(space.num_sites, np.int32))
            rows[-1][site] = option
    return np.stack(rows)


def singles_first(alone: np.ndarray, total: jax.Array, policies: jax.Array) -> jax.Array:
    """The next of the `singles`, `total` policies having been scored, as long as there are any; then `policies` int32 `[n, sites]`."""
    if len(alone) == 0:
        return policies
    turn = total + jnp.arange(len(policies), dtype=jnp.int32)
    return jnp.where(
        (turn < len(alone))[:, None], jnp.asarray(alone)[jnp.minimum(turn, len(alone) - 1)], policies
    )


def sensitivity_logits(space: Space, retained: jax.Array, each: int, archive: Archive) -> jax.Array:
    """Logits of every option by what it does to the loss by itself, in units of the mean size of all effects.

    The mean: few sites ruin a network by themselves, and would drown the others in a mean square. The loss, whatever the search maximises:
    a single site changes the class of few images, or of none. Options that were not scored by themselves lie on the line between those
    that were, by the energy that they lose.

    Args:
      space: sites and patterns.
      retained: float32 `[sites, options]`: share of the energy, or of the weights, that an option keeps.
      each: as for `singles`.
      archive: scores of all `singles`, and of whatever else.

    Returns:
      float32 `[sites, options]`.
    """
    found = _effects(space, archive)
    low, high = _neighbours(space, each)
    rows = np.arange(space.num_sites)[:, None]
    lost = 1.0 - retained
    way = (lost - lost[rows, low]) / jnp.maximum(lost[rows, high] - lost[rows, low], 1e-6)
    step = found[rows, high] - found[rows, low]
    effects = found[rows, low] + jnp.clip(way, 0.0, _FARTHEST) * step
    size = jnp.mean(jnp.abs(effects), where=jnp.asarray(space.valid))
    return _TRUST * effects / jnp.maximum(size, 1e-6)


def _effects(space: Space, archive: Archive) -> jax.Array:
    """float32 `[sites, options]`: loss of the dense network less that of policies that prune one site; 0 where there is none."""
    worth = -archive.loss
    used = jnp.arange(worth.size, dtype=jnp.int32) < archive.count
    pruned = (archive.policies > 0).sum(axis=1)
    dense = jnp.max(jnp.where(used & (pruned == 0), worth, -jnp.inf))
    site = jnp.argmax(archive.policies > 0, axis=1)
    option = jnp.take_along_axis(archive.policies, site[:, None], axis=1)[:, 0]
    # Rows that are no single option are sent out of range, hence dropped.
    row = jnp.where(used & (pruned == 1), site, space.num_sites)
    found = jnp.zeros((space.num_sites, space.max_options), jnp.float32)
    return found.at[row, option].set(worth - dense, mode="drop")


def _by_size(space: Space, site: int) -> np.ndarray:
    """The options of a site from the one that keeps all to the one that keeps least."""
    return np.argsort(-space.kept[site, : space.num_options[site]], kind="stable")


def _scored(space: Space, each: int) -> list[list[int]]:
    """Options of every site, without the dense one, at even distances in the order of what they keep."""
    chosen = []
    for site, count in enumerate(space.num_options):
        number = min(each, count - 1)
        places = [round(turn * count / (number + 1)) for turn in range(1, number + 1)]
        chosen.append([int(option) for option in _by_size(space, site)[places]])
    return chosen


def _neighbours(space: Space, each: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[sites, options]` twice: the scored options on both sides of an option, or the last two; itself where it is scored."""
    shape = (space.num_sites, space.max_options)
    low, high = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for site, scored in enumerate(_scored(space, each)):
        order = _by_size(space, site).tolist()
        known = sorted(order.index(option) for option in [0, *scored])
        for place, option in enumerate(order):
            if place in known:
                low[site, option] = high[site, option] = option
                continue
            above = min(int(np.searchsorted(known, place)), len(known) - 1)
            low[site, option], high[site, option] = order[known[above - 1]], order[known[above]]
    return low, high

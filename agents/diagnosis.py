"""Warns when a learned search did no better than random search."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from sculpt.agents.config import LEARNERS, SearchConfig


def best_by_luck(mean: float, spread: float, draws: int) -> float:
    """What the best of so many draws from a normal distribution is to be expected at.

    Blom, Statistical Estimates and Transformed Beta-Variables, 1958: the quantile at `(n - 3/8) / (n + 1/4)`.
    """
    if spread == 0.0:
        return mean
    return statistics.NormalDist(mean, spread).inv_cdf((draws - 0.375) / (draws + 0.25))


def doubt(config: SearchConfig, history: Sequence[Mapping[str, float]]) -> str | None:
    """A sentence for the user where a method that learns has learned nothing that luck would not have found; else None.

    Two things must be so. The best score is no better than that of as many policies drawn as in the first update, before anything
    was learned, by the mean and spread of these. And the mean of the last quarter of the updates is above that of the first by no
    more than two standard errors. Updates that score single sites do not count. Nothing is said of searches for several budgets, or
    whose reward holds the budget, since their rewards are no qualities.
    """
    history = [row for row in history if not row["single_sites"]]
    if config.method not in LEARNERS or config.front or not config.projection or len(history) < 4:
        return None
    first, last = history[0], history[-1]
    mean, spread = first["mean_reward"], first["reward_spread"]
    lucky = best_by_luck(mean, spread, int(last["evaluations"]))
    late = statistics.fmean(row["mean_reward"] for row in history[-(len(history) // 4) :])
    if last["best"] > lucky or late > mean + 2 * spread / config.batch**0.5:
        return None
    return (
        f"learning has found nothing that luck would not have: policies scored {late:.3f} on average in the last quarter of the search, "
        f"{mean:.3f} before anything was learned, and the best of them {last['best']:.3f}; more evaluations may help, unless the budget is too "
        "easy or too hard for policies to differ"
    )

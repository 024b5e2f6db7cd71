"""Has learning found more than luck would have? Told in plain words where it has not."""

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
    """A sentence for the user where a method that learns has found no more than its untrained self by luck; else None.

    The first update's policies are drawn before anything is learned: as many of them as were scored in the whole search would have
    had the best that their mean and spread let expect. Says nothing of searches for several budgets, or whose reward holds the
    budget, for whose rewards are no qualities.
    """
    if config.method not in LEARNERS or config.front or not config.projection or len(history) < 2:
        return None
    first, last = history[0], history[-1]
    lucky = best_by_luck(first["mean_reward"], first["reward_spread"], int(last["evaluations"]))
    if config.objective == "accuracy":
        lucky = min(lucky, 1.0)
    if last["best"] > lucky:
        return None
    return (
        f"learning has not beaten luck: the best score is {last['best']:.3f}, and {int(last['evaluations'])} policies drawn without "
        f"learning would be expected to reach {lucky:.3f} (by the mean and spread of the first {int(first['evaluations'])}); more "
        "evaluations may help, unless the budget is too easy or too hard for policies to differ"
    )

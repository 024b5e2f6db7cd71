"""The result of a search: the chosen policy, the front, and the history."""

from __future__ import annotations

import dataclasses

import numpy as np

from sculpt.agents.archive import Archive
from sculpt.agents.config import SearchConfig
from sculpt.agents.diagnosis import doubt
from sculpt.agents.learning import TOLERANCE, Metrics, SearchState, ranking
from sculpt.agents.transfer import portable
from sculpt.model import Params
from sculpt.pruning.costs import cost
from sculpt.pruning.space import Space
from sculpt.scoring.rewards import RewardState


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """The best policy within a budget."""

    budget: float
    """Share of the space's resource that it must not exceed."""
    policy: np.ndarray
    """int32 `[sites]`."""
    score: float
    """Its reward: accuracy (or minus the loss) on the score images."""
    used: float
    """Share of the space's resource that it uses: of the theoretical MACs, by default."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    policy: np.ndarray
    """int32 `[sites]`: the chosen policy."""
    score: float
    """Its reward in the search: accuracy (or minus the loss) on the score images, before any fine-tuning."""
    used: float
    """Share of the space's resource that it uses; `macs_ratio`, but for `sculpt.with_resource`."""
    macs_ratio: float
    """Its theoretical MACs kept / dense."""
    validation_accuracy: float
    """Its accuracy on the validation split after the re-rank's brief fine-tuning (with `rerank=0`: before any)."""
    history: tuple[Metrics, ...] = dataclasses.field(repr=False)
    """One row per update: "update", "evaluations", "unique", "best" (once a policy has met the budget), "mean_reward",
    "reward_spread" (standard deviation), "mean_accuracy", "budget_error", "reward_weight", "single_sites" (policies of it that
    prune one site only, see `SearchConfig.sensitivity`), "seconds", and for the agent "entropy" (nats a site), "kl",
    "clip_fraction", "value_loss", "explained_variance" (critic), "credit_explained" (per-site regression), "epochs" (done). With
    several budgets "best" is that of the first, all others are over the policies of all. Nothing is learned in updates with
    single sites, whose rewards are of policies that keep nearly everything."""
    doubt: str | None
    """A sentence for the user where learning has found no more than luck would have, see `sculpt.agents.diagnosis`."""
    front: tuple[FrontPoint, ...]
    """The best policy found for each of the search's budgets, before any fine-tuning; none for a budget that no policy met."""
    pareto: tuple[tuple[float, float, np.ndarray], ...] = dataclasses.field(repr=False)
    """(share of the resource used, accuracy on the score images, policy) of the archived policies that no other one beats in both."""
    evaluations: int
    """Policies scored, repeats included."""
    unique_evaluations: int
    """Distinct policies scored."""
    seconds: float
    """Wall time of the updates, compilation included, re-rank not; summed over resumed runs."""
    rerank_seconds: float
    """Wall time of the re-rank's fine-tuning and scoring; likewise. 0 without a re-rank."""
    policies_per_second: float
    """`evaluations / seconds`: repeats, which cost nothing, and compilation included."""
    method: str
    """Which method proposed the policies."""
    agent: Params | None = dataclasses.field(repr=False)
    """What the agent learned that holds for other networks too: for `search(..., agent=)`. None for other methods."""


@dataclasses.dataclass(frozen=True)
class Shortlist:
    """The policies of which one is chosen, best scored first; arrays are the host's."""

    policies: np.ndarray
    """int32 `[n, sites]`."""
    rewards: np.ndarray
    """float32 `[n]`: as they were scored."""
    used: np.ndarray
    """float32 `[n]`: shares of the space's resource."""


def shortlist(config: SearchConfig, state: SearchState) -> Shortlist:
    """The best distinct policies of a finished search, `config.rerank` of them or one; `state` is the host's."""
    archive = state.env.archive
    order, rewards = ranking(archive, state.env.reward, config.budget, config.objective)
    # Policies beyond the budget are considered only where none meets it.
    within = int((archive.used[order] <= config.budget + TOLERANCE).sum())
    number = min(max(config.rerank, 1), within or len(order))
    rows = order[:number]
    return Shortlist(np.asarray(archive.policies)[rows], rewards[:number], np.asarray(archive.used)[rows])


def make_result(
    config: SearchConfig,
    space: Space,
    state: SearchState,
    listed: Shortlist,
    judged: np.ndarray,
    history: tuple[Metrics, ...],
    seconds: float,
    rerank_seconds: float,
) -> SearchResult:
    """The result of a finished search whose `state` is the host's, the `listed` policies having the validation accuracies `judged`."""
    best = int(np.argmax(judged))  # the earlier, that is the better scored, where they tie
    archive = state.env.archive
    return SearchResult(
        policy=listed.policies[best],
        score=float(listed.rewards[best]),
        used=float(listed.used[best]),
        macs_ratio=float(cost(space, listed.policies[best]).macs_ratio),
        validation_accuracy=float(judged[best]),
        history=history,
        doubt=doubt(config, history),
        front=_front(archive, state.env.reward, config),
        pareto=_pareto(archive),
        evaluations=int(archive.total),
        unique_evaluations=int(archive.count),
        seconds=seconds,
        rerank_seconds=rerank_seconds,
        policies_per_second=int(archive.total) / max(seconds, 1e-9),
        method=config.method,
        agent=portable(state.agent) if config.method == "agent" else None,
    )


def _front(archive: Archive, rewards: RewardState, config: SearchConfig) -> tuple[FrontPoint, ...]:
    """The best archived policy of each budget."""
    points = []
    for budget in config.budgets:
        order, worth = ranking(archive, rewards, budget, config.objective)
        used = float(archive.used[order[0]])
        if used <= budget + TOLERANCE:
            policy = np.asarray(archive.policies[order[0]])
            points.append(FrontPoint(budget, policy, float(worth[0]), used))
    return tuple(points)


def _pareto(archive: Archive) -> tuple[tuple[float, float, np.ndarray], ...]:
    """Archived policies not dominated in (less used, higher accuracy), by rising use."""
    count = int(archive.count)
    used, accuracy = archive.used[:count], archive.accuracy[:count]
    front, highest = [], -1.0
    for row in np.lexsort((-accuracy, used)):
        if accuracy[row] > highest:
            highest = float(accuracy[row])
            front.append((float(used[row]), highest, np.asarray(archive.policies[row])))
    return tuple(front)

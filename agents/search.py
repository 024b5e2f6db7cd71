"""Searching for a policy: `search`, and what it returns."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.agents.diagnosis import doubt
from sculpt.agents.rerank import Referee
from sculpt.agents.run import Run, set_up
from sculpt.agents.sensitivity import options_each, singles
from sculpt.agents.transfer import check_agent, portable
from sculpt.agents.update import TOLERANCE, Metrics, ranking
from sculpt.arguments import checked
from sculpt.model import Model, Params
from sculpt.pruning import Space, check_budget, cost
from sculpt.scoring.archive import Archive
from sculpt.scoring.env import EnvParams, Scorer
from sculpt.scoring.evaluate import score_policies
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.reward import RewardState
from sculpt.training.checkpoint import Checkpoints
from sculpt.training.data import Splits
from sculpt.training.stream import content


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
    """Wall time of the re-rank's fine-tuning and scoring; likewise."""
    policies_per_second: float
    """Evaluations per second, repeats included; the first block of updates, which compiles, is left out if it can be."""
    method: str
    """Which method proposed the policies."""
    agent: Params | None = dataclasses.field(repr=False)
    """What the agent learned that holds for other networks too: for `search(..., agent=)`. None for other methods."""


@checked
def search(
    model: Model,
    space: Space,
    splits: Splits,
    config: SearchConfig,
    key: jax.Array,
    *,
    directory: str | Path | None = None,
    on_metrics: Callable[[Metrics], None] | None = None,
    plan: EvaluationPlan | None = None,
    scorer: Scorer = score_policies,
    agent: Params | None = None,
) -> SearchResult:
    """Looks for the policy that keeps the most quality within a budget of MACs, or of another resource of the space.

    Policies are scored on images of the train split, after BatchNorm recalibration; the last choice among the best is made
    on the validation split, after brief fine-tuning. The test split is never read. All randomness comes from `key` and the
    number of the update, so an interrupted search that is resumed gives exactly the result of an uninterrupted one.

    Args:
      model: the trained, dense network.
      space: sites and patterns of that network.
      splits: data; `train` needs `config.score_images + config.calibration_images` images.
      config: what to search for, and how.
      key: `jax.random.key`.
      directory: where to keep checkpoints, and to resume from if there are any; None keeps none. For one host.
      on_metrics: called with each new row of the history.
      plan: how evaluations are laid out, over several devices for instance; None: one device, as `EvaluationPlan()`.
        `sculpt.tune_plan` finds the fastest.
      scorer: what scores policies; another one than the network itself is for experiments.
      agent: what an agent learned on other networks, `SearchResult.agent` or what `sculpt.agents.pretrain` returned: this one
        begins with it, and with what the energy tells (`config.warm_start`), as those did.

    Raises:
      ValueError: if a budget cannot be reached, the train split is too small, `agent` is of another size than `config.agent`, or
        `directory` holds another search or is given on several hosts.
    """
    if directory is not None and jax.process_count() > 1:
        raise ValueError(
            "a search over several hosts keeps no checkpoints: leave directory out, or search on one host"
        )
    for budget in config.budgets:
        check_budget(space, budget)
    if agent is not None:
        check_agent(config, agent)
    alone = len(singles(space, options_each(config, space))) if config.method == "greedy" else 0
    if 0 < config.evaluations <= alone:
        raise ValueError(
            f"method 'greedy' scores {alone} policies of one pruned site first: evaluations must be more, got {config.evaluations}"
        )
    plan = plan or EvaluationPlan()
    if agent is not None and config.warm_start is None:
        config = dataclasses.replace(config, warm_start=True)  # it was taught beside what the energy tells
    data_key, init_key, update_key, rerank_key = jax.random.split(key, 4)
    program, task, calibration = set_up(model, space, splits, config, data_key, plan, scorer)
    run = Run.start(program, task, plan, init_key, config, agent)
    keeper = (
        None
        if directory is None
        else Checkpoints(directory, _fingerprint(model, space, splits, config, key, task.env, agent))
    )
    referee = Referee(model, space, splits, config, calibration, rerank_key)
    try:
        if keeper is not None and (found := keeper.restore_latest(run.tree(run.state))) is not None:
            run.load(found[1])
        # An accelerator works on while the host reads. On CPUs nothing is won by that, and the dispatch may wait for the work before
        # it: the time of one block would be counted as another's.
        ahead = jax.default_backend() != "cpu"
        block = run.launch(update_key)
        while block is not None:
            following = run.launch(update_key) if ahead else None
            run.settle(block, on_metrics)
            if keeper is not None:
                keeper.save(block.stop, run.tree(block.state))
            block = following or run.launch(update_key)
        archive, metrics = jax.device_get((run.state.env.archive, run.state.metrics))
        order, rewards = ranking(archive, run.state.env.reward, config.budget, config.objective)
        # Policies beyond the budget are considered only where none meets it.
        within = int((archive.used[order] <= config.budget + TOLERANCE).sum())
        candidates = order[: min(max(config.rerank, 1), within or len(order))]
        for place, row in enumerate(candidates):
            if np.isnan(run.judged[place]):
                begun = time.perf_counter()
                run.judged[place] = referee.judge(archive.policies[row])
                run.judging[place] = time.perf_counter() - begun
                if keeper is not None:
                    keeper.save(config.updates + place + 1, run.tree(run.state))
    finally:
        if keeper is not None:
            keeper.close()
    best = int(
        np.argmax(run.judged[: len(candidates)])
    )  # the earlier, that is the better scored, where they tie
    history = tuple(run.row(metrics, i) for i in range(config.updates))
    return SearchResult(
        policy=archive.policies[candidates[best]],
        score=float(rewards[best]),
        used=float(archive.used[candidates[best]]),
        macs_ratio=float(cost(space, archive.policies[candidates[best]]).macs_ratio),
        validation_accuracy=float(run.judged[best]),
        history=history,
        doubt=doubt(config, history),
        front=_front(archive, run.state.env.reward, config),
        pareto=_pareto(archive),
        evaluations=int(archive.total),
        unique_evaluations=int(archive.count),
        seconds=float(run.seconds.sum()),
        rerank_seconds=float(run.judging.sum()),
        policies_per_second=run.speed(),
        method=config.method,
        agent=portable(jax.device_get(run.state.agent)) if config.method == "agent" else None,
    )


def _front(archive: Archive, rewards: RewardState, config: SearchConfig) -> tuple[FrontPoint, ...]:
    """The best archived policy of each budget."""
    points = []
    for budget in config.budgets:
        order, worth = ranking(archive, rewards, budget, config.objective)
        used = float(archive.used[order[0]])
        if used <= budget + TOLERANCE:
            points.append(FrontPoint(budget, archive.policies[order[0]], float(worth[0]), used))
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


def _fingerprint(
    model: Model,
    space: Space,
    splits: Splits,
    config: SearchConfig,
    key: jax.Array,
    task: EnvParams,
    agent: Params | None,
) -> str:
    """Tells one search from another: settings, key, sites, weights, data, precision, what the agent begins with; not how often it
    is saved, nor its layout."""
    settings = dataclasses.replace(config, checkpoint_every=1, repair=config.repair_of(model))
    precision = task.problem.plan.precision
    digest = hashlib.sha256(repr((settings, precision, splits.name, splits.mean, splits.std)).encode())
    digest.update(np.asarray(jax.random.key_data(key)).tobytes())
    digest.update(space.resource.name.encode() + space.option_cost.tobytes())
    for site in space.sites:
        digest.update(f"{site.name} {site.family} {[o.label for o in site.options]}".encode())
    arrays = model.params, model.state, task.problem.choices, task.budget, agent
    for leaf in jax.tree.leaves(jax.device_get(arrays)):
        digest.update(np.asarray(leaf).tobytes())
    # Beyond the images to score on: the re-rank trains on the whole train split and judges on validation.
    for split in (splits.train, splits.validation):
        for array in (split.images, split.labels):
            digest.update(content(array))
    return digest.hexdigest()

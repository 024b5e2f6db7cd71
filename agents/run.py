"""A running search: its set-up, and the blocks of updates that it runs in."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.actor_critic import site_inputs
from sculpt.agents.config import SearchConfig
from sculpt.agents.controls import fixed_policy
from sculpt.agents.environment import EnvParams, PruningEnv, Scorer
from sculpt.agents.learning import (
    Metrics,
    SearchProgram,
    SearchState,
    SearchTask,
    init_state,
    make_program,
    metrics_of,
    snapshot,
    update,
)
from sculpt.agents.sensitivity import options_each, starts_from_energy
from sculpt.agents.transfer import check_agent
from sculpt.data.splits import Splits
from sculpt.inputs import rows
from sculpt.interrupts import check_interrupt
from sculpt.model import Model, Params
from sculpt.pruning.budget import check_budget
from sculpt.pruning.space import Space
from sculpt.repair.recalibration import check_calibration_images
from sculpt.scoring.evaluation import evaluate, score_policies
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.problem import make_problem
from sculpt.training.finetuning import check_request


@dataclasses.dataclass(frozen=True)
class UpdateBlock:
    """Some updates that the device was told to do."""

    start: int
    stop: int
    state: SearchState
    """The state behind them, which the device may still be working on."""


@dataclasses.dataclass
class SearchRun:
    """A search under way: the device's state, and what the host keeps beside it."""

    program: SearchProgram
    task: SearchTask
    plan: EvaluationPlan
    config: SearchConfig
    state: SearchState
    done: int
    """Updates done, or under way."""
    clock: float
    """When the last block ended."""
    seconds: np.ndarray
    """float32 `[updates]`."""
    judged: np.ndarray
    """float32 `[rerank or 1]`: validation accuracies of the re-ranked, NaN where still to come."""
    judging: np.ndarray
    """float32 `[rerank or 1]`: seconds that each of these took."""

    @staticmethod
    def start(
        program: SearchProgram,
        task: SearchTask,
        plan: EvaluationPlan,
        key: jax.Array,
        config: SearchConfig,
        agent: Params | None,
    ) -> SearchRun:
        # A copy: an update reuses the buffers of its state, and equal constants may share one.
        state = plan.place(snapshot(init_state(program, task, key, agent)))
        judged = np.full(max(config.rerank, 1), np.nan, np.float32)
        seconds = np.zeros(config.updates, np.float32)
        now = time.perf_counter()
        return SearchRun(program, task, plan, config, state, 0, now, seconds, judged, np.zeros_like(judged))

    def tree(self, state: SearchState) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"state": state, "seconds": self.seconds, "judged": self.judged, "judging": self.judging}

    def load(self, tree: dict[str, Any]) -> None:
        """Takes over the contents of a checkpoint."""
        self.state = self.plan.place(jax.tree.map(jnp.asarray, tree["state"]))
        self.seconds, self.judged, self.judging = (
            np.array(tree[name]) for name in ("seconds", "judged", "judging")
        )
        self.done, self.clock = int(self.state.update), time.perf_counter()

    def launch(self, key: jax.Array) -> UpdateBlock | None:
        """Gives the device its next block of updates without waiting for it; None where all are done or under way."""
        start, stop = self.done, min(self.done + self.config.checkpoint_every, self.config.updates)
        if start == stop:
            return None
        for _ in range(start, stop):
            check_interrupt()
            self.state = update(self.program, self.task, self.state, key)
        self.done = stop
        return UpdateBlock(start, stop, snapshot(self.state))

    def settle(self, block: UpdateBlock, on_metrics: Callable[[Metrics], None] | None) -> None:
        """Waits for a block and reads its metrics, while an accelerator goes on with the next one."""
        jax.block_until_ready(block.state)
        now = time.perf_counter()
        self.seconds[block.start : block.stop] = (now - self.clock) / (block.stop - block.start)
        self.clock = now
        if on_metrics is not None:
            metrics = jax.device_get(block.state.metrics)
            for index in range(block.start, block.stop):
                on_metrics(self.row(metrics, index))

    def row(self, metrics: dict[str, Any], index: int) -> Metrics:
        """The history's row of one update."""
        return {**metrics_of(metrics, index), "seconds": float(self.seconds[index])}


def settled(config: SearchConfig, space: Space, agent: Params | None) -> SearchConfig:
    """The settings of a search of this space, with what an `agent` taught elsewhere decides.

    Raises:
      ValueError: if a budget cannot be reached, `agent` is of another size than `config.agent`, or there are too few evaluations.
    """
    for budget in config.budgets:
        check_budget(space, budget)
    if config.method == "greedy" and space.max_options > 1 and options_each(config, space) == 0:
        more = (dataclasses.replace(config, evaluations=n) for n in itertools.count(config.evaluations + 1))
        least = next(found.evaluations for found in more if options_each(found, space) > 0)
        raise ValueError(
            f"method 'greedy' scores every site by itself with half of its evaluations: they must be at least {least}, got "
            f"{config.evaluations}"
        )
    if agent is None:
        return config
    check_agent(config, agent)
    # It was taught beside what the energy tells.
    return config if config.warm_start is not None else dataclasses.replace(config, warm_start=True)


def set_up(
    model: Model,
    space: Space,
    splits: Splits,
    config: SearchConfig,
    key: jax.Array,
    plan: EvaluationPlan,
    scorer: Scorer = score_policies,
) -> tuple[SearchProgram, SearchTask, jax.Array | None]:
    """The program of a search, its arrays (images are drawn by `key`), and the images to calibrate on.

    Raises:
      ValueError: if the train split is too small, the dense network is not finite, or what the re-rank would refuse after the search: settings of its fine-tuning.
    """
    if config.repair_of(model) == "recalibrate":
        check_calibration_images(config.calibration_images)
    if config.rerank:
        brief = config.rerank_finetune
        check_request(model, splits, brief, model if brief.needs_teacher else None)
    sites = site_inputs(space, model.params)
    if not starts_from_energy(config, space):
        sites = dataclasses.replace(sites, prior=jnp.zeros_like(sites.prior))
    images, labels, calibration = draw_images(splits, config, key)
    problem = make_problem(model, space, images, labels, calibration, plan, config.repair_of(model))
    if not np.isfinite(evaluate(model, rows(images, slice(64)), labels[:64]).loss):
        raise ValueError(
            "outputs of the dense network are not finite on images of the train split: look at what the network computes, and how images "
            "are normalised"
        )
    env = EnvParams(problem, jnp.asarray(config.budgets, jnp.float32))
    task = plan.place(SearchTask(env, sites, fixed_policy(config.method, space, model.params, config.budget)))
    static = PruningEnv(space, config.batch, config.rounds, config.objective, config.reward, scorer)
    return make_program(static, config), task, calibration


def draw_images(
    splits: Splits, config: SearchConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Images and labels to score on and images to calibrate on: disjoint parts of the train split."""
    train = splits.train
    need, have = config.score_images + config.calibration_images, len(train.labels)
    if need > have:
        raise ValueError(
            f"the search needs score_images + calibration_images = {config.score_images} + "
            f"{config.calibration_images} = {need} images of the train split, which has {have}: lower them"
        )
    drawn = np.asarray(jax.random.permutation(key, have))[:need]
    score, calibrate = np.sort(drawn[: config.score_images]), np.sort(drawn[config.score_images :])
    images = jax.tree.map(jnp.asarray, splits.normalise(rows(train.images, score)))
    labels = jnp.asarray(np.asarray(train.labels)[score])
    if not config.calibration_images:
        return images, labels, None
    return images, labels, jax.tree.map(jnp.asarray, splits.normalise(rows(train.images, calibrate)))

"""Training one agent on several networks in turn: `pretrain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from sculpt.agents.config import SearchConfig
from sculpt.agents.environment import Scorer
from sculpt.agents.learning import Metrics, init_state, metrics_of, snapshot, update
from sculpt.agents.run import set_up
from sculpt.agents.transfer import check_fits, portable, transplant
from sculpt.arguments import check_argument, checked
from sculpt.data.splits import Splits
from sculpt.model import Model, Params
from sculpt.pruning.budget import check_budget
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import score_policies
from sculpt.scoring.plan import EvaluationPlan
from sculpt.training.config import FinetuneConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """A network to learn pruning on."""

    model: Model
    """Trained and dense."""
    space: Space
    """Its sites and patterns."""
    splits: Splits
    """Its data; only `train` is read."""
    scorer: Scorer = score_policies
    """What scores policies."""

    def __post_init__(self) -> None:
        for name, kind in (("model", Model), ("space", Space), ("splits", Splits)):
            check_argument(f"Lesson.{name}", getattr(self, name), kind)


@checked
def pretrain(
    lessons: Sequence[Lesson],
    config: SearchConfig,
    key: jax.Array,
    *,
    on_metrics: Callable[[int, Metrics], None] | None = None,
    plan: EvaluationPlan | None = None,
) -> Params:
    """Trains one agent on several networks, an update on each in turn, for searches on others to begin with.

    Every network has an archive, a regression of credit and Adam's moments of its own; the agent's parameters are shared. Sites have no
    logits of their own, so that what is learned is learned from features.

    Args:
      lessons: the networks.
      config: `evaluations` is that of each network. Budgets in `front` teach the agent to heed the budget. No single sites are scored first,
        nothing is re-ranked or kept on disk: settings of that have no effect.
      key: `jax.random.key`.
      on_metrics: called with the lesson's index and a row as in `SearchResult.history`, after every update.
      plan: as for `search`.

    Returns:
      What `search(..., agent=)` takes; `sculpt.save_params` and `sculpt.load_params` keep it.

    Raises:
      ValueError: for another method than "agent", no lesson, or a budget that cannot be reached.
    """
    if config.method != "agent":
        raise ValueError(
            f"only method='agent' can be trained for other networks, got method={config.method!r}"
        )
    if not isinstance(lessons, Sequence) or not lessons:
        raise ValueError(
            f"lessons must be a sequence of at least one Lesson(model, space, splits), got {lessons!r}"
        )
    for index, lesson in enumerate(lessons):
        check_argument(f"lessons[{index}]", lesson, Lesson)
        for budget in config.budgets:
            check_budget(lesson.space, budget)
    plan = plan or EvaluationPlan()
    config = dataclasses.replace(
        config,
        sensitivity=0.0,
        rerank=0,
        rerank_finetune=FinetuneConfig(),
        agent=dataclasses.replace(config.agent, own_logits=False),
    )
    data_key, init_key, update_key = jax.random.split(key, 3)
    runs = []
    for index, lesson in enumerate(lessons):
        drawn = jax.random.fold_in(data_key, index)
        program, task, _ = set_up(
            lesson.model, lesson.space, lesson.splits, config, drawn, plan, lesson.scorer
        )
        # The same key for all: what they share begins alike. A copy: an update reuses the buffers of its state.
        runs.append((program, task, plan.place(snapshot(init_state(program, task, init_key)))))
    learnt = runs[0][2].agent
    for _, _, state in runs:
        check_fits(learnt, state.agent)
    for turn in range(config.updates):
        for index, (program, task, state) in enumerate(runs):
            state = dataclasses.replace(state, agent=transplant(learnt, state.agent))
            state = update(program, task, state, jax.random.fold_in(update_key, index))
            learnt = portable(state.agent)
            runs[index] = (program, task, state)
            if on_metrics is not None:
                on_metrics(index, metrics_of(state.metrics, turn))
    return jax.device_get(learnt)

"""The search loop: `search`."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.agents.environment import EnvParams, Scorer
from sculpt.agents.learning import Metrics
from sculpt.agents.rerank import Referee
from sculpt.agents.result import SearchResult, make_result, shortlist
from sculpt.agents.run import SearchRun, draw_images, set_up, settled
from sculpt.arguments import checked
from sculpt.data.splits import Splits, add_examples
from sculpt.digest import add_arrays
from sculpt.ir.identity import add_model, add_task
from sculpt.model import Model, Params
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import score_policies
from sculpt.scoring.plan import EvaluationPlan
from sculpt.training.checkpoint import Checkpoints


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

    Quality is the accuracy, or what the model's task says. Policies are scored on images of the train split, after BatchNorm
    recalibration; the last choice among the best is made on the validation split, after brief fine-tuning. The test split is never
    read. All randomness comes from `key` and the number of the update, so an interrupted search that is resumed gives exactly the
    result of an uninterrupted one.

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
      ValueError: if a budget cannot be reached, the dense network is not finite, the train split is too small, `agent` is of another size than `config.agent`, or
        `directory` holds another search or is given on several hosts.
    """
    if directory is not None and jax.process_count() > 1:
        raise ValueError(
            "a search over several hosts keeps no checkpoints: leave directory out, or search on one host"
        )
    plan, config = plan or EvaluationPlan(), settled(config, space, agent)
    data_key, init_key, update_key, rerank_key = jax.random.split(key, 4)
    program, task, calibration = set_up(model, space, splits, config, data_key, plan, scorer)
    run = SearchRun.start(program, task, plan, init_key, config, agent)
    keeper = (
        None
        if directory is None
        else Checkpoints(directory, _fingerprint(model, space, splits, config, key, task.env, scorer, agent))
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
        state = jax.device_get(run.state)
        listed = shortlist(config, state)
        for place, policy in enumerate(listed.policies):
            if np.isnan(run.judged[place]):
                begun = time.perf_counter()
                run.judged[place] = referee.judge(policy)
                run.judging[place] = time.perf_counter() - begun
                if keeper is not None:
                    keeper.save(config.updates + place + 1, run.tree(run.state))
    finally:
        if keeper is not None:
            keeper.close()
    return make_result(
        config,
        space,
        state,
        listed,
        run.judged[: len(listed.policies)],
        tuple(run.row(state.metrics, i) for i in range(config.updates)),
        float(run.seconds.sum()),
        float(run.judging.sum()) if config.rerank else 0.0,
    )


@checked
def trial_network(
    model: Model, space: Space, splits: Splits, config: SearchConfig, key: jax.Array, policy: np.ndarray
) -> Model:
    """The network that the re-rank of `search(model, space, splits, config, key)` judged `policy` by: after its brief fine-tuning, which
    is done again, with the same result."""
    data_key, _, _, rerank_key = jax.random.split(key, 4)
    calibration = draw_images(splits, config, data_key)[2]
    return Referee(model, space, splits, config, calibration, rerank_key).network(policy)


def _fingerprint(
    model: Model,
    space: Space,
    splits: Splits,
    config: SearchConfig,
    key: jax.Array,
    task: EnvParams,
    scorer: Scorer,
    agent: Params | None,
) -> str:
    """Tells one search from another: settings, key, sites, network, data, precision, scorer, what the agent begins with; not how often
    it is saved, nor its layout."""
    settings = dataclasses.replace(config, checkpoint_every=1, repair=config.repair_of(model))
    scored_by = getattr(scorer, "__qualname__", repr(scorer))  # the text of a function has its address
    precision = task.problem.plan.precision
    digest = hashlib.sha256(
        repr((settings, precision, scored_by, splits.name, splits.mean, splits.std)).encode()
    )
    digest.update(space.resource.name.encode() + space.option_cost.tobytes())
    for site in space.sites:
        digest.update(f"{site.name} {site.family} {[o.label for o in site.options]}".encode())
    add_model(digest, model, splits.input(2))
    add_task(digest, model, splits.input(2), splits.wanted(2))
    add_arrays(digest, (key, task.problem.choices, task.budget, agent))
    # Beyond the images to score on: the re-rank trains on the whole train split and judges on validation.
    add_examples(digest, splits)
    return digest.hexdigest()

"""Several searches with different seeds in one compiled program: `search_seeds`."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.agents.environment import Scorer
from sculpt.agents.learning import SearchProgram, SearchState, SearchTask, init_state, metrics_of, update
from sculpt.agents.rerank import Referee
from sculpt.agents.result import SearchResult, make_result, shortlist
from sculpt.agents.run import set_up, settled
from sculpt.arguments import checked, is_whole
from sculpt.data.splits import Splits
from sculpt.model import Model, Params
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import score_policies
from sculpt.scoring.plan import EvaluationPlan


@checked
def search_seeds(
    model: Model,
    space: Space,
    splits: Splits,
    config: SearchConfig,
    key: jax.Array,
    seeds: int,
    *,
    plan: EvaluationPlan | None = None,
    scorer: Scorer = score_policies,
    agent: Params | None = None,
) -> tuple[SearchResult, ...]:
    """Searches `seeds` times at once: updates are mapped over the seeds, and what is new of all their policies is scored together.

    For how far results depend on chance, and for the best of several. All seeds score on the same images and are re-ranked by the same
    batches, drawn by `key`; a policy on the shortlists of several is fine-tuned once. Nothing is kept on disk.

    Args:
      model: the trained, dense network.
      space: sites and patterns of that network.
      splits: data; as for `search`.
      config: settings of each search.
      key: `jax.random.key`.
      seeds: how many.
      plan: as for `search`.
      scorer: as for `search`.
      agent: as for `search`; every seed begins with it.

    Returns:
      A result for each seed. `seconds`, `rerank_seconds` and `policies_per_second` are those of all seeds together.

    Raises:
      ValueError: as `search`, or if `seeds` is not a whole number of at least 1.
    """
    if not is_whole(seeds, 1):
        raise ValueError(f"seeds must be a whole number of at least 1, got {seeds!r}")
    plan, config = plan or EvaluationPlan(), settled(config, space, agent)
    data_key, init_key, update_key, rerank_key = jax.random.split(key, 4)
    program, task, calibration = set_up(model, space, splits, config, data_key, plan, scorer)
    update_keys = jax.random.split(update_key, seeds)
    begun = [init_state(program, task, one, agent) for one in jax.random.split(init_key, seeds)]
    states = plan.place(jax.tree.map(lambda *leaves: jnp.stack(leaves), *begun))
    seconds = np.zeros(config.updates)
    for turn in range(config.updates):
        clock = time.perf_counter()
        states = jax.block_until_ready(_update_seeds(program, task, states, update_keys))
        seconds[turn] = time.perf_counter() - clock
    states = jax.device_get(states)
    finished = [jax.tree.map(lambda leaf, seed=seed: leaf[seed], states) for seed in range(seeds)]
    lists = [shortlist(config, state) for state in finished]
    referee = Referee(model, space, splits, config, calibration, rerank_key)
    clock = time.perf_counter()
    judged = {
        policy.tobytes(): referee.judge(policy)
        for policy in np.unique(np.concatenate([listed.policies for listed in lists]), axis=0)
    }
    judging = time.perf_counter() - clock if config.rerank else 0.0
    results = []
    for state, listed in zip(finished, lists):
        rows = (metrics_of(state.metrics, turn) for turn in range(config.updates))
        history = tuple({**row, "seconds": float(took)} for row, took in zip(rows, seconds))
        verdicts = np.asarray([judged[policy.tobytes()] for policy in listed.policies])
        found = make_result(config, space, state, listed, verdicts, history, float(seconds.sum()), judging)
        results.append(dataclasses.replace(found, policies_per_second=seeds * found.policies_per_second))
    return tuple(results)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _update_seeds(
    program: SearchProgram, task: SearchTask, states: SearchState, keys: jax.Array
) -> SearchState:
    """One update of every seed: leaves of `states` and `keys` are `[seeds, ...]`."""
    return jax.vmap(functools.partial(update, program, task))(states, keys)

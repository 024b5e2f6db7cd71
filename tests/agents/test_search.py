"""The whole search, on problems whose answer is known."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.agents.config import RULES, AgentConfig, Method, SearchConfig
from sculpt.agents.environment import Scorer
from sculpt.agents.learning import update
from sculpt.agents.loop import search
from sculpt.agents.result import SearchResult
from sculpt.data.splits import Split, Splits
from sculpt.model import Model
from sculpt.pruning.costs import cost, resource_used
from sculpt.scoring.evaluation import evaluate, score_policies
from sculpt.scoring.rewards import RewardConfig
from sculpt.training.config import FinetuneConfig
from tests.agents.toys import SMALL, TableScorer, toy_model, toy_space, toy_splits

BASE = SearchConfig(budget=0.5, evaluations=256, batch_size=16, rerank=0, agent=SMALL, checkpoint_every=4)
CONTROL = dataclasses.replace(BASE, method="random", agent=AgentConfig())
# The package's name `search` is the function.
search_module = importlib.import_module("sculpt.agents.loop")
run_module = importlib.import_module("sculpt.agents.run")
REPOSITORY = Path(__file__).resolve().parents[2]


def run(config: SearchConfig, seed: int = 0, scorer: Scorer | None = None, **options) -> SearchResult:
    return search(
        toy_model(),
        toy_space(),
        toy_splits(),
        config,
        jax.random.key(seed),
        scorer=scorer or TableScorer(),
        **options,
    )


@functools.cache
def plain(method: Method = "agent", seed: int = 0) -> SearchResult:
    return run(BASE if method == "agent" else dataclasses.replace(CONTROL, method=method), seed)


def same(first: SearchResult, second: SearchResult) -> bool:
    """Bit-equal in everything but time."""

    def untimed(result: SearchResult) -> list[dict[str, float]]:
        return [{name: v for name, v in row.items() if name != "seconds"} for row in result.history]

    return (
        np.array_equal(first.policy, second.policy)
        and (first.score, first.validation_accuracy) == (second.score, second.validation_accuracy)
        and repr(untimed(first)) == repr(untimed(second))
        and first.unique_evaluations == second.unique_evaluations
    )


@functools.cache
def optimum() -> float:
    """Best value of the table among all policies that the projection can give: within the budget, no slack to be filled."""
    table, space = TableScorer().table(), toy_space()
    every = np.asarray(list(itertools.product(*(range(n) for n in space.num_options))), np.int32)
    shape = tuple(space.num_options)
    ratios = np.concatenate([_ratios(jnp.asarray(block)) for block in np.array_split(every, 64)]).reshape(
        shape
    )
    values = table[np.arange(space.num_sites)[None], every].mean(axis=1).reshape(shape)
    reached = ratios <= BASE.budget
    for site, options in enumerate(shape):
        costs = space.option_cost[site, :options]
        for option in range(options):
            dearer = np.flatnonzero(costs > costs[option])
            if dearer.size:
                fits = np.take(ratios, dearer, axis=site).min(axis=site) <= BASE.budget
                np.moveaxis(reached, site, 0)[option] &= ~fits
    return float(values[reached].max())


@jax.jit
def _ratios(policies: jax.Array) -> jax.Array:
    return resource_used(toy_space(), policies)


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_agent_finds_more_than_chance_and_nearly_the_optimum(seeds: int) -> None:
    agent = np.median([plain("agent", seed).score for seed in range(seeds)])
    chance = np.median([plain("random", seed).score for seed in range(seeds)])
    assert chance < agent <= optimum() + 1e-6
    assert agent > 0.95 * optimum()
    history = plain("agent").history
    assert history[-1]["mean_reward"] > history[0]["mean_reward"] + 0.2
    assert history[-1]["entropy"] < history[0]["entropy"]


@pytest.mark.slow
def test_the_table_too_finds_nearly_the_optimum() -> None:
    """The toy's worth is a sum over sites: no graph is needed to learn it."""
    table = np.median([plain("table", seed).score for seed in range(3)])
    assert 0.9 * optimum() < table <= optimum() + 1e-6


@pytest.mark.slow
def test_greedy_needs_more_evaluations_than_sites() -> None:
    config = dataclasses.replace(CONTROL, method="greedy", evaluations=8, batch_size=5)
    with pytest.raises(ValueError, match=r"every site by itself .* must be at least (\d+), got 8") as told:
        run(config)
    # With so many it scores one option of each, and tells by these what the others would do.
    least = int(re.findall(r"at least (\d+)", str(told.value))[0])
    found = run(dataclasses.replace(config, evaluations=least))
    alone = sum(row["single_sites"] for row in found.history)
    assert alone == 1 + toy_space().num_sites <= 5 * len(found.history) / 2
    with pytest.raises(ValueError, match=f"at least {least}, got {least - 1}"):
        run(dataclasses.replace(config, evaluations=least - 1))


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.fast("random", "uniform", "magnitude", "lamp")
def test_correctness_18_every_method_has_the_same_evaluations_and_interface(method: Method) -> None:
    if method == "cma_es":
        pytest.importorskip("evosax")
    result = plain(method)
    assert result.method == method
    assert result.evaluations == BASE.evaluations == result.history[-1]["evaluations"]
    assert len(result.history) == BASE.updates
    assert 1 <= result.unique_evaluations <= result.evaluations
    assert (result.unique_evaluations == 1) == (method in RULES)
    assert result.policy.shape == (toy_space().num_sites,) and result.policy.dtype == np.int32
    ratio = float(cost(toy_space(), result.policy).macs_ratio)
    assert ratio <= BASE.budget + 1e-5
    assert result.macs_ratio == pytest.approx(ratio, rel=1e-5)
    table = TableScorer().table()[np.arange(toy_space().num_sites), result.policy]
    assert result.score == pytest.approx(table.mean(), abs=1e-5)
    assert result.score == pytest.approx(result.history[-1]["best"], abs=1e-6)
    assert result.seconds > 0 and result.rerank_seconds == 0
    assert result.policies_per_second == pytest.approx(result.evaluations / result.seconds)


def test_the_front_is_not_dominated() -> None:
    front = plain("random").pareto
    ratios, accuracies = [p[0] for p in front], [p[1] for p in front]
    assert ratios == sorted(ratios) and accuracies == sorted(accuracies)
    assert len(set(accuracies)) == len(front)
    assert max(accuracies) == pytest.approx(plain("random").score)
    for ratio, _, policy in front:
        assert float(cost(toy_space(), policy).macs_ratio) == pytest.approx(ratio, rel=1e-5)


def test_same_key_same_bits_other_key_other_search() -> None:
    assert same(plain("agent"), run(BASE))
    assert not same(plain("agent"), plain("agent", 1))


def test_nothing_is_retraced() -> None:
    run(BASE)
    compiled = update._cache_size()  # type: ignore[attr-defined]
    run(dataclasses.replace(BASE, budget=0.4, checkpoint_every=7), seed=5)
    assert update._cache_size() == compiled  # type: ignore[attr-defined]


KILLED = """
import os, signal, sys
import jax
from tests.agents import test_search as t
def stop(row):
    if row["update"] == 10:
        os.kill(os.getpid(), signal.SIGKILL)
t.run(t.BASE, directory=sys.argv[1], on_metrics=stop)
"""


@pytest.mark.slow
def test_a_killed_search_resumes_to_the_same_result(tmp_path: Path) -> None:
    cache = str(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_PLATFORMS": "cpu",
    }
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    rows: list[float] = []
    resumed = run(BASE, directory=tmp_path, on_metrics=lambda row: rows.append(row["update"]))
    assert rows[0] == 9.0  # two blocks of four had been saved
    assert same(resumed, plain("agent"))
    again: list[float] = []
    assert same(run(BASE, directory=tmp_path, on_metrics=lambda row: again.append(row["update"])), resumed)
    assert again == []
    # How often it is saved makes no other search of it; other data do, in whichever split that is read.
    seldom = dataclasses.replace(BASE, checkpoint_every=7)
    assert same(run(seldom, directory=tmp_path, on_metrics=lambda row: again.append(row["update"])), resumed)
    assert again == []
    with pytest.raises(ValueError, match="another run"):
        run(dataclasses.replace(BASE, budget=0.4), directory=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        run(BASE, directory=tmp_path, scorer=TableScorer(1))
    splits = toy_splits()
    # An image that is neither scored nor calibrated on: the re-rank trains on it.
    unseen = int(jax.random.permutation(jax.random.split(jax.random.key(0), 4)[0], 600)[-1])
    for which, row in (("train", unseen), ("validation", 0)):
        split = getattr(splits, which)
        images = split.images.copy()
        images[row] ^= 1
        other = dataclasses.replace(splits, **{which: dataclasses.replace(split, images=images)})
        with pytest.raises(ValueError, match="another run"):
            search(
                toy_model(),
                toy_space(),
                other,
                BASE,
                jax.random.key(0),
                directory=tmp_path,
                scorer=TableScorer(),
            )


class Watched:
    """A split that counts how often it is looked at."""

    def __init__(self, split: Split) -> None:
        self.split, self.reads = split, 0

    def __getattr__(self, name: str) -> object:
        self.reads += 1
        return getattr(self.split, name)

    def __len__(self) -> int:
        self.reads += 1
        return len(self.split.labels)


def test_correctness_05_the_test_split_is_never_read() -> None:
    splits = toy_splits()
    watched = Watched(splits.test)
    config = dataclasses.replace(
        CONTROL, evaluations=32, rerank=2, rerank_finetune=FinetuneConfig(max_steps=2)
    )
    result = search(
        toy_model(),
        toy_space(),
        dataclasses.replace(splits, test=watched),  # type: ignore[arg-type]
        config,
        jax.random.key(0),
    )
    assert watched.reads == 0
    assert 0.0 <= result.validation_accuracy <= 1.0


def test_the_last_choice_is_made_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[np.ndarray] = []
    best = plain("random").policy

    def judge(self: object, policy: np.ndarray) -> float:
        judged.append(policy)
        return {0: 0.2, 1: 0.6, 2: 0.9, 3: 0.9}[len(judged) - 1]

    monkeypatch.setattr(search_module.Referee, "judge", judge)
    result = run(dataclasses.replace(CONTROL, rerank=4))
    assert len(judged) == 4 and len({tuple(p) for p in judged}) == 4
    np.testing.assert_array_equal(
        result.policy, judged[2]
    )  # the best, and of equals the one with the better score
    assert result.validation_accuracy == pytest.approx(0.9)
    assert 0.0 < result.rerank_seconds < result.seconds
    np.testing.assert_array_equal(judged[0], best)


@pytest.mark.slow
def test_the_last_choice_keeps_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without projection the archive holds policies beyond the budget, which a judge may well like better."""

    def judge(self: object, policy: np.ndarray) -> float:
        return float(cost(toy_space(), policy).macs_ratio)

    monkeypatch.setattr(search_module.Referee, "judge", judge)
    reward = RewardConfig(kind="lagrangian", weight=1.0, rate=2.0)
    result = run(dataclasses.replace(BASE, projection=False, reward=reward, rerank=256))
    assert result.macs_ratio <= BASE.budget + 1e-5


@pytest.mark.slow
def test_diverged_networks_are_scored_not_fatal() -> None:
    result = run(CONTROL, scorer=TableScorer(diverge_at=0))
    assert all(np.isfinite(list(row.values())).all() for row in result.history)
    assert result.policy[0] != 0


@pytest.mark.slow
def test_rounds_and_a_reward_that_has_to_hold_the_budget() -> None:
    config = dataclasses.replace(
        BASE,
        evaluations=512,
        rounds=2,
        discount=0.5,
        projection=False,
        reward=RewardConfig(kind="lagrangian", weight=1.0, rate=2.0),
    )
    result = run(config)
    assert result.evaluations == 512 and len(result.history) == 16
    assert result.macs_ratio <= config.budget + 1e-5
    weights = [row["reward_weight"] for row in result.history]
    assert len(set(weights)) > 4
    assert result.history[-1]["mean_reward"] > result.history[0]["mean_reward"]


def _changed(result: SearchResult) -> object:
    return (
        result.policy.tolist(),
        result.score,
        result.validation_accuracy,
        len(result.history),
        result.evaluations,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 0.3},
        {"evaluations": 128},
        {"batch_size": 8},
        {"objective": "loss"},
        {"method": "evolution"},
        {"score_images": 64, "rerank": 0},
        {"calibration_images": 0},
        {"warm_start": True},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.fast("budget", "score_images", "calibration_images", "warm_start")
def test_correctness_04_settings_of_every_method_change_the_search(
    change: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple] = []

    def watch(
        model: Model, space: object, images: jax.Array, labels: object, calibration: object, *others: object
    ):
        shapes.append((images.shape, jax.tree.map(jnp.shape, calibration)))
        return original(model, space, images, labels, calibration, *others)  # type: ignore[arg-type]

    original = run_module.make_problem
    monkeypatch.setattr(run_module, "make_problem", watch)
    before, after = (run(c) for c in (CONTROL, dataclasses.replace(CONTROL, **change)))
    assert _changed(before) != _changed(after) or shapes[0] != shapes[1]


COVERED_ELSEWHERE = {
    "agent": "test_actor_critic.test_every_size_changes_the_agent",
    "front": "test_front.test_every_budget_gets_its_best_policy",
    "learning_rate": "test_ppo.test_epochs_and_learning_rate_change_the_step",
    "epochs": "test_ppo.test_epochs_and_learning_rate_change_the_step",
    "clip_ratio": "test_ppo.test_clip_ratio_and_entropy_change_the_loss",
    "entropy": "test_ppo.test_clip_ratio_and_entropy_change_the_loss",
    "final_entropy": "test_ppo.test_the_weight_of_the_entropy_goes_from_first_to_last",
    "kl_limit": "test_ppo.test_epochs_end_at_the_limit_of_the_divergence",
    "discount": "test_ppo.test_discount_and_lambda_change_the_advantages",
    "gae_lambda": "test_ppo.test_discount_and_lambda_change_the_advantages",
    "rounds": "test_rounds_and_a_reward_that_has_to_hold_the_budget",
    "reward": "test_rounds_and_a_reward_that_has_to_hold_the_budget",
    "projection": "test_rounds_and_a_reward_that_has_to_hold_the_budget",
    "rerank": "test_the_last_choice_is_made_on_validation",
    "sensitivity": "test_sensitivity.test_the_share_of_the_evaluations_decides_how_many_options_are_scored",
    "repair": "test_candidates_are_reconstructed_where_that_is_asked_for",
    "rerank_finetune": "test_the_referee_fine_tunes_as_told",
    "checkpoint_every": "test_a_killed_search_resumes_to_the_same_result",
}
COVERED_HERE = {
    "budget",
    "evaluations",
    "batch_size",
    "objective",
    "method",
    "score_images",
    "calibration_images",
    "warm_start",
}


def test_correctness_04_no_setting_is_without_a_test() -> None:
    assert {f.name for f in dataclasses.fields(SearchConfig)} == COVERED_HERE | set(COVERED_ELSEWHERE)
    assert {f.name for f in dataclasses.fields(AgentConfig)} == {"hidden", "layers", "heads", "own_logits"}


@pytest.mark.slow
def test_the_referee_fine_tunes_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from sculpt.agents import rerank

    told: list[FinetuneConfig] = []

    tune = rerank.finetune

    def listen(*arguments: Any, teacher: Model | None) -> Any:
        told.append(arguments[3])
        assert teacher is toy_model()
        return tune(*arguments, teacher=teacher)

    monkeypatch.setattr(rerank, "finetune", listen)
    wanted = FinetuneConfig(max_steps=2, learning_rate=0.123, distillation=0.5)
    run(dataclasses.replace(CONTROL, rerank=1, rerank_finetune=wanted))
    assert told == [wanted]


@pytest.mark.parametrize("rerank", [0, 1])
@pytest.mark.fast("0")
def test_candidates_are_reconstructed_where_that_is_asked_for(
    rerank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy is without BatchNorm: they are, unless it is said that they are not."""
    from sculpt.agents import rerank as module

    fitted: list[Model] = []
    original = module.reconstruct

    def listen(*arguments: Any) -> Model:
        fitted.append(original(*arguments))
        return fitted[-1]

    monkeypatch.setattr(module, "reconstruct", listen)
    brief = FinetuneConfig(max_steps=1, learning_rate=1e-6) if rerank else FinetuneConfig()
    config = dataclasses.replace(CONTROL, rerank=rerank, rerank_finetune=brief)
    result = run(config)
    assert len(fitted) == 1
    splits = toy_splits()
    images, labels = splits.normalise(splits.validation.images), splits.validation.labels
    accuracy = float(evaluate(fitted[0], images, labels).accuracy)
    assert result.validation_accuracy == pytest.approx(accuracy, abs=0.0 if rerank == 0 else 0.03)
    run(dataclasses.replace(config, repair="recalibrate"))
    assert len(fitted) == 1


@pytest.mark.slow
def test_a_candidate_that_cannot_be_reconstructed_counts_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sculpt.agents import rerank as module
    from sculpt.repair.reconstruction import NotFinite

    def fail(*_: Any) -> Model:
        raise NotFinite("layer stem reads or gives numbers that are not finite on these images")

    monkeypatch.setattr(module, "reconstruct", fail)
    assert run(dataclasses.replace(CONTROL, rerank=2)).validation_accuracy == 0.0
    fading = FinetuneConfig(max_steps=2, gradual=0.5)
    assert run(dataclasses.replace(CONTROL, rerank=1, rerank_finetune=fading)).validation_accuracy > 0.0


@pytest.mark.slow
def test_a_search_scores_what_it_is_told_to_repair() -> None:
    scores = [
        run(dataclasses.replace(CONTROL, repair=repair), scorer=score_policies).history[-1]["mean_accuracy"]
        for repair in ("reconstruct", None, "recalibrate")
    ]
    assert scores[0] == scores[1] != scores[2]
    with pytest.raises(ValueError, match="repair='reconstruct' fits layers on calibration images"):
        dataclasses.replace(CONTROL, repair="reconstruct", calibration_images=0)


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        run(dataclasses.replace(BASE, budget=1e-4))
    with pytest.raises(ValueError, match="images of the train split, which has 600"):
        run(dataclasses.replace(BASE, score_images=700))


@pytest.mark.slow
def test_on_digits_the_agent_beats_chance(trained_digits: tuple[Model, Splits]) -> None:
    from sculpt.pruning.space import make_space
    from sculpt.tracing.tracer import trace

    model, splits = trained_digits
    space = make_space(trace(model, jnp.zeros((1, 8, 8, 1))))
    config = SearchConfig(budget=0.3, evaluations=512, rerank=0)
    scores = {
        method: np.median(
            [
                search(
                    model, space, splits, dataclasses.replace(config, method=method), jax.random.key(s)
                ).score
                for s in range(3)
            ]
        )
        for method in ("agent", "random", "uniform", "magnitude")
    }
    assert scores["agent"] > max(scores["random"], scores["uniform"], scores["magnitude"])


@pytest.mark.slow
def test_a_search_over_several_devices_finds_the_same(
    trained_digits: tuple[Model, Splits], tmp_path: Path
) -> None:
    model, splits = trained_digits
    space = sculpt.make_space(sculpt.trace(model, splits.normalise(splits.train.images[:1])), ("channels",))
    config = SearchConfig(evaluations=12, batch_size=4, rerank=0, score_images=64, calibration_images=64)
    # Halfway, then on from the checkpoint: what is restored has to lie on all devices too.
    plan, key = sculpt.EvaluationPlan(policy_shards=2), jax.random.key(0)

    def stop(row: dict[str, float]) -> None:
        if row["update"] == 2:
            raise KeyboardInterrupt

    config = dataclasses.replace(config, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        search(model, space, splits, config, key, directory=tmp_path, on_metrics=stop, plan=plan)
    # A plan with other batches, which pads the images otherwise, may take over.
    other = dataclasses.replace(plan, images_per_batch=48)
    over_two = search(model, space, splits, config, key, directory=tmp_path, plan=other)
    alone = search(model, space, splits, config, key)
    assert np.array_equal(over_two.policy, alone.policy)
    assert over_two.score == pytest.approx(alone.score, abs=1e-6)
    np.testing.assert_allclose(
        [row["mean_reward"] for row in over_two.history],
        [row["mean_reward"] for row in alone.history],
        atol=1e-4,
    )

"""What tells beforehand how good a pruned network will be after fine-tuning: the rank correlation of cheap scores with it.

    python -m benchmarks.bench_proxy --data DATA --tasks digits-resnet8 digits-vit

Tasks are those of `tasks`, their dense network trained once, with seed 0. Half of the policies are drawn with all options
alike, half by retained energy, all within one budget. Each is scored in every way on the same images of the train split, and
fine-tuned as the task says (networks without BatchNorm from where `reconstruct` leaves them); what is to be foretold is its accuracy on
validation and test images after that. Policies are kept under --run and skipped when they are there already.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import sculpt
from benchmarks.stages import in_words, stage
from benchmarks.tasks import BenchmarkTask, begin, compacted, parser_of, to_reconstruct
from benchmarks.timing import provenance, write_results
from sculpt.data.splits import Splits
from sculpt.model import Model
from sculpt.pruning.budget import energy_logits, project
from sculpt.pruning.space import Space
from sculpt.scoring.problem import Repair

SCORE_IMAGES, CALIBRATION_IMAGES = 256, 128
STEPS = (10, 50)
"""Lengths of the short fine-tunings."""
PROXIES = (
    "accuracy",
    "loss",
    "accuracy, recalibrated",
    "loss, recalibrated",
    "accuracy, reconstructed",
    "loss, reconstructed",
    "retained energy",
    "Taylor",
    *(f"accuracy after {steps} steps" for steps in STEPS),
)


def draw(space: Space, params: Any, number: int, budget: float) -> np.ndarray:
    """int32 `[number, sites]`."""
    alike = sculpt.random_policies(space, jax.random.key(0), number // 2, budget)
    prior = energy_logits(space, params)
    keys = jax.random.split(jax.random.key(1), number - number // 2)
    near = jax.jit(jax.vmap(lambda key: project(space, prior, budget, key).policy))(keys)
    return np.concatenate([alike, near])


def removed(space: Space, params: Any, scores: sculpt.Importance, policies: np.ndarray) -> np.ndarray:
    """float64 `[n]`: importance of the units that each policy removes, all groups together."""
    ranked = sculpt.make_space(space.trace, space.families, importance=scores)
    worth = {site.index: float(scores.scores[site.owner].sum()) for site in ranked.sites}
    retained = np.asarray(sculpt.agents.site_inputs(ranked, params).retained, np.float64)
    lost = [
        [worth[site] * (1 - retained[site, choice]) for site, choice in enumerate(policy)]
        for policy in policies
    ]
    return np.asarray(lost).sum(axis=1)


def foretold(
    model: Model, space: Space, splits: Splits, task: BenchmarkTask, policies: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Proxy -> its values, higher is better, and its seconds per policy, the compilation of a first call left out."""
    drawn = np.random.default_rng(0).permutation(len(splits.train.labels))
    score, calibrate = np.split(drawn[: SCORE_IMAGES + CALIBRATION_IMAGES], [SCORE_IMAGES])
    images, labels = splits.normalise(splits.train.images[score]), splits.train.labels[score]
    calibration = splits.normalise(splits.train.images[calibrate])

    def scored(calibration: Any, repair: Repair = "recalibrate") -> sculpt.Scores:
        found = sculpt.evaluate_policies(model, space, policies, images, labels, calibration, repair=repair)
        return jax.device_get(found)

    def briefly(steps: int) -> np.ndarray:
        config = dataclasses.replace(task.finetune, max_steps=steps)
        found = []
        for policy in policies:
            masks = sculpt.make_masks(space, model.params, policy)
            after = sculpt.finetune(model, masks, splits, config, jax.random.key(2))
            found.append(float(sculpt.evaluate(after, images, labels).accuracy))
        return np.asarray(found)

    def energy() -> np.ndarray:
        prior = np.asarray(energy_logits(space, model.params))
        return prior[np.arange(space.num_sites)[None], policies].sum(axis=1)

    def taylor() -> np.ndarray:
        scores = sculpt.importance(model, space.trace, "taylor", images=images, labels=labels)
        return -removed(space, model.params, scores, policies)

    with_images: dict[str, Callable[[], Any]] = {
        "": lambda: scored(None),
        ", recalibrated": lambda: scored(calibration),
        ", reconstructed": lambda: scored(calibration, "reconstruct"),
    }
    result: dict[str, dict[str, Any]] = {}

    def timed(compute: Callable[[], Any]) -> tuple[Any, float]:
        compute()
        begun = time.perf_counter()
        value = compute()
        return value, (time.perf_counter() - begun) / len(policies)

    for suffix, compute in with_images.items():
        if suffix == ", recalibrated" and not model.state:
            continue
        scores, seconds = timed(compute)
        result[f"accuracy{suffix}"] = {"values": scores.accuracy.tolist(), "seconds": seconds}
        result[f"loss{suffix}"] = {"values": (-scores.loss).tolist(), "seconds": seconds}
    plain = {"retained energy": energy, "Taylor": taylor}
    plain |= {f"accuracy after {steps} steps": functools.partial(briefly, steps) for steps in STEPS}
    for name, compute in plain.items():
        values, seconds = timed(compute)
        result[name] = {"values": values.tolist(), "seconds": seconds}
    return result


def finetuned(
    model: Model, space: Space, splits: Splits, task: BenchmarkTask, policy: np.ndarray
) -> dict[str, float]:
    """Accuracy in percent of the compact network after the task's fine-tuning, on validation and test images together."""
    small = compacted(model, space, policy, to_reconstruct(model, splits))
    after = sculpt.finetune(small, None, splits, task.finetune, jax.random.key(0))
    parts = (splits.validation, splits.test)
    images = np.concatenate([splits.normalise(part.images) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return {"accuracy": 100 * float(sculpt.evaluate(after, images, labels).accuracy)}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; 0 where one of them does not vary."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    ranks = [np.asarray(scipy.stats.rankdata(values)) for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def spread(first: np.ndarray, second: np.ndarray) -> float:
    """Standard deviation of the rank correlation over 2,000 bootstrap samples."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(first), (2000, len(first)))
    return float(np.std([spearman(first[row], second[row]) for row in rows]))


def main() -> None:
    parser = parser_of(__doc__, "bench_proxy", ["digits-resnet8", "digits-vit"])
    parser.add_argument("--policies", type=int, default=24)
    parser.add_argument("--budget", type=float, default=0.4)
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    lines = [
        "# Proxies of the accuracy after fine-tuning",
        "",
        *provenance(),
        f"Spearman's rank correlation (standard deviation of 2,000 bootstrap samples) of what is known before fine-tuning with the "
        f"accuracy after it, over {options.policies} policies of channels within {options.budget} of MACs; {SCORE_IMAGES} train images, "
        f"recalibration and reconstruction on {CALIBRATION_IMAGES}. Seconds: of one policy, without compilation.",
    ]
    for name in options.tasks:
        folder = options.run / name
        task, splits, dense = begin(
            name, folder, options.data, policies=options.policies, budget=options.budget
        )
        trace = sculpt.trace(dense, jnp.zeros((1, *splits.train.images.shape[1:])))
        space = sculpt.make_space(trace, families=("channels",))
        policies = draw(space, dense.params, options.policies, options.budget)
        after = []
        for index, policy in enumerate(policies):
            compute = functools.partial(finetuned, dense, space, splits, task, policy)
            after.append(stage(folder / f"policy{index}.json", compute)["accuracy"])
        known = stage(
            folder / "proxies.json", functools.partial(foretold, dense, space, splits, task, policies)
        )
        truth = np.asarray(after)
        lines += [
            "",
            f"## {name}",
            "",
            f"Accuracy after fine-tuning {truth.min():.2f} to {truth.max():.2f}, mean {truth.mean():.2f} "
            f"(n = {len(splits.validation.labels) + len(splits.test.labels)} validation and test images). {in_words(task.finetune)}.",
            "",
            "| proxy | rank correlation | seconds a policy |",
            "| --- | --- | --- |",
        ]
        for proxy in PROXIES:
            if proxy in known:
                values = np.asarray(known[proxy]["values"])
                lines.append(
                    f"| {proxy} | {spearman(values, truth):.2f} ({spread(values, truth):.2f}) | "
                    f"{known[proxy]['seconds']:.4f} |"
                )
        write_results("bench_proxy", lines)


if __name__ == "__main__":
    main()

"""Evaluations per second of a whole search, and what share of its time the agent takes.

    JAX_NUM_CPU_DEVICES=2 python -m benchmarks.bench_search

The same search is run twice in one process: once scoring networks, once with a scorer that costs nothing, so that what
remains is the agent (graph network, sampling, projection, PPO) and the host's work. With `--seeds 5` so many searches at once
(`search_seeds`) follow, in both ways. Compilation is left out: rates are of the blocks of updates after the first one.
"""

from __future__ import annotations

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.bench_evaluate import NETS
from benchmarks.timing import provenance, spread, write_results
from sculpt.agents.seeds import search_seeds
from sculpt.scoring.evaluation import Scores, score_policies
from sculpt.scoring.problem import Problem


def free_scorer(problem: Problem, policies: jax.Array, count: jax.Array) -> Scores:
    """Scores of no network: the share of sites left dense."""
    del problem, count
    accuracy = (policies == 0).mean(axis=1, dtype=jnp.float32)
    return Scores(accuracy, 1 - accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="resnet20", choices=list(NETS))
    parser.add_argument("--evaluations", type=int, default=256)
    parser.add_argument("--images", type=int, default=256, help="to score on")
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=1, help="searches at once, beside one")
    parser.add_argument("--tune", action="store_true", help="tune the plan first")
    options = parser.parse_args()
    size = NETS[options.net]
    module = sculpt.nets.create(options.net, num_classes=10)
    model = sculpt.from_linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *size))))
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, *size))))
    number = options.images + options.calibration_images
    drawn = jax.random.randint(jax.random.key(1), (number + 200, *size), 0, 256).astype(jnp.uint8)
    labels = jax.random.randint(jax.random.key(2), (number + 200,), 0, 10)
    splits = sculpt.from_arrays(
        np.asarray(drawn[100:]),
        np.asarray(labels[100:]),
        np.asarray(drawn[:100]),
        np.asarray(labels[:100]),
        validation=100,
        num_classes=10,
    )
    config = sculpt.SearchConfig(
        budget=options.budget,
        evaluations=options.evaluations,
        objective="loss",
        score_images=options.images,
        calibration_images=options.calibration_images,
        rerank=0,
        checkpoint_every=1,
    )
    plan = sculpt.EvaluationPlan(policy_shards=jax.device_count())
    if options.tune:
        images, labels = splits.normalise(splits.train.images), splits.train.labels
        calibration = images[options.images :] if options.calibration_images else None
        score = slice(0, options.images)
        plan = sculpt.tune_plan(model, space, images[score], labels[score], calibration).plan
    seconds, results = {}, {}
    for name, scorer in (("networks", score_policies), ("nothing", free_scorer)):
        results[name] = sculpt.search(
            model, space, splits, config, jax.random.key(0), plan=plan, scorer=scorer
        )
        seconds[name] = [row["seconds"] for row in results[name].history[1:]]
        if options.seeds > 1:
            at_once = search_seeds(
                model, space, splits, config, jax.random.key(0), options.seeds, plan=plan, scorer=scorer
            )
            seconds[f"{name}, seeds"] = [row["seconds"] for row in at_once[0].history[1:]]
    whole, agent = (statistics.median(seconds[name]) for name in ("networks", "nothing"))
    result = results["networks"]
    lines = [
        f"# Search, {options.net}, {space.num_sites} sites",
        "",
        *provenance(),
        f"{options.evaluations} evaluations in updates of {config.batch}, {options.images} images each and "
        f"{options.calibration_images} for BatchNorm; {result.unique_evaluations} of them distinct. "
        f"Plan: {plan.describe()}. Random weights and images; seeds 0 to 2.",
        "",
        f"| | seconds per update, median (lowest to highest) of n = {len(seconds['networks'])} | share |",
        "| --- | --- | --- |",
        f"| whole update | {spread(seconds['networks'])} | 100% |",
        f"| agent, projection, PPO, host | {spread(seconds['nothing'], 3)} | {agent / whole:.1%} |",
    ]
    if options.seeds > 1:
        for what, name in (("whole update", "networks"), ("agent, projection, PPO, host", "nothing")):
            together = seconds[f"{name}, seeds"]
            times = options.seeds * statistics.median(seconds[name]) / statistics.median(together)
            lines.append(
                f"| {what}, {options.seeds} seeds at once | {spread(together, 3)} | {times:.2f} times as fast as in turn |"
            )
    lines += ["", f"{config.batch / whole:.2f} evaluations per second, repeats included."]
    write_results(f"bench_search_{options.net}", lines)


if __name__ == "__main__":
    main()

"""Policies per second of `evaluate_policies` beside a plain Python loop, a naive vmap and `lax.map`, in one run.

    JAX_NUM_CPU_DEVICES=2 python -m benchmarks.bench_evaluate --nets resnet20

All score the same random policies of half the MACs on the same random images with the same weights, without
recalibration. The scores must agree, or the benchmark fails. Runs alternate after a warm-up; medians are given with the
spread. The plan is tuned on the device unless one is named. With `--sweep`, chunk and batch sizes are timed one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.timing import interleaved, matmul_runs, provenance, seconds, spread, write_results
from sculpt.model import Model
from sculpt.scoring.evaluation import score_compiled
from sculpt.scoring.problem import make_problem

NETS: dict[str, tuple[int, ...]] = {
    "resnet20": (32, 32, 3),
    "resnet56": (32, 32, 3),
    "resnet50": (224, 224, 3),
    "vgg16_bn": (224, 224, 3),
    "vgg16_bn_cifar": (32, 32, 3),
    "mobilenet_v2": (224, 224, 3),
    "vit_tiny_patch16": (224, 224, 3),
    "vit_tiny_patch4": (32, 32, 3),
}
"""Network -> size of its images."""


@dataclasses.dataclass(frozen=True)
class ScoringTask:
    """What is scored."""

    name: str
    model: Model
    space: sculpt.Space
    policies: jax.Array
    images: jax.Array
    labels: jax.Array

    @property
    def gflop(self) -> float:
        """Of one policy: two per multiply-accumulate of the dense network, since masked ones are computed as well."""
        return 2e-9 * self.space.trace.macs * len(self.images)


def make_task(name: str, policies: int, images: int, budget: float) -> ScoringTask:
    """Random weights and images: neither changes the work."""
    size = NETS[name]
    module = sculpt.nets.create(name, num_classes=10 if size[0] == 32 else 1000)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *size)))
    model = sculpt.from_linen(module, variables)
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, *size))))
    drawn = sculpt.random_policies(space, jax.random.key(0), policies, budget)
    x = jax.random.normal(jax.random.key(1), (images, *size))
    classes = jax.eval_shape(model, x).shape[1]
    return ScoringTask(
        name, model, space, drawn, x, jax.random.randint(jax.random.key(2), (images,), 0, classes)
    )


def rivals(task: ScoringTask, side_by_side: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (what scores policies as (accuracy, loss) arrays, how many of them)."""
    space, model = task.space, task.model

    def one(params: Any, state: Any, images: jax.Array, labels: jax.Array, policy: jax.Array) -> jax.Array:
        masks = sculpt.make_masks(space, params, policy)
        masked = jax.tree.map(lambda w, m: w * m.astype(w.dtype), params, masks)
        logs = jax.nn.log_softmax(model.apply(masked, state, images))
        loss = -jnp.take_along_axis(logs, labels[:, None], axis=1).mean()
        return jnp.stack([(jnp.argmax(logs, axis=1).astype(jnp.int32) == labels).mean(), loss])

    alone = jax.jit(one)
    together = jax.jit(jax.vmap(one, (None, None, None, None, 0)))
    mapped = jax.jit(lambda p, s, x, y, policies: jax.lax.map(lambda q: one(p, s, x, y, q), policies))
    arguments = model.params, model.state, task.images, task.labels
    few = task.policies[:side_by_side]
    return {
        "Python loop over a jitted function": (
            lambda: jnp.stack([alone(*arguments, policy) for policy in task.policies]),
            len(task.policies),
        ),
        f"naive vmap of {len(few)}": (lambda: together(*arguments, few), len(few)),
        "lax.map": (lambda: mapped(*arguments, task.policies), len(task.policies)),
    }


def scored(task: ScoringTask, plan: sculpt.EvaluationPlan) -> Callable[[], jax.Array]:
    """`evaluate_policies` with this plan."""

    def run() -> jax.Array:
        scores = sculpt.evaluate_policies(
            task.model, task.space, task.policies, task.images, task.labels, plan=plan
        )
        return jnp.stack([scores.accuracy, scores.loss], axis=1)

    return run


def compiled_cost(task: ScoringTask, plan: sculpt.EvaluationPlan) -> tuple[float, float]:
    """(seconds to trace and compile, MiB of temporary arrays on a device)."""
    problem = make_problem(task.model, task.space, task.images, task.labels, plan=plan)
    jax.clear_caches()
    begun = time.perf_counter()
    compiled = score_compiled.lower(problem, plan.place(task.policies), plan.place(jnp.int32(1))).compile()
    took = time.perf_counter() - begun
    analysis = compiled.memory_analysis()
    return took, float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**20


def check_scores(
    task: ScoringTask, name: str, found: Any, expected: Any, precision: str
) -> tuple[float, float]:
    """Largest differences in images and in loss; ends the program where they are more than rounding."""
    found, expected = np.asarray(found), np.asarray(expected)[: len(found)]
    images = float(np.abs(found[:, 0] - expected[:, 0]).max()) * len(task.images)
    loss = float((np.abs(found[:, 1] - expected[:, 1]) / np.maximum(1, np.abs(expected[:, 1]))).max())
    if precision == "float32" and (images > 1.01 or loss > 1e-4):
        sys.exit(f"{task.name}, {name}: scores differ by {images:.0f} images and {loss:.1e} in loss")
    return images, loss


def compare(task: ScoringTask, options: argparse.Namespace) -> list[str]:
    """The table of one network."""
    tuned = sculpt.tune_plan(task.model, task.space, task.images, task.labels, precision=options.precision)
    plan = tuned.plan
    others = rivals(task, options.vmap)
    dtype = "float32" if options.precision == "float32" else "bfloat16"
    multiply, flop = matmul_runs(dtype, plan.devices)
    runs = {name: run for name, (run, _) in others.items()} | {"evaluate_policies": scored(task, plan)}
    count = {name: n for name, (_, n) in others.items()} | {"evaluate_policies": len(task.policies)}
    first = {name: jax.block_until_ready(run()) for name, run in runs.items()}
    reference = first["Python loop over a jitted function"]
    off = {
        name: check_scores(task, name, found, reference, options.precision) for name, found in first.items()
    }
    seconds(multiply)
    times = interleaved(runs | {"peak": multiply}, options.repeats)
    peak = flop / min(times.pop("peak")) / 1e9
    rates = {name: [count[name] / s for s in values] for name, values in times.items()}
    took, memory = compiled_cost(task, plan)
    lines = [
        f"## {task.name}, {len(task.policies)} policies, {len(task.images)} images",
        "",
        f"Tuned plan: {plan.describe()}; compiled in {took:.1f} s; temporary arrays {memory:.0f} MiB a device.",
        f"Peak of a {dtype} matrix product in the same run: {peak:.0f} GFLOP/s; "
        f"one policy is {task.gflop:.1f} GFLOP (dense).",
        "",
        "| | policies per second | share of peak | evaluate_policies is faster by | largest difference: images, loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in rates.items():
        ratios = [b / a for a, b in zip(values, rates["evaluate_policies"])]
        share = statistics.median(values) * task.gflop / peak
        lines.append(
            f"| {name} | {spread(values)} | {share:.0%} | {spread(ratios)} | {off[name][0]:.0f}, {off[name][1]:.1e} |"
        )
    lines += ["", "Tried while tuning:", "", *(f"    {line.strip()}" for line in tuned.describe()[2:]), ""]
    return lines


def sweep(task: ScoringTask, options: argparse.Namespace) -> list[str]:
    """Rates over chunk and batch sizes and both convolutions."""
    plans = [
        sculpt.EvaluationPlan(chunk, batch, convolution, options.precision)  # type: ignore[arg-type]
        for convolution in ("lax", "im2col")
        for chunk in options.chunks
        for batch in options.batches
        if batch <= len(task.images)
    ]
    few = dataclasses.replace(task, policies=task.policies[: max(options.chunks)])
    runs = {plan.describe(): scored(few, plan) for plan in plans}
    for run in runs.values():
        seconds(run)
    times = interleaved(runs, options.repeats)
    lines = ["| plan | policies per second |", "| --- | --- |"]
    lines += [f"| {name} | {spread([len(few.policies) / s for s in v])} |" for name, v in times.items()]
    return [f"### {task.name}: chunk and batch sizes", "", *lines, ""]


def growth(task: ScoringTask, options: argparse.Namespace) -> list[str]:
    """Seconds over the number of policies: linear, with the same memory."""
    plan = sculpt.EvaluationPlan()
    lines = [
        "| policies | seconds | seconds per policy | temporary arrays MiB |",
        "| --- | --- | --- | --- |",
    ]
    for number in options.growth:
        more = dataclasses.replace(
            task, policies=sculpt.random_policies(task.space, jax.random.key(3), number, options.budget)
        )
        run = scored(more, plan)
        jax.block_until_ready(run())
        begun = time.perf_counter()
        jax.block_until_ready(run())
        took = time.perf_counter() - begun
        lines.append(f"| {number} | {took:.1f} | {took / number:.4f} | {compiled_cost(more, plan)[1]:.1f} |")
        print(lines[-1], flush=True)
    return [f"### {task.name}, {len(task.images)} images: number of policies", "", *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=["resnet20"], choices=list(NETS))
    parser.add_argument("--policies", type=int, default=64)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--vmap", type=int, default=4, help="policies of the naive vmap")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 512])
    parser.add_argument("--growth", type=int, nargs="+", default=[], help="numbers of policies to time")
    parser.add_argument("--name", default="bench_evaluate", help="of the file of results")
    options = parser.parse_args()
    median = f"Median of {options.repeats} runs (lowest to highest)."
    runs = "One run each, after one that compiles." if options.growth else median
    lines = [
        "# Scoring many policies",
        "",
        *provenance(),
        f"{runs} Weights, images and policies drawn by seeds 0 to 3.",
        "",
    ]
    for name in options.nets:
        task = make_task(name, options.policies, options.images, options.budget)
        lines += growth(task, options) if options.growth else compare(task, options)
        if options.sweep:
            lines += sweep(task, options)
        write_results(options.name, lines)


if __name__ == "__main__":
    main()

"""Policies per second of `evaluate_policies` beside a plain Python loop over one jitted masked evaluation.

    python -m benchmarks.evaluate_policies --weights DATA/weights/cifar10_resnet20.safetensors

Both score the same policies on the same images, without recalibration; the scores must agree. Runs alternate, each is
preceded by a warm-up, and medians are reported with the spread, since shared machines are noisy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from sculpt.deploy.environment import device_name, versions


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run, its results waited for."""
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, help="cifar10_resnet20.safetensors; random weights without it"
    )
    parser.add_argument("--policies", type=int, default=64)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.5)
    options = parser.parse_args()
    if options.weights:
        module, variables = sculpt.nets.load("resnet20", options.weights, num_classes=10)
    else:
        module = sculpt.nets.create("resnet20", num_classes=10)
        variables = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    model = sculpt.from_linen(module, variables)
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 32, 32, 3))))
    policies = sculpt.random_policies(space, jax.random.key(0), options.policies, options.budget)
    images = jax.random.normal(jax.random.key(1), (options.images, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(2), (options.images,), 0, 10)

    @jax.jit
    def masked_evaluation(
        params: object, state: object, images: jax.Array, labels: jax.Array, policy: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        masks = sculpt.make_masks(space, params, policy)
        masked = jax.tree.map(lambda w, m: w * m.astype(w.dtype), params, masks)
        logs = jax.nn.log_softmax(model.apply(masked, state, images))
        loss = -jnp.take_along_axis(logs, labels[:, None], axis=1).mean()
        return (jnp.argmax(logs, axis=1).astype(jnp.int32) == labels).mean(), loss

    def loop() -> list[tuple[jax.Array, jax.Array]]:
        return [masked_evaluation(model.params, model.state, images, labels, p) for p in policies]

    def batched() -> sculpt.Scores:
        return sculpt.evaluate_policies(model, space, policies, images, labels)

    by_loop, scores = loop(), batched()
    accuracy, loss = (np.asarray([float(row[i]) for row in by_loop]) for i in range(2))
    off_accuracy = float(np.abs(accuracy - np.asarray(scores.accuracy)).max()) * options.images
    off_loss = float(np.abs(loss - np.asarray(scores.loss)).max())
    times: dict[str, list[float]] = {"loop": [], "batched": []}
    for _ in range(options.repeats):
        times["loop"].append(seconds(loop))
        times["batched"].append(seconds(batched))
    rate = {name: [options.policies / s for s in values] for name, values in times.items()}
    ratios = [b / a for a, b in zip(rate["loop"], rate["batched"])]

    def row(name: str, values: list[float]) -> str:
        return f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |"

    lines = [
        f"# ResNet-20, {options.policies} policies, {options.images} images",
        "",
        "Command: `python -m benchmarks.evaluate_policies`"
        + (f" with weights {options.weights.name}" if options.weights else ""),
        f"Measured, {options.repeats} alternating runs, seed 0. Device: {device_name()}, {versions()}",
        f"Largest difference of scores: {off_accuracy:.0f} images of {options.images}, loss {off_loss:.1e}.",
        "",
        "| | policies per second, median | spread |",
        "| --- | --- | --- |",
        row(f"Python loop over one jitted masked evaluation, batch {options.images}", rate["loop"]),
        row("evaluate_policies", rate["batched"]),
        row("ratio", ratios),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    target = Path("benchmarks/results/evaluate_policies.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


if __name__ == "__main__":
    main()

"""Latency of dense networks and of what compaction leaves of them, in XLA, onnxruntime, OpenVINO and LiteRT.

    taskset -c 1 python -m benchmarks.bench_engines --data DATA

ResNet-20 and ResNet-56 (CIFAR-10 weights) lose about half of their multiply-accumulates, by channels, by multiples of 8 channels or by
smaller windows of all kernels; ResNet-18 (weights drawn at random) has filters of four or of two kinds of window; ViT-Ti (likewise)
loses half of every MLP and one head of three. None is fine-tuned: only time is measured here. Dense and compact networks alternate; what
an engine computes is compared with the model before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.tasks import compacted
from benchmarks.timing import provenance, write_results
from sculpt.latency.engines import ENGINES, engine_of
from sculpt.model import Model
from sculpt.pruning.space import Space

BATCHES = (1, 32)

GROUPED = {"3/6": "two rows, two columns, a row or a column", "2/6": "a row or a column"}
"""Options of `rect_grouped`, and the windows that they leave to filters of 3x3."""

Case = tuple[str, Model, Model, jax.ShapeDtypeStruct]
"""A title, the dense network, the compact one, and an image."""


def cases(data: Path) -> Iterator[Case]:
    """The networks, made one after the other."""
    for name, depth in (("resnet20", 20), ("resnet56", 56)):
        for family, round_to, words in (
            ("channels", 1, "the same share of every group of channels"),
            ("channels", 8, "the same in multiples of 8 channels"),
            ("rect", 1, "the same smaller window in every kernel"),
        ):
            dense, small, image = cifar_resnet(data / "weights", name, family, round_to)
            yield f"ResNet-{depth}, 32x32, {words} (uniform policy, budget 0.5)", dense, small, image
    for label, words in GROUPED.items():
        yield f"ResNet-18, 224x224, 3x3 filters of {words} (rect_grouped, {label})", *grouped_resnet(label)
    yield "ViT-Ti/16, 224x224, half of every MLP and one head of three removed", *vit_tiny()


def cifar_resnet(
    weights: Path, name: str, family: str, round_to: int
) -> tuple[Model, Model, jax.ShapeDtypeStruct]:
    """Dense and compact: every site keeps the same share, half of the multiply-accumulates altogether at the most."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = sculpt.from_linen(*sculpt.nets.load(name, weights / f"cifar10_{name}.safetensors", 10))
    space = sculpt.make_space(sculpt.trace(model, image), (family,), round_to)
    return model, compacted(model, space, np.asarray(sculpt.uniform_policy(space, 0.5))), image


def grouped_resnet(label: str) -> tuple[Model, Model, jax.ShapeDtypeStruct]:
    """Dense and compact: an option of `rect_grouped` for every 3x3 convolution."""
    model, image = drawn("resnet18")
    space = sculpt.make_space(sculpt.trace(model, image), ("rect_grouped",))
    return model, compacted(model, space, same_option(space, label)), image


def same_option(space: Space, label: str) -> np.ndarray:
    """The policy that chooses it at every site."""
    option = [option.label for option in space.sites[0].options].index(label)
    return np.full(space.num_sites, option, np.int32)


def vit_tiny() -> tuple[Model, Model, jax.ShapeDtypeStruct]:
    """Dense and compact: every MLP keeps half of its units, every attention two of three heads; the rest stays."""
    model, image = drawn("vit_tiny_patch16")
    space = sculpt.make_space(sculpt.trace(model, image), ("channels",))
    kept = {3: 2, 768: 384}
    policy = np.zeros(space.num_sites, np.int32)
    for site in space.sites:
        wanted = kept.get(site.options[0].counts[0])
        if wanted is not None:
            policy[site.index] = next(
                i for i, option in enumerate(site.options) if option.counts[0] == wanted
            )
    return model, compacted(model, space, policy), image


def drawn(name: str) -> tuple[Model, jax.ShapeDtypeStruct]:
    """A network for ImageNet with weights drawn at random, and its image."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    module = sculpt.nets.create(name, 1000)
    return sculpt.from_linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros(image.shape))), image


def rows_of(models: Mapping[str, Model], image: jax.ShapeDtypeStruct, engine: str, repeats: int) -> list[str]:
    """A row for each batch size."""
    rows = []
    for batch in BATCHES:
        x = np.asarray(jax.random.normal(jax.random.key(1), (batch, *image.shape[1:])))
        found = sculpt.compare_latency(models, x, repeats, engine=engine, threads=1)
        dense, compact = found["dense"], found["compact"]
        ratio = dense.median / compact.median
        texts = [
            f"{1e3 * latency.median:.2f} ({1e3 * latency.spread[0]:.2f} to {1e3 * latency.spread[1]:.2f})"
            for latency in (dense, compact)
        ]
        version = dense.versions[engine_of(engine).package]
        slower = ", slower" if ratio < 1 else ""
        rows.append(f"| {engine} {version} | {batch} | {texts[0]} | {texts[1]} | {ratio:.2f}{slower} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="holds weights/")
    parser.add_argument(
        "--engines", default=",".join(ENGINES), help="with commas; those not installed are left out"
    )
    parser.add_argument("--repeats", type=int, default=51, help="samples of each network")
    parser.add_argument("--note", default="", help="a line about the machine, such as what else ran on it")
    options = parser.parse_args()
    absent = []
    lines = [
        "# Latency in engines",
        "",
        *provenance(),
        *([options.note] if options.note else []),
        f"Milliseconds per call, one thread, float32: median of {options.repeats} samples (first to third quartile), dense and compact in turn.",
        "Policies are not searched and nothing is fine-tuned: these tables are about time alone.",
    ]
    for title, model, small, image in cases(options.data):
        macs = [sculpt.count_cost(m, image)[0] for m in (model, small)]
        lines += [
            "",
            f"## {title}",
            "",
            f"Multiply-accumulates per image, realised: {macs[0]:,} dense, {macs[1]:,} compact ({macs[1] / macs[0]:.3f}).",
            "",
            "| engine | batch | dense | compact | dense / compact |",
            "| --- | --- | --- | --- | --- |",
        ]
        for engine in options.engines.split(","):
            try:
                engine_of(engine)
            except ValueError as error:
                absent.append(f"{engine}: {error}")
                continue
            lines += rows_of({"dense": model, "compact": small}, image, engine, options.repeats)
        jax.clear_caches()
    if absent:
        lines += ["", *(f"Not measured: {reason}." for reason in dict.fromkeys(absent))]
    write_results("bench_engines", lines)


if __name__ == "__main__":
    main()

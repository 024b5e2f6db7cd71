"""What the order of channels is worth for n:m patterns, without any training.

    python -m benchmarks.bench_permutation --data DATA

ResNet-20 and ResNet-56 (CIFAR-10 weights) get one n:m pattern in every layer that takes it, their channels in the order they came in and
in that of `permute_channels`. Tested on lossless images: as masked, with BatchNorm recalibrated on 512 lossless train images, and with its
layers reconstructed on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.timing import provenance, write_results
from sculpt.model import Model
from sculpt.pruning.space import Space, make_choices

PATTERNS = ((2, 4), (1, 4))
CALIBRATION_IMAGES = 512


def images_of(file: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images as the network expects them, and labels."""
    with np.load(file, allow_pickle=False) as arrays:
        return sculpt.nets.preprocess(name, arrays["images"]), arrays["labels"]


def results(
    model: Model, space: Space, label: str, images: np.ndarray, labels: np.ndarray, calibration: np.ndarray
) -> list[float]:
    """Mean share of a kernel's energy that stays, and accuracies in percent: as masked, recalibrated, reconstructed."""
    policy = [[option.label for option in site.options].index(label) for site in space.sites]
    choices = make_choices(space, model.params)
    retained = np.mean([choices[site.index].retained[policy[site.index]] for site in space.sites])
    masks = sculpt.make_masks(space, model.params, policy)
    masked = sculpt.apply_masks(model, masks)
    networks = (
        masked,
        sculpt.recalibrate(masked, calibration),
        sculpt.reconstruct(model, masks, calibration),
    )
    return [
        float(retained),
        *(100 * float(sculpt.evaluate(network, images, labels).accuracy) for network in networks),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="holds cifar10/ and weights/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="keys of the permutations")
    options = parser.parse_args()
    lines = [
        "# Channels in an order for n:m",
        "",
        *provenance(),
        f"First 1,000 lossless test images of CIFAR-10; keys {', '.join(map(str, options.seeds))}, apart by /. Nothing is trained.",
        "",
        "| network | pattern | order | energy kept | accuracy, masked | accuracy, recalibrated | accuracy, reconstructed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    folder = options.data / "cifar10"
    for name in ("resnet20", "resnet56"):
        model = sculpt.from_linen(
            *sculpt.nets.load(name, options.data / "weights" / f"cifar10_{name}.safetensors", 10)
        )
        trace = sculpt.trace(model, jnp.zeros((1, 32, 32, 3)))
        space = sculpt.make_space(trace, ("nm",))
        test = images_of(folder / "test_lossless_first1000.npz", name)
        train, _ = images_of(folder / "train_lossless_first4000.npz", name)
        for pattern in PATTERNS:
            label = f"{pattern[0]}:{pattern[1]}"
            permuted = [
                sculpt.permute_channels(model, trace, jax.random.key(seed), pattern=pattern)
                for seed in options.seeds
            ]
            for order, networks in (("as given", [model]), ("permuted", permuted)):
                found = [results(m, space, label, *test, train[:CALIBRATION_IMAGES]) for m in networks]
                columns = [
                    " / ".join(f"{row[place]:.{digits}f}" for row in found)
                    for place, digits in ((0, 4), (1, 1), (2, 1), (3, 1))
                ]
                lines.append(f"| {name} | {label} | {order} | {' | '.join(columns)} |")
    write_results("bench_permutation", lines)


if __name__ == "__main__":
    main()

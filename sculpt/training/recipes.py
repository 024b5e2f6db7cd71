"""Training recipes for kinds of networks, with their sources."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from sculpt.arguments import is_whole
from sculpt.training.config import FinetuneConfig

LARGE_IMAGES = 96
"""Side, in pixels, from which on images are treated as photographs are (ImageNet) and not as thumbnails (CIFAR)."""
_BATCH_SIZE = 64
_FINETUNE_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one kind of network, and their source.

    The schedule is always a linear warm-up and half a cosine (arXiv 1608.03983), whatever the source steps by. The peak learning
    rate is scaled with the batch (arXiv 1706.02677, section 2.1).
    """

    name: str
    source: str
    """Where the settings are from, and what differs."""
    config: FinetuneConfig
    """Training from scratch as the source has it, or as it says that it differs."""

    def train(self, **changes: Any) -> FinetuneConfig:
        """Training from scratch: batches of 64 unless told otherwise, the peak learning rate scaled from the published batch.

        Args:
          **changes: fields of `FinetuneConfig` in place of the recipe's; `learning_rate` is taken as it is.

        Raises:
          ValueError: for values that `FinetuneConfig` refuses.
        """
        batch = changes.get("batch_size", _BATCH_SIZE)
        # What is no number is refused by the configuration itself.
        scale = batch / self.config.batch_size if is_whole(batch, 1) else 1.0
        own = {"batch_size": batch, "learning_rate": self.config.learning_rate * scale}
        return dataclasses.replace(self.config, **{**own, **changes})

    def finetune(self, **changes: Any) -> FinetuneConfig:
        """Fine-tuning after pruning: as `train`, at 0.3 of its peak and without mixing images, for few epochs (15).

        These differences are this library's, not the source's. `changes` and errors as for `train`.
        """
        peak = _FINETUNE_SHARE * self.train(**changes).learning_rate
        own = {"learning_rate": peak, "epochs": 15, "mixup": 0.0, "cutmix": 0.0}
        return self.train(**{**own, **changes})


_RECIPES = (
    Recipe(
        "residual",
        "Wide Residual Networks, arXiv 1605.07146, section 3: SGD with Nesterov momentum, 200 epochs on CIFAR; warm-up is ours.",
        FinetuneConfig(
            epochs=200, batch_size=128, learning_rate=0.1, nesterov=True, weight_decay=5e-4, warmup=0.025
        ),
    ),
    Recipe(
        "plain",
        "Network Slimming, arXiv 1708.06519, section 4.2: SGD with Nesterov momentum, 160 epochs on CIFAR; warm-up is ours.",
        FinetuneConfig(
            epochs=160, batch_size=64, learning_rate=0.1, nesterov=True, weight_decay=1e-4, warmup=0.05
        ),
    ),
    Recipe(
        "photographs",
        "Accurate, Large Minibatch SGD, arXiv 1706.02677, section 5.1: SGD with Nesterov momentum, 5 of 90 epochs of warm-up.",
        FinetuneConfig(
            epochs=90,
            batch_size=256,
            learning_rate=0.1,
            nesterov=True,
            weight_decay=1e-4,
            warmup=5 / 90,
            augment="resized_crop",
        ),
    ),
    Recipe(
        "mobile",
        "MobileNetV2, arXiv 1801.04381, section 6.1, for weight decay; label smoothing, 5 epochs of warm-up and half a cosine of Bag "
        "of Tricks, arXiv 1812.01187; SGD with Nesterov momentum in place of RMSProp, hence a peak and a length of our own.",
        FinetuneConfig(
            epochs=150,
            batch_size=256,
            learning_rate=0.1,
            nesterov=True,
            weight_decay=4e-5,
            warmup=5 / 150,
            label_smoothing=0.1,
            augment="resized_crop",
        ),
    ),
    Recipe(
        "transformer",
        "DeiT, arXiv 2012.12877, table 9: AdamW, a peak of 5e-4 for every 512 images, 5 of 300 epochs of warm-up, RandAugment, mixup, "
        "cutmix; without random erasing, repeated augmentation and stochastic depth.",
        FinetuneConfig(
            epochs=300,
            batch_size=1024,
            learning_rate=1e-3,
            optimizer="adamw",
            weight_decay=0.05,
            warmup=5 / 300,
            label_smoothing=0.1,
            augment="resized_crop",
            rand_augment=2,
            mixup=0.8,
            cutmix=1.0,
        ),
    ),
    Recipe(
        "small_transformer",
        "DeiT, arXiv 2012.12877, table 9, without what mixes or distorts images; peak, batch and length are ours.",
        FinetuneConfig(
            epochs=100,
            batch_size=128,
            learning_rate=1e-3,
            optimizer="adamw",
            weight_decay=0.05,
            warmup=0.1,
            label_smoothing=0.1,
        ),
    ),
)
RECIPES = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})
"""Name -> recipe."""

_OF_FAMILY = {
    "efficientnet": ("mobile", "mobile"),
    "mlperf": ("residual", "residual"),
    "mobilenet": ("mobile", "mobile"),
    "mobilenet_v3": ("mobile", "mobile"),
    "resnet": ("residual", "photographs"),
    "vgg": ("plain", "photographs"),
    "vit": ("small_transformer", "transformer"),
}
"""Family of `nets` -> names of its recipes for small images and for large ones."""


def recipe_for(family: str, side: int) -> Recipe:
    """The recipe of a family of networks for images of a size.

    Args:
      family: as `sculpt.nets.family` tells it of a network's name.
      side: of the images, in pixels.

    Raises:
      ValueError: for an unknown family.
    """
    if family not in _OF_FAMILY:
        raise ValueError(
            f"no recipe for {family!r}, expected one of {', '.join(_OF_FAMILY)}: sculpt.nets.family(name) tells that of a network"
        )
    return RECIPES[_OF_FAMILY[family][side >= LARGE_IMAGES]]

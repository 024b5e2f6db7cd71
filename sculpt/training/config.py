"""Settings of training and fine-tuning: `FinetuneConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from sculpt.arguments import checked_fields, is_real, is_whole, without_numpy
from sculpt.ir.lowering import Precision

Optimizer = Literal["sgd", "adamw"]
Augment = Literal["none", "shift", "crop_flip", "resized_crop"]
_SHARE: tuple[str, Callable[[float], bool]] = ("in [0, 1)", lambda value: 0 <= value < 1)
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("learning_rate", "above 0", lambda value: value > 0),
    ("weight_decay", "0 or more", lambda value: value >= 0),
    ("warmup", *_SHARE),
    ("momentum", *_SHARE),
    ("label_smoothing", *_SHARE),
    ("ema", *_SHARE),
    ("gradual", *_SHARE),
    ("distillation", "in [0, 1]", lambda value: 0 <= value <= 1),
    ("feature_match", "0 or more", lambda value: value >= 0),
    ("temperature", "above 0", lambda value: value > 0),
    ("mixup", "0 or more", lambda value: value >= 0),
    ("cutmix", "0 or more", lambda value: value >= 0),
)


@checked_fields
@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune` and `train`.

    Raises:
      ValueError: at construction, for a value out of range or a field that the others would leave without effect.
    """

    epochs: int = 5
    """Passes over the train split; what does not fill a batch is left out, another remainder each time."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 0.01
    """The peak of the schedule: linear warm-up, then half a cosine down to zero."""
    warmup: float = 0.05
    """Share of all steps spent warming up, in [0, 1)."""
    optimizer: Optimizer = "sgd"
    """"sgd" (with momentum) or "adamw" (Loshchilov and Hutter, arXiv 1711.05101)."""
    momentum: float = 0.9
    """Momentum of SGD, or the first beta of AdamW, in [0, 1)."""
    nesterov: bool = False
    """Look-ahead momentum (Nesterov); with "adamw" this is NAdamW. Needs `momentum` above 0."""
    weight_decay: float = 5e-4
    """Decay of kernels and other weights of rank 2 and above: L2 for "sgd", decoupled for "adamw". Norm scales, biases,
    position embeddings and class tokens are spared."""
    clip_norm: float | None = None
    """Gradients with a larger global norm are scaled down to this; None: never."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes, in [0, 1)."""
    gradual: float = 0.0
    """Share of the steps, in [0, 1), over which pruned weights fade to zero (cubic, arXiv 1710.01878), still learning, instead of
    being zero at once; the best epoch is one of those after. Needs masks, and a model whose weights there are not zero yet."""
    distillation: float = 0.0
    """Share of the loss, in [0, 1], that is the divergence from a teacher's predictions instead of from the labels; 0: no teacher."""
    temperature: float = 4.0
    """What the logits of teacher and student are divided by, above 0, before they are compared; needs `distillation`."""
    feature_match: float = 0.0
    """Weight in the loss of how far the results of convolutions and matrix products are from the teacher's (FitNets, arXiv
    1412.6550), who is a network of the same layers; 0: not compared."""
    augment: Augment = "none"
    """"none"; "shift": up to one pixel, zero padding (digits); "crop_flip": pad 4, random crop, mirror (CIFAR); "resized_crop": a
    random part brought back to full size, mirror (ImageNet)."""
    rand_augment: int = 0
    """Operations of RandAugment (arXiv 1909.13719) on each image, after `augment`."""
    mixup: float = 0.0
    """Parameter of the Beta distribution that images and labels are blended by (arXiv 1710.09412); 0: never."""
    cutmix: float = 0.0
    """That of the areas that are cut out of one image and pasted into another (arXiv 1905.04899); 0: never. With `mixup` a coin
    decides for each batch."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, their gradients averaged: less memory. It divides `batch_size`;
    BatchNorm sees the parts."""
    remat: bool = False
    """Whether the backward pass computes activations again instead of keeping them, save those of convolutions and matrix
    products (`jax.checkpoint`). For accelerators; XLA for CPUs may undo it."""
    precision: Precision = "float32"
    """What convolutions and matrix products multiply in; weights and everything else stay in float32."""
    ema: float = 0.0
    """Decay of a moving average of weights and statistics, in [0, 1); what is validated and returned. 0: no average."""
    max_steps: int | None = None
    """Stop after so many steps, should the epochs be more; the schedule ends there too."""
    select_best: bool = True
    """Return the epoch of the best validation accuracy (the earliest of equals); False: the last."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints, besides those at the end of every epoch; None: only those."""
    steps_per_call: int | None = None
    """Steps in one compiled loop. None: 1 on CPU, where XLA does not optimise the gradients of convolutions inside a loop,
    and 50 on accelerators."""

    def __post_init__(self) -> None:
        without_numpy(self)
        required = ("epochs", "batch_size", "accumulate")
        for name in (*required, "max_steps", "checkpoint_every", "steps_per_call"):
            value = getattr(self, name)
            fits = is_whole(value, 1) or (name not in required and value is None)
            self._require(fits, name, "a whole number of at least 1", value)
        self._require(
            is_whole(self.rand_augment, 0), "rand_augment", "a whole number of at least 0", self.rand_augment
        )
        self._require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            f"a divisor of batch_size {self.batch_size}",
            self.accumulate,
        )
        for name, expected, fits in _RANGES:
            value = getattr(self, name)
            self._require(is_real(value) and fits(value), name, expected, value)
        clip = self.clip_norm
        self._require(clip is None or (is_real(clip) and clip > 0), "clip_norm", "above 0, or None", clip)
        for name, choices in (
            ("optimizer", get_args(Optimizer)),
            ("augment", get_args(Augment)),
            ("precision", get_args(Precision)),
        ):
            value = getattr(self, name)
            self._require(value in choices, name, "one of " + ", ".join(choices), value)
        for name in ("nesterov", "select_best", "remat"):
            self._require(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        self._require(
            self.momentum > 0 or not self.nesterov, "nesterov", "False where momentum is 0", self.nesterov
        )
        self._require(
            self.distillation > 0 or self.temperature == 4.0,
            "temperature",
            "left alone where distillation is 0",
            self.temperature,
        )

    def steps(self, images: int) -> int:
        """Steps in all, with so many images to train on."""
        steps = images // self.batch_size * self.epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a teacher to follow."""
        return self.distillation > 0 or self.feature_match > 0

    def _require(self, condition: bool, name: str, expected: str, value: Any) -> None:
        if not condition:
            raise ValueError(f"FinetuneConfig.{name} must be {expected}, got {value!r}")

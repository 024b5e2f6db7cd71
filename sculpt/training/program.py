"""The static part of a training run: forward pass, schedule, optimizer, and when masks take effect."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sculpt.data.splits import Splits
from sculpt.data.stream import StreamedImages
from sculpt.ir.lowering import lowered
from sculpt.ir.program import CONTRACTIONS
from sculpt.model import ApplyFn, Model, Params, State, TrainFn
from sculpt.pruning.masks import mask_params
from sculpt.task import Task
from sculpt.training.config import FinetuneConfig
from sculpt.training.features import Features, with_features
from sculpt.trees import leaf_paths


@dataclasses.dataclass(frozen=True)
class TrainProgram:
    """The static half of a training run. Compares by value: equal runs share compiled code, whatever their masks."""

    apply_train: TrainFn
    task: Task
    config: FinetuneConfig
    steps_per_epoch: int
    total_steps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher: ApplyFn | None = None
    """Evaluates the teacher; None: there is none."""
    devices: int = 1
    """How many share the images of a step."""
    stacked: bool = False
    """Whether several networks train side by side on the same batches (vmap): all arrays of `TrainState` but its step, and the
    masks, then have an axis more, the first."""
    streamed: bool = False
    """Whether the host brings the images of every step, instead of all lying on the device."""

    def forward(self) -> Callable[..., tuple[tuple[jax.Array, State], Features]]:
        """The network in training mode, `-> ((logits, state), features)`, in the precision and with the memory that the
        configuration asks for; features only where they are matched."""
        apply = self.apply_train
        apply = with_features(apply) if self.config.feature_match else functools.partial(_featureless, apply)
        apply = lowered(apply, precision=self.config.precision)
        return jax.checkpoint(apply, policy=_keep_products) if self.config.remat else apply

    def learning_rate(self, step: Any) -> jax.Array:
        """float32: linear warm-up to the peak, then half a cosine to zero at `total_steps`."""
        warm = min(round(self.config.warmup * self.total_steps), self.total_steps - 1)
        # optax's own schedules do not pass strict dtype promotion.
        now = jnp.asarray(step, jnp.float32)
        decayed = jnp.clip((now - warm) / (self.total_steps - warm), 0.0, 1.0)
        return self.config.learning_rate * jnp.minimum(
            (now + 1) / (warm + 1), (1 + jnp.cos(jnp.pi * decayed)) / 2
        )

    @property
    def fade_steps(self) -> int:
        """Steps in which what is pruned fades; at least one is left to train with the masks in force."""
        return min(math.ceil(self.config.gradual * self.total_steps), self.total_steps - 1)

    def pruned(self, tree: Any, masks: Any, step: jax.Array) -> Any:
        """`tree`, of the structure of the parameters, after so many steps: zero where masks are False, unless that still fades."""
        if self.fade_steps:
            masks = jax.tree.map(lambda mask: mask | (step < self.fade_steps), masks)
        return mask_params(tree, masks)

    def faded(self, params: Params, masks: Any, step: jax.Array) -> Params:
        """Weights of the step with this number, pruned ones multiplied by `f(step + 1) / f(step)`; exact zeros at the end.

        `f(t) = (1 - t / n)^3` over n steps is the share left of the cubic schedule of Zhu and Gupta (To prune, or not to prune,
        arXiv 1710.01878, equation 1), whose share pruned is `1 - f`.
        """
        if not self.fade_steps:
            return mask_params(params, masks)
        left = jnp.maximum(self.fade_steps - step, 1).astype(jnp.float32)
        share = ((left - 1) / left) ** 3
        fading = jax.tree.map(lambda w, mask: jnp.where(mask, w, share.astype(w.dtype) * w), params, masks)
        return self.pruned(fading, masks, step + 1)

    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain of this configuration."""
        config = self.config
        chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
        decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
        if config.optimizer == "sgd":
            momentum = optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
            chain += [decay, momentum]
        else:
            chain += [optax.scale_by_adam(b1=config.momentum, nesterov=config.nesterov), decay]
        return optax.chain(*chain, optax.scale_by_learning_rate(self.learning_rate))


def decayed(params: Params) -> Any:
    """Booleans like the parameters: what weight decay shrinks.

    Spared are vectors (norms, biases), arrays named "bias" (those of attention are `[heads, width]`), and arrays `[1, n, width]`
    that are no kernel: position embeddings and class tokens, as DeiT spares them (arXiv 2012.12877).
    """

    def shrinks(path: str, shape: tuple[int, ...]) -> bool:
        name = path.rpartition("/")[2]
        token = len(shape) == 3 and shape[0] == 1 and name != "kernel"
        return len(shape) >= 2 and name != "bias" and not token

    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(map(shrinks, leaf_paths(params), map(jnp.shape, leaves)))


def _featureless(apply: TrainFn, *arguments: Any) -> tuple[tuple[jax.Array, State], Features]:
    return apply(*arguments), ()


def _keep_products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in CONTRACTIONS


def make_program(
    model: Model,
    splits: Splits,
    config: FinetuneConfig,
    teacher: ApplyFn | None = None,
    devices: int = 1,
    stacked: bool = False,
) -> TrainProgram:
    """The program that trains by `config` on `splits`, which hold a batch at least."""
    # What does not shape the compiled step is set to fixed values, so that more runs share it.
    shaping = dataclasses.replace(
        config, epochs=1, max_steps=None, select_best=True, checkpoint_every=None, steps_per_call=None
    )
    return TrainProgram(
        apply_train=model.apply_train,
        task=model.task,
        config=shaping,
        steps_per_epoch=len(splits.train.labels) // config.batch_size,
        total_steps=config.steps(len(splits.train.labels)),
        mean=tuple(map(float, splits.mean)),
        std=tuple(map(float, splits.std)),
        teacher=teacher,
        devices=devices,
        stacked=stacked,
        streamed=isinstance(splits.train.images, StreamedImages),
    )

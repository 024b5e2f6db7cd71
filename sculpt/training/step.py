"""One step of masked training, and the compiled loops around it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sculpt.model import ApplyFn, Params, State, TrainFn
from sculpt.pruning.masks import mask_params
from sculpt.scoring.lowering import lowered
from sculpt.tracing.trace import leaf_paths
from sculpt.training.batch import Batch, draw_batch
from sculpt.training.config import FinetuneConfig
from sculpt.training.data import Splits, normalise
from sculpt.training.devices import on_each, shared
from sculpt.training.features import Features, distance, with_features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes; what a checkpoint holds."""

    step: jax.Array
    """int32 scalar: steps done."""
    params: Params
    """Weights, exactly zero where masked; with `FinetuneConfig.gradual` from when they have faded, like the two fields below."""
    state: State
    """The network's other arrays: BatchNorm statistics and the like."""
    optimizer: Any
    """Optax state; its moments are zero where weights are masked."""
    average: Any
    """`(params, state)`, moving averages of both; None without."""
    loss: jax.Array
    """float32 scalar: sum of the losses of this epoch's steps."""
    right: jax.Array
    """float32 scalar: training images of this epoch classified correctly."""
    diverged: jax.Array
    """int32 scalar: the first step whose loss, weights or statistics were not finite; -1 if none so far."""

    @property
    def weights(self) -> tuple[Params, State]:
        """What is validated and returned."""
        return (self.params, self.state) if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Program:
    """The static half of a training run. Compares by value: equal runs share compiled code, whatever their masks."""

    apply_train: TrainFn
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
    return primitive.name in ("conv_general_dilated", "dot_general")


def make_program(
    apply_train: TrainFn,
    splits: Splits,
    config: FinetuneConfig,
    teacher: ApplyFn | None = None,
    devices: int = 1,
    stacked: bool = False,
) -> Program:
    """The program that trains by `config` on `splits`, which hold a batch at least."""
    steps_per_epoch = len(splits.train.labels) // config.batch_size
    total = steps_per_epoch * config.epochs
    # What does not shape the compiled step is set to fixed values, so that more runs share it.
    shaping = dataclasses.replace(
        config, epochs=1, max_steps=None, select_best=True, checkpoint_every=None, steps_per_call=None
    )
    return Program(
        apply_train=apply_train,
        config=shaping,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total, config.max_steps or total),
        mean=tuple(map(float, splits.mean)),
        std=tuple(map(float, splits.std)),
        teacher=teacher,
        devices=devices,
        stacked=stacked,
    )


_AXES: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(TrainState)}
_AXES["step"] = None
_STACKED = TrainState(**_AXES)
"""Axes of networks that train side by side."""


def start(program: Program, params: Params, state: State, masks: Any) -> TrainState:
    """The state before the first step; owns copies of all arrays, since steps overwrite theirs."""
    begin = functools.partial(_start, program, params, state)
    return jax.vmap(begin, out_axes=_STACKED)(masks) if program.stacked else begin(masks)


def _start(program: Program, params: Params, state: State, masks: Any) -> TrainState:
    params = params if masks is None else program.pruned(params, masks, jnp.int32(0))
    params, state = _copy((params, state))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        state=state,
        optimizer=_copy(program.optimizer().init(params)),
        average=_copy((params, state)) if program.config.ema else None,
        loss=jnp.float32(0),
        right=jnp.float32(0),
        diverged=jnp.int32(-1),
    )


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


@functools.partial(jax.jit, static_argnums=1)
def epoch_order(key: jax.Array, images: int, epoch: jax.Array) -> jax.Array:
    """int32 `[images]`: the order in which this epoch visits them."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), images)


def one_step(
    program: Program,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    key: jax.Array,
) -> TrainState:
    """`learn` on the step's rows, in the order of the epoch, of images and labels that are on the device."""
    rows = _rows(program, train.step, order)
    return learn(program, train, masks, teacher, images[rows], labels[rows], key)


def _rows(program: Program, step: jax.Array, order: jax.Array) -> jax.Array:
    """int32 `[batch]`: the examples of one step."""
    size = program.config.batch_size
    place = step % program.steps_per_epoch
    return shared(jax.lax.dynamic_slice_in_dim(order, place * size, size), program.devices)


def learn(
    program: Program,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> TrainState:
    """One step: mask in the forward pass, update, project (CORRECTNESS 1). Randomness from `key` and the step alone.

    Images are raw `[batch, ...]`, labels int32 `[batch]`; `teacher` is the teacher's `(params, state)`, or None.
    """
    config = program.config
    augment_key, model_key = jax.random.split(jax.random.fold_in(key, train.step))
    teach = None
    if program.teacher is not None and config.distillation:
        teach = functools.partial(lowered(program.teacher), *teacher)
    normalisation = program.mean, program.std
    batch = draw_batch(augment_key, images, labels, config, normalisation, teach)

    def objective(params: Params, state: State, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        used = params if masks is None else program.pruned(params, masks, train.step)
        (logits, new_state), features = program.forward()(used, state, batch.images, key)
        logits = logits.astype(jnp.float32)
        right = (jnp.argmax(logits, axis=1).astype(jnp.int32) == batch.labels).astype(jnp.float32).sum()
        loss = batch.loss(logits, config)
        if config.feature_match and program.teacher is not None:
            wanted = lowered(with_features(program.teacher))(*teacher, batch.images)[1]
            loss = loss + config.feature_match * distance(features, wanted)
        return loss, (right, new_state)

    loss, right, state = jnp.float32(0), jnp.float32(0), train.state
    gradients: Any = None
    # Unrolled: XLA does not optimise the gradients of convolutions inside a loop on CPUs.
    for number, part in enumerate(shared(batch.parts(config.accumulate), program.devices)):
        part_key = model_key if config.accumulate == 1 else jax.random.fold_in(model_key, number)
        (part_loss, (part_right, state)), found = jax.value_and_grad(objective, has_aux=True)(
            train.params, state, part, part_key
        )
        loss, right = loss + part_loss / config.accumulate, right + part_right
        gradients = found if gradients is None else jax.tree.map(jnp.add, gradients, found)
    if config.accumulate > 1:
        gradients = jax.tree.map(lambda g: g / config.accumulate, gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to an integer power
        updates, optimizer = program.optimizer().update(gradients, train.optimizer, train.params)
    params: Params = optax.apply_updates(train.params, updates)
    if masks is not None:
        params = program.faded(params, masks, train.step)
    sound = jnp.isfinite(loss) & _all_finite((params, state))
    average = None if train.average is None else _averaged(config.ema, train, (params, state))
    if masks is not None and program.fade_steps:
        # What the moments and the average remember of faded weights goes with them.
        forget = functools.partial(program.pruned, step=train.step + 1)
        optimizer = optax.tree.map_params(program.optimizer(), forget, optimizer, masks)
        average = average and (forget(average[0], masks), average[1])
    first = train.step % program.steps_per_epoch == 0
    new = TrainState(
        step=train.step + 1,
        params=params,
        state=state,
        optimizer=optimizer,
        average=average,
        loss=jnp.where(first, 0.0, train.loss) + loss,
        right=jnp.where(first, 0.0, train.right) + right,
        diverged=jnp.where(sound | (train.diverged >= 0), train.diverged, train.step),
    )
    return on_each(new, program.devices)


def _step(
    one: Callable[..., TrainState], program: Program, train: TrainState, masks: Any, *shared_by_all: Any
) -> TrainState:
    """`one_step` or `learn`, of several networks side by side where the program says so."""
    step = functools.partial(one, program)
    if program.stacked:
        step = jax.vmap(step, in_axes=(_STACKED, 0, *[None] * len(shared_by_all)), out_axes=_STACKED)
    return step(train, masks, *shared_by_all)


def _all_finite(tree: Any) -> jax.Array:
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floating]).all()


def _averaged(decay: float, train: TrainState, new: Any) -> Any:
    # A low decay at first, so that a short run is not stuck at its start.
    done = train.step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + done) / (10 + done))

    def mix(old: jax.Array, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return old + share.astype(leaf.dtype) * (leaf - old)

    return jax.tree.map(mix, train.average, new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_step(
    program: Program,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """`one_step`, compiled by itself: what CPUs want. Also returns `diverged` in a buffer that the next call leaves alone."""
    train = _step(one_step, program, train, masks, teacher, images, labels, order, key)
    return train, train.diverged


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_batch(
    program: Program,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    key: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """`learn`, compiled: a step on images `[batch, ...]` that the host brings; of the labels, which are all here, those in the order
    of the epoch. Returns what `run_step` does."""
    labels = labels[_rows(program, train.step, order)]
    train = _step(learn, program, train, masks, teacher, shared(images, program.devices), labels, key)
    return train, train.diverged


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_steps(
    program: Program,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    key: jax.Array,
    count: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """`count` steps (int32 scalar, traced) of one epoch in one compiled loop: what accelerators want."""
    train = jax.lax.fori_loop(
        0, count, lambda _, t: _step(one_step, program, t, masks, teacher, images, labels, order, key), train
    )
    return train, train.diverged


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def validate(
    apply: ApplyFn,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    stacked: bool,
    params: Params,
    state: State,
    images: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """Accuracy (float32 scalar; `[networks]` where they are stacked) on raw images `[batches, batch, ...]`; labels int32
    `[batches, batch]`, -1 for padding."""

    def accuracy(params: Params, state: State) -> jax.Array:
        def one_batch(total: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            logits = lowered(apply)(params, state, normalise(batch[0], *normalisation))
            return total + (jnp.argmax(logits, axis=1).astype(jnp.int32) == batch[1]).sum(
                dtype=jnp.int32
            ), None

        right, _ = jax.lax.scan(one_batch, jnp.int32(0), (images, labels))
        return right.astype(jnp.float32) / (labels >= 0).sum().astype(jnp.float32)

    return (jax.vmap(accuracy) if stacked else accuracy)(params, state)

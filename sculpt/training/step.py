"""One step of masked training, and the compiled loops around it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sculpt.data.splits import normalise
from sculpt.inputs import rows
from sculpt.ir.lowering import lowered
from sculpt.model import ApplyFn, Params, State
from sculpt.task import Task
from sculpt.training.batch import Batch, draw_batch
from sculpt.training.devices import on_each, shared
from sculpt.training.features import distance, with_features
from sculpt.training.program import TrainProgram


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
    """float32 scalar: training images of this epoch classified correctly, or sum of their scores."""
    diverged: jax.Array
    """int32 scalar: the first step whose loss, weights or statistics were not finite; -1 if none so far."""

    @property
    def weights(self) -> tuple[Params, State]:
        """What is validated and returned."""
        return (self.params, self.state) if self.average is None else self.average


_AXES: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(TrainState)}
_AXES["step"] = None
_STACKED = TrainState(**_AXES)
"""Axes of networks that train side by side."""


def start(program: TrainProgram, params: Params, state: State, masks: Any) -> TrainState:
    """The state before the first step; owns copies of all arrays, since steps overwrite theirs."""
    begin = functools.partial(_start, program, params, state)
    return jax.vmap(begin, out_axes=_STACKED)(masks) if program.stacked else begin(masks)


def _start(program: TrainProgram, params: Params, state: State, masks: Any) -> TrainState:
    params = params if masks is None else program.pruned(params, masks, jnp.int32(0))
    params, state = copied((params, state))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        state=state,
        optimizer=copied(program.optimizer().init(params)),
        average=copied((params, state)) if program.config.ema else None,
        loss=jnp.float32(0),
        right=jnp.float32(0),
        diverged=jnp.int32(-1),
    )


def copied(tree: Any) -> Any:
    """Arrays of their own, which a step may overwrite."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


@functools.partial(jax.jit, static_argnums=1)
def epoch_order(key: jax.Array, images: int, epoch: jax.Array) -> jax.Array:
    """int32 `[images]`: the order in which this epoch visits them."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), images)


def one_step(
    program: TrainProgram,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: Any,
    labels: jax.Array,
    order: jax.Array,
    key: jax.Array,
) -> TrainState:
    """`learn` on the step's rows, in the order of the epoch.

    Of labels `[n, ...]` all are here; of images too, raw `[n, ...]`, or where they are streamed the step's own, `[batch, ...]`.
    """
    size = program.config.batch_size
    place = train.step % program.steps_per_epoch
    index = shared(jax.lax.dynamic_slice_in_dim(order, place * size, size), program.devices)
    batch = shared(images, program.devices) if program.streamed else rows(images, index)
    return learn(program, train, masks, teacher, batch, labels[index], key)


def learn(
    program: TrainProgram,
    train: TrainState,
    masks: Any,
    teacher: Any,
    images: Any,
    labels: jax.Array,
    key: jax.Array,
) -> TrainState:
    """One step: mask in the forward pass, update, project (CORRECTNESS 1). Randomness from `key` and the step alone.

    Images are raw `[batch, ...]`, labels `[batch, ...]`; `teacher` is the teacher's `(params, state)`, or None.
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
        (outputs, new_state), features = program.forward()(used, state, batch.images, key)
        right = program.task.measure(outputs, batch.labels)[0].sum()
        loss = batch.loss(outputs, config, program.task)
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
        # Statistics in half precision may come back in float32.
        state = jax.tree.map(
            lambda new, old: new if new.dtype == old.dtype else new.astype(old.dtype), state, train.state
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


def _step(program: TrainProgram, train: TrainState, masks: Any, *shared_by_all: Any) -> TrainState:
    """`one_step`, of several networks side by side where the program says so."""
    step = functools.partial(one_step, program)
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
def run_step(program: TrainProgram, train: TrainState, *arguments: Any) -> tuple[TrainState, jax.Array]:
    """`one_step` on its further arguments, compiled by itself: what CPUs and streams want. Also returns `diverged` in a buffer that
    the next call leaves alone."""
    train = _step(program, train, *arguments)
    return train, train.diverged


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def run_steps(
    program: TrainProgram, train: TrainState, count: jax.Array, *arguments: Any
) -> tuple[TrainState, jax.Array]:
    """`count` steps (int32 scalar, traced) of one epoch in one compiled loop: what accelerators want."""
    train = jax.lax.fori_loop(0, count, lambda _, t: _step(program, t, *arguments), train)
    return train, train.diverged


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def validate(
    apply: ApplyFn,
    task: Task,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    stacked: bool,
    params: Params,
    state: State,
    images: Any,
    labels: jax.Array,
    real: jax.Array,
) -> jax.Array:
    """Accuracy, or mean score of the task (float32 scalar; `[networks]` where they are stacked), on raw images
    `[batches, batch, ...]` with their labels; `real` is False `[batches, batch]` on padding."""

    def accuracy(params: Params, state: State) -> jax.Array:
        def one_batch(total: jax.Array, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            images, labels, real = batch
            outputs = lowered(apply)(params, state, normalise(images, *normalisation))
            return total + jnp.where(real, task.measure(outputs, labels)[0], 0.0).sum(), None

        score, _ = jax.lax.scan(one_batch, jnp.float32(0), (images, labels, real))
        return score / real.sum().astype(jnp.float32)

    return (jax.vmap(accuracy) if stacked else accuracy)(params, state)

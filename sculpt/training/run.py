"""A training run: the host side between compiled steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.data.splits import Split, Splits
from sculpt.data.stream import StreamedImages, sent_ahead
from sculpt.inputs import rows
from sculpt.interrupts import check_interrupt
from sculpt.model import Model
from sculpt.training.checkpoint import Checkpoints
from sculpt.training.config import FinetuneConfig
from sculpt.training.devices import from_each, place, place_batch, place_shared
from sculpt.training.program import TrainProgram, make_program
from sculpt.training.step import (
    TrainState,
    copied,
    epoch_order,
    run_step,
    run_steps,
    start,
    validate,
)

Metrics = dict[str, float]
_LOOK_EVERY = 50
"""Steps between two looks of the host at the run: for divergence, and to report progress."""


class TrainingDiverged(ValueError):
    """The loss or the weights stopped being finite."""

    def __init__(self, epoch: int, step: int, checkpoint: Path | None) -> None:
        kept = (
            f"the last good checkpoint is {checkpoint}"
            if checkpoint is not None
            else "no checkpoint was kept (finetune keeps them where it is given a directory)"
        )
        super().__init__(
            f"training diverged: loss or weights not finite in epoch {epoch}, step {step}; {kept}. "
            "Lower learning_rate, or set clip_norm"
        )
        self.epoch = epoch
        """Epoch, from 1."""
        self.step = step
        """Step, from 1, over all epochs."""
        self.checkpoint = checkpoint
        """Folder of the last good checkpoint, if any was kept."""


@dataclasses.dataclass
class TrainRun:
    """A run under way: its arrays on the device, and what the host keeps beside them."""

    model: Model
    """The network to start from."""
    config: FinetuneConfig
    program: TrainProgram
    masks: Any
    teacher: Any
    """The teacher's (params, state), or None."""
    images: Any
    """Raw train images `[n, ...]`, one array or a pytree of them; None of a stream."""
    labels: jax.Array
    """`[n, ...]`, of classifiers int32."""
    validation: tuple[Any, jax.Array, jax.Array]
    """Raw images `[batches, batch, ...]`, labels `[batches, batch, ...]`, and booleans `[batches, batch]`: False on padding."""
    keys: tuple[jax.Array, jax.Array]
    """Of the order of the images, and of the steps."""
    train: TrainState
    best: Any
    """(params, state) of the best epoch so far; None where the last is returned."""
    best_accuracy: np.ndarray
    """float32 scalar, or `[networks]` where they are stacked; -1 before the first epoch."""
    step: int = 0
    seconds: float = 0.0
    """Time of the timed steps of this epoch."""
    timed: int = 0
    """Steps of this epoch that were timed."""
    warm: bool = False
    """Whether the compiled step has run; the first call, which compiles, is not timed."""
    stream: StreamedImages | None = None
    """Train images that are read while they are used, in place of `images`."""
    batches: Iterator[jax.Array] | None = None
    """Raw images of the steps that are left, of a stream."""
    before: jax.Array | None = None
    """`diverged` after the last step on a batch of a stream."""

    @staticmethod
    def begin(
        model: Model,
        masks: Any,
        splits: Splits,
        config: FinetuneConfig,
        key: jax.Array,
        teacher: Model | None,
        devices: int = 1,
        stacked: bool = False,
    ) -> TrainRun:
        program = make_program(model, splits, config, teacher and teacher.apply, devices, stacked)
        images = splits.train.images
        stream = images if isinstance(images, StreamedImages) else None
        order_key, step_key = jax.random.split(key)
        state = place(start(program, model.params, model.state, masks), devices)
        selects = config.select_best and program.total_steps > program.steps_per_epoch
        return TrainRun(
            model=model,
            config=config,
            program=program,
            masks=place(masks, devices),
            teacher=place(teacher and (teacher.params, teacher.state), devices),
            images=None if stream is not None else place(jax.tree.map(jnp.asarray, images), devices),
            stream=stream,
            labels=place(jnp.asarray(splits.train.labels), devices),
            validation=place_shared(_in_batches(splits.validation, devices), devices),
            keys=place((order_key, step_key), devices),
            train=state,
            best=copied(state.weights) if selects else None,
            best_accuracy=np.full(state.diverged.shape, -1, np.float32),
        )

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"train": self.train, "best": self.best, "best_accuracy": self.best_accuracy}

    def load(self, tree: dict[str, Any]) -> None:
        """Takes over the contents of a checkpoint."""
        self.train, self.best, self.best_accuracy = tree["train"], tree["best"], tree["best_accuracy"]
        self.step = int(self.train.step)

    def complete(
        self,
        keeper: Checkpoints | None,
        on_metrics: Callable[[Metrics], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Goes to the end, from the last checkpoint if there is one."""
        if keeper is not None and (found := keeper.restore_latest(self.tree())) is not None:
            self.load(found[1])
        with self._reading():
            while self.step < self.program.total_steps:
                self.advance(keeper, on_progress)
                if self.at_epoch_end:
                    self.finish_epoch(on_metrics)
                if keeper is not None:
                    keeper.save(self.step, self.tree())

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Has the batches of a stream read ahead of the steps that are left; images in memory are on the device already."""
        if self.stream is None:
            yield
            return
        send = functools.partial(place_batch, devices=self.program.devices)
        with contextlib.closing(sent_ahead(self.stream.batches(self._rows()), send)) as self.batches:
            yield

    def _rows(self) -> Iterator[np.ndarray]:
        """The images of each step that is left, as the key and the number of the step decide."""
        length, size = self.program.steps_per_epoch, self.config.batch_size
        order, epoch = np.empty(0, np.int32), -1
        for step in range(self.step, self.program.total_steps):
            if step // length != epoch:
                epoch = step // length
                order = np.asarray(epoch_order(self.keys[0], len(self.labels), jnp.int32(epoch)))
            yield order[step % length * size :][:size]

    @property
    def epoch(self) -> int:
        """The epoch, from 1, that the last step done belongs to."""
        return (self.step - 1) // self.program.steps_per_epoch + 1

    @property
    def at_epoch_end(self) -> bool:
        """Whether an epoch, or the run, is complete."""
        return self.step % self.program.steps_per_epoch == 0 or self.step == self.program.total_steps

    def advance(self, keeper: Checkpoints | None, on_progress: Callable[[int, int], None] | None) -> None:
        """Runs to the next end of an epoch or checkpoint; the state is known to be finite afterwards."""
        length, total = self.program.steps_per_epoch, self.program.total_steps
        stop = min((self.step // length + 1) * length, total)
        if keeper is not None and (every := self.config.checkpoint_every) is not None:
            stop = min(stop, (self.step // every + 1) * every)
        order = epoch_order(self.keys[0], len(self.labels), jnp.int32(self.step // length))
        if self.step % length == 0:
            self.seconds, self.timed = 0.0, 0
        seen: jax.Array | None = None
        begin, first = time.perf_counter(), self.step
        while self.step < stop:
            check_interrupt()
            diverged = self._call(order, min(stop, (self.step // _LOOK_EVERY + 1) * _LOOK_EVERY))
            if not self.warm:
                jax.block_until_ready(diverged)
                self.warm, begin, first = True, time.perf_counter(), self.step
            if self.step % _LOOK_EVERY == 0 or self.step == stop:
                # The look before the last is surely done, and reading it leaves the device a queue to work on.
                self._require_finite(diverged if self.step == stop else seen, keeper)
                seen = diverged
                if on_progress is not None:
                    on_progress(self.step, total)
        self.seconds += time.perf_counter() - begin
        self.timed += self.step - first

    def _call(self, order: jax.Array, stop: int) -> jax.Array:
        """One call of the compiled step or loop, up to step `stop` at the most."""
        images = self.images if self.batches is None else next(self.batches)
        arguments = (self.masks, self.teacher, images, self.labels, order, self.keys[1])
        at_once = self.config.steps_per_call or (1 if jax.default_backend() == "cpu" else 50)
        if at_once == 1 or self.program.streamed:
            self.train, diverged = run_step(self.program, self.train, *arguments)
            self.step += 1
        else:
            count = min(at_once, stop - self.step)
            self.train, diverged = run_steps(self.program, self.train, jnp.int32(count), *arguments)
            self.step += count
        if self.program.streamed:
            # Batches that wait on the device take its memory: one step is queued behind the one that runs, no more.
            jax.block_until_ready(self.before)
            self.before = diverged
        return diverged

    def _require_finite(self, diverged: jax.Array | None, keeper: Checkpoints | None) -> None:
        # Of several networks those that are sound go on.
        if diverged is None or self.program.stacked or (step := int(diverged)) < 0:
            return
        checkpoint = None if keeper is None else keeper.latest()
        raise TrainingDiverged(step // self.program.steps_per_epoch + 1, step + 1, checkpoint)

    def finish_epoch(self, on_metrics: Callable[[Metrics], None] | None) -> None:
        """Validates, where somebody wants to know, and remembers the best epoch."""
        if on_metrics is None and self.best is None:
            return
        accuracy = self.validated(self.train.weights)
        faded = self.step >= self.program.fade_steps
        if self.best is not None and faded and (better := accuracy > self.best_accuracy).any():
            self.best = jax.tree.map(functools.partial(_choose, better), self.train.weights, self.best)
            self.best_accuracy = np.where(better, accuracy, self.best_accuracy)
        if on_metrics is None:
            return
        steps = self.step - (self.epoch - 1) * self.program.steps_per_epoch
        on_metrics(
            {
                "epoch": float(self.epoch),
                "step": float(self.step),
                "train_loss": float(self.train.loss) / steps,
                "train_accuracy": float(self.train.right) / (steps * self.config.batch_size),
                "validation_accuracy": float(accuracy),
                "learning_rate": float(self.program.learning_rate(self.step - 1)),
                "images_per_second": self.timed * self.config.batch_size / max(self.seconds, 1e-9),
            }
        )

    def validated(self, weights: tuple[Any, Any]) -> np.ndarray:
        """Accuracy, or mean score, of (params, state) on the validation split: float32 scalar, or `[networks]` where they are stacked."""
        program = self.program
        normalisation = program.mean, program.std
        return np.asarray(
            validate(
                self.model.apply, program.task, normalisation, program.stacked, *weights, *self.validation
            )
        )

    def result(self) -> Model:
        """The model of the best epoch, or of the last."""
        params, state = self.train.weights if self.best is None else self.best
        params, state = from_each((params, state), self.program.devices)
        return self.model.replace(params=params, state=state)


def _choose(better: np.ndarray, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` where `better`, a boolean for each network or for the only one."""
    return jnp.where(better.reshape(better.shape + (1,) * (new.ndim - better.ndim)), new, old)


def _in_batches(split: Split, devices: int) -> tuple[Any, jax.Array, jax.Array]:
    """Raw images `[batches, batch, ...]`, labels, and which of them are no padding; the devices divide a batch."""
    n = len(split.labels)
    size = min(64 if jax.default_backend() == "cpu" else 512, n)
    size += -size % devices
    index = np.arange(n + -n % size)
    padded = rows(split.images, index % n), split.labels[index % n], index < n
    return jax.tree.map(lambda a: jnp.asarray(a.reshape(-1, size, *a.shape[1:])), padded)

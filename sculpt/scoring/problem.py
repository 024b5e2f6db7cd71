"""The scoring problem: network, space, images and labels, checked and laid out once for all policies."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sculpt.inputs import (
    check_batch_axis,
    check_finite,
    check_finite_images,
    check_images,
    check_labels,
    number_of,
)
from sculpt.model import ApplyFn, Model, TrainFn
from sculpt.pruning.families.patterns import Choice
from sculpt.pruning.space import Space, make_choices
from sculpt.repair.recalibration import into_batches
from sculpt.repair.reconstruction import BRIEF, dense_rows, linear_network
from sculpt.scoring.plan import IMAGE_AXIS, EvaluationPlan
from sculpt.task import Task

Repair = Literal["recalibrate", "reconstruct"]
"""What calibration images are for. `recalibrate`: the statistics of BatchNorm. `reconstruct`: what is left of every layer is fitted to what
the dense layer gave, as by `sculpt.reconstruct`; statistics then stay."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything that scoring a policy reads, as arrays; static parts ride along. A pytree, so an argument of jit."""

    apply: ApplyFn
    apply_train: TrainFn
    task: Task
    space: Space
    plan: EvaluationPlan
    spread_calibration: bool
    """Whether devices that share images share calibration batches too; else each of them computes all statistics."""
    params: Any
    state: Any
    choices: tuple[Choice, ...]
    images: Any
    """float32 `[batches, batch, ...]`, or of the dtype of the network's inputs, padded to whole batches; a pytree of such arrays where
    the network takes one."""
    labels: jax.Array
    """`[batches, batch, ...]`, of classifiers int32."""
    real: jax.Array
    """Boolean `[batches, batch]`: False on padding."""
    calibration: Any
    """Like `images`, float32 `[batches, batch, ...]`, or None for the running statistics. The batch is that of `into_batches` whatever
    the plan says, because statistics depend on it; all are one batch where layers are fitted."""
    wanted: tuple[jax.Array, ...] | None
    """float32 `[rows, outputs]` of each layer that is to be fitted: what the dense network gives. None: statistics are recalibrated."""

    def partition(self) -> Problem:
        """How the arrays lie on the mesh of the plan: batches spread over the image axis, the rest on every device."""
        whole, spread = P(), P(IMAGE_AXIS)
        fields: dict[str, Any] = dict.fromkeys(("params", "state", "choices"), whole)
        if self.wanted is not None:
            fields["wanted"] = whole
        if self.calibration is not None:
            fields["calibration"] = spread if self.spread_calibration else whole
        return dataclasses.replace(self, **fields, images=spread, labels=spread, real=spread)


jax.tree_util.register_dataclass(
    Problem,
    data_fields=["params", "state", "choices", "images", "labels", "real", "calibration", "wanted"],
    meta_fields=["apply", "apply_train", "task", "space", "plan", "spread_calibration"],
)


def make_problem(
    model: Model,
    space: Space,
    images: Any,
    labels: Any,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
    repair: Repair = "recalibrate",
) -> Problem:
    """Checks and lays out what `score_policies` needs; see `evaluate_policies` for the arguments."""
    plan, wanted = plan or EvaluationPlan(), None
    if repair not in get_args(Repair):
        raise ValueError(f"repair must be one of {', '.join(get_args(Repair))}, got {repair!r}")
    if repair == "reconstruct" and calibration is None:
        raise ValueError("repair='reconstruct' needs calibration images to fit layers on, got none")
    check_batch_axis(space.trace.batch_axis)
    check_finite(model)
    images = check_images(model, images, space.trace.inputs)
    check_finite_images(images)
    labels = check_labels(model, images, labels)
    number = number_of(images)
    batch = min(plan.images_per_batch, -(-number // plan.image_shards))
    missing = -number % (batch * plan.image_shards)
    in_batches = functools.partial(_in_batches, batch=batch, missing=missing)
    if calibration is not None:
        calibration = check_images(model, calibration, space.trace.inputs)
        check_finite_images(calibration)
        if repair == "reconstruct":
            wanted = plan.place(_wanted(model.apply, model.params, model.state, calibration))
            calibration = jax.tree.map(lambda x: x[None], calibration)
        else:
            calibration = into_batches(calibration)
    return Problem(
        apply=model.apply,
        apply_train=model.apply_train,
        task=model.task,
        space=space,
        plan=plan,
        spread_calibration=calibration is not None
        and wanted is None
        and number_of(calibration) % plan.image_shards == 0,
        params=plan.place(model.params),
        state=plan.place(model.state),
        choices=plan.place(make_choices(space, model.params)),
        images=plan.place(jax.tree.map(in_batches, images)),
        labels=plan.place(in_batches(labels)),
        real=plan.place(in_batches(jnp.ones(number, bool))),
        calibration=plan.place(calibration),
        wanted=wanted,
    )


def _in_batches(array: jax.Array, batch: int, missing: int) -> jax.Array:
    """`[n, ...]` as `[batches, batch, ...]`, with so many zeros at the end."""
    padded = jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)))
    return padded.reshape(-1, batch, *array.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def _wanted(apply: ApplyFn, params: Any, state: Any, images: Any) -> tuple[jax.Array, ...]:
    network = linear_network(apply, params, state, images, BRIEF.rows)
    return tuple(dense_rows(network, params, state, images))

"""What scoring a policy reads, checked and laid out once for all policies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from sculpt.model import ApplyFn, Model, TrainFn
from sculpt.pruning.patterns import Choice
from sculpt.pruning.space import Space, make_choices
from sculpt.scoring.plan import IMAGE_AXIS, EvaluationPlan
from sculpt.scoring.recalibrate import into_batches
from sculpt.scoring.reconstruct import BRIEF, dense_rows, linear_network

Repair = Literal["recalibrate", "reconstruct"]
"""What calibration images are for. `recalibrate`: the statistics of BatchNorm. `reconstruct`: what is left of every layer is fitted to what
the dense layer gave, as by `sculpt.reconstruct`; statistics then stay."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything that scoring a policy reads, as arrays; static parts ride along. A pytree, so an argument of jit."""

    apply: ApplyFn
    apply_train: TrainFn
    space: Space
    plan: EvaluationPlan
    spread_calibration: bool
    """Whether devices that share images share calibration batches too; else each of them computes all statistics."""
    params: Any
    state: Any
    choices: tuple[Choice, ...]
    images: jax.Array
    """float32 `[batches, batch, ...]`, padded to whole batches."""
    labels: jax.Array
    """int32 `[batches, batch]`; -1 on padding."""
    calibration: jax.Array | None
    """float32 `[batches, batch, ...]`, or None for the running statistics. The batch is that of `into_batches` whatever
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
        return dataclasses.replace(self, **fields, images=spread, labels=spread)


jax.tree_util.register_dataclass(
    Problem,
    data_fields=["params", "state", "choices", "images", "labels", "calibration", "wanted"],
    meta_fields=["apply", "apply_train", "space", "plan", "spread_calibration"],
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
    images, labels = check_images(space.trace.input_shape, images, labels)
    check_logits(model, images, labels)
    batch = min(plan.images_per_batch, -(-images.shape[0] // plan.image_shards))
    missing = -images.shape[0] % (batch * plan.image_shards)
    padded = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    padded_labels = jnp.pad(labels, (0, missing), constant_values=-1)
    if calibration is not None:
        calibration, _ = check_images(space.trace.input_shape, calibration)
        if repair == "reconstruct":
            wanted = plan.place(_wanted(model.apply, model.params, model.state, calibration))
            calibration = calibration[None]
        else:
            calibration = into_batches(calibration)
    return Problem(
        apply=model.apply,
        apply_train=model.apply_train,
        space=space,
        plan=plan,
        spread_calibration=calibration is not None
        and wanted is None
        and len(calibration) % plan.image_shards == 0,
        params=plan.place(model.params),
        state=plan.place(model.state),
        choices=plan.place(make_choices(space, model.params)),
        images=plan.place(padded.reshape(-1, batch, *images.shape[1:])),
        labels=plan.place(padded_labels.reshape(-1, batch)),
        calibration=plan.place(calibration),
        wanted=wanted,
    )


@functools.partial(jax.jit, static_argnums=0)
def _wanted(apply: ApplyFn, params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    network = linear_network(apply, params, state, images, BRIEF.rows)
    return tuple(dense_rows(network, params, state, images))


def check_images(shape: Sequence[int], images: Any, labels: Any = None) -> tuple[jax.Array, jax.Array]:
    """Images as float32 `[n, *shape]` and labels as int32 `[n]` (zeros where none are given).

    Raises:
      ValueError: for another shape, integer images, no image at all, or labels of another length.
    """
    if tuple(np.shape(images))[1:] != tuple(shape) or np.shape(images)[0] < 1:
        raise ValueError(f"expected images [n, {', '.join(map(str, shape))}], got {list(np.shape(images))}")
    if not jnp.issubdtype(jax.dtypes.result_type(images), jnp.floating):
        raise ValueError(
            f"expected normalised floating-point images, got {jax.dtypes.result_type(images)}: "
            "normalise them first (splits.normalise, sculpt.nets.preprocess)"
        )
    labels = np.zeros(np.shape(images)[0], np.int32) if labels is None else labels
    return jnp.asarray(images, jnp.float32), check_labels(labels, np.shape(images)[0])


def check_labels(labels: Any, number: int) -> jax.Array:
    """Labels as int32 `[number]`; raises ValueError for another shape or dtype."""
    if np.shape(labels) != (number,) or not jnp.issubdtype(jax.dtypes.result_type(labels), jnp.integer):
        raise ValueError(
            f"expected integer labels [{number}], got {jax.dtypes.result_type(labels)}{list(np.shape(labels))}"
        )
    return jnp.asarray(labels, jnp.int32)


def check_logits(model: Model, images: jax.Array, labels: jax.Array) -> None:
    """Raises ValueError unless the model takes `images`, gives logits `[n, classes]`, and has a class for every label."""
    try:
        outputs = jax.tree.leaves(jax.eval_shape(model.apply, model.params, model.state, images))
    except Exception as error:  # each framework has its own
        raise ValueError(f"the model does not take images {list(images.shape)}: {error}") from error
    if len(outputs) != 1 or outputs[0].ndim != 2:
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise ValueError(
            f"scoring needs a model with one output, logits [{len(images)}, classes]; this one gives {shapes}"
        )
    classes = outputs[0].shape[1]
    if not isinstance(labels, Tracer) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"expected labels from 0 to {classes - 1} for a model of {classes} classes, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )

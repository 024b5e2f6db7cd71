"""Scores of many policies in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sculpt.model import ApplyFn, Model, TrainFn
from sculpt.pruning.masks import check_policies, mask_params, masks_from_choices
from sculpt.pruning.patterns import Choice
from sculpt.pruning.space import Space, make_choices
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.recalibrate import batch_statistics, into_batches


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good policies are; one entry per policy."""

    accuracy: jax.Array
    """float32 `[n]`: share of the images classified correctly, in [0, 1]."""
    loss: jax.Array
    """float32 `[n]`: mean cross-entropy in nats."""


jax.tree_util.register_dataclass(Scores, ["accuracy", "loss"], [])


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything that scoring a policy reads, as arrays; static parts ride along. A pytree, so an argument of jit."""

    apply: ApplyFn
    apply_train: TrainFn
    space: Space
    plan: EvaluationPlan
    params: Any
    state: Any
    choices: tuple[Choice, ...]
    images: jax.Array
    """float32 `[batches, batch, ...]`, padded to whole batches."""
    labels: jax.Array
    """int32 `[batches, batch]`; -1 on padding."""
    calibration: jax.Array | None
    """float32 `[batches, batch, ...]`, or None for the running statistics."""


jax.tree_util.register_dataclass(
    Problem,
    data_fields=["params", "state", "choices", "images", "labels", "calibration"],
    meta_fields=["apply", "apply_train", "space", "plan"],
)


def make_problem(
    model: Model,
    space: Space,
    images: Any,
    labels: Any,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
) -> Problem:
    """Checks and lays out what `score_policies` needs; see `evaluate_policies` for the arguments."""
    plan = plan or EvaluationPlan()
    images, labels = check_images(space.trace.input_shape, images, labels)
    check_logits(model, images, labels)
    batch = min(plan.images_per_batch, images.shape[0])
    missing = -images.shape[0] % batch
    padded = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
    padded_labels = jnp.pad(labels, (0, missing), constant_values=-1)
    if calibration is not None:
        calibration, _ = check_images(space.trace.input_shape, calibration)
        calibration = into_batches(calibration, plan.images_per_batch)
    return Problem(
        apply=model.apply,
        apply_train=model.apply_train,
        space=space,
        plan=plan,
        params=model.params,
        state=model.state,
        choices=_choices(space, model.params),
        images=padded.reshape(-1, batch, *images.shape[1:]),
        labels=padded_labels.reshape(-1, batch),
        calibration=calibration,
    )


@functools.partial(jax.jit, static_argnums=0)
def _choices(space: Space, params: Any) -> tuple[Choice, ...]:
    return make_choices(space, params)


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
    if labels is None:
        labels = np.zeros(np.shape(images)[0], np.int32)
    if np.shape(labels) != np.shape(images)[:1] or not jnp.issubdtype(
        jax.dtypes.result_type(labels), jnp.integer
    ):
        raise ValueError(
            f"expected integer labels [{np.shape(images)[0]}], got "
            f"{jax.dtypes.result_type(labels)}{list(np.shape(labels))}"
        )
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


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


def score_policy(problem: Problem, policy: jax.Array) -> Scores:
    """Scores of one policy int32 `[sites]` (scalars); pure, to be mapped."""
    masks = masks_from_choices(problem.space, problem.choices, policy)
    params = mask_params(problem.params, jax.tree.unflatten(jax.tree.structure(problem.params), masks))
    return score_params(problem, params)


def score_params(problem: Problem, params: Any) -> Scores:
    """Scores of given parameters on the problem's images (scalars)."""
    state = problem.state
    if problem.calibration is not None:
        state = batch_statistics(problem.apply_train, params, state, problem.calibration)

    def one_batch(
        totals: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        images, labels = batch
        logits = problem.apply(params, state, images).astype(jnp.float32)
        real = labels >= 0
        wanted = jnp.where(real, labels, 0)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], axis=1)[:, 0]
        right = (jnp.argmax(logits, axis=1).astype(jnp.int32) == labels).astype(jnp.float32)
        return (totals[0] + right.sum(), totals[1] + jnp.where(real, losses, 0.0).sum()), None

    start = (jnp.zeros(()), jnp.zeros(()))
    (right, loss), _ = jax.lax.scan(one_batch, start, (problem.images, problem.labels))
    count = (problem.labels >= 0).sum().astype(jnp.float32)
    return Scores(right / count, loss / count)


def score_policies(problem: Problem, policies: jax.Array, count: jax.Array | int | None = None) -> Scores:
    """Scores of the first `count` policies of int32 `[n, sites]`; zeros beyond. Pure: for use inside jit.

    The loop runs `count / policies_per_chunk` times, so a traced `count` leaves work undone instead of masked.
    """
    n = policies.shape[0]
    chunk = min(problem.plan.policies_per_chunk, n)
    padded = jnp.pad(policies, ((0, -n % chunk), (0, 0)))
    count = jnp.asarray(n if count is None else count, jnp.int32)

    def one_chunk(index: jax.Array, scores: Scores) -> Scores:
        start = index * chunk
        block = jax.lax.dynamic_slice_in_dim(padded, start, chunk)
        if chunk == 1:
            new = jax.tree.map(lambda s: s[None], score_policy(problem, block[0]))
        else:
            new = jax.vmap(lambda p: score_policy(problem, p))(block)
        return jax.tree.map(
            lambda all_, part: jax.lax.dynamic_update_slice(all_, part, (start,)), scores, new
        )

    empty = jnp.zeros(padded.shape[0], jnp.float32)
    scores = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, one_chunk, Scores(empty, empty))
    return jax.tree.map(lambda s: s[:n], scores)


_scored = jax.jit(score_policies)


def evaluate_policies(
    model: Model,
    space: Space,
    policies: Any,
    images: Any,
    labels: Any,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
) -> Scores:
    """Scores many policies at once: masks are built from table look-ups inside one compiled loop.

    A second call with the same model functions, space, plan and shapes compiles nothing; any number of policies up to
    the next power of two shares one program.

    Args:
      model: the dense network.
      space: sites and patterns.
      policies: integers `[n, sites]`.
      images: floating-point `[m, ...]`, normalised as the model expects.
      labels: integers `[m]`.
      calibration: images `[k, ...]` to take BatchNorm statistics from, for each policy anew; None keeps the model's
        running statistics, with which a pruned network is often near chance.
      plan: sizes of chunks and batches.

    Returns:
      `Scores` with `accuracy [n]` and `loss [n]`.

    Raises:
      ValueError: if policies, images or labels do not fit.
    """
    policies = check_policies(space, policies)
    if policies.ndim != 2 or not len(policies):
        raise ValueError(f"expected policies [n, {space.num_sites}] with n >= 1, got {list(policies.shape)}")
    problem = make_problem(model, space, images, labels, calibration, plan)
    n = policies.shape[0]
    capacity = 1 << (n - 1).bit_length()
    scores = _scored(problem, jnp.pad(policies, ((0, capacity - n), (0, 0))), jnp.int32(n))
    return jax.tree.map(lambda s: s[:n], scores)


def evaluate(model: Model, images: Any, labels: Any, images_per_batch: int = 64) -> Scores:
    """Accuracy and mean cross-entropy (scalars) of a model as it stands, on normalised images `[m, ...]`.

    Raises:
      ValueError: if images or labels do not fit together, or the model's output is not logits.
    """
    images, labels = check_images(np.shape(images)[1:], images, labels)
    check_logits(model, images[:1], labels)
    right = loss = 0.0
    for start in range(0, len(labels), images_per_batch):
        block = slice(start, start + images_per_batch)
        counts = _count_right(model.apply, model.params, model.state, images[block], labels[block])
        right, loss = right + counts[0], loss + counts[1]
    return Scores(jnp.asarray(right / len(labels)), jnp.asarray(loss / len(labels)))


@functools.partial(jax.jit, static_argnums=0)
def _count_right(
    apply: ApplyFn, params: Any, state: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = apply(params, state, images).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    right = jnp.argmax(logits, axis=1).astype(jnp.int32) == labels
    return right.astype(jnp.float32).sum(), losses.sum()

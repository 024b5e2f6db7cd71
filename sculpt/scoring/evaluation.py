"""Scores of many policies in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from sculpt.arguments import checked, is_whole
from sculpt.inputs import (
    arrays_of,
    check_finite,
    check_finite_images,
    check_images,
    check_labels,
    number_of,
    rows,
)
from sculpt.interrupts import check_interrupt
from sculpt.ir.lowering import lowered
from sculpt.model import ApplyFn, Model
from sculpt.pruning.masks import check_policies, mask_params, masks_from_choices
from sculpt.pruning.space import Space
from sculpt.repair.recalibration import batch_statistics
from sculpt.repair.reconstruction import BRIEF, RIDGE, fit_params, linear_network
from sculpt.scoring.plan import IMAGE_AXIS, POLICY_AXIS, EvaluationPlan
from sculpt.scoring.problem import Problem, Repair, make_problem
from sculpt.task import Task


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good policies are; one entry per policy."""

    accuracy: jax.Array
    """float32 `[n]`: share of the images classified correctly, or mean score of the model's task, in [0, 1]; NaN where the loss is not
    finite."""
    loss: jax.Array
    """float32 `[n]`: mean cross-entropy in nats, or mean loss of the model's task; not finite where outputs are not."""


jax.tree_util.register_dataclass(Scores, ["accuracy", "loss"], [])


def score_policy(problem: Problem, policy: jax.Array) -> Scores:
    """Scores of one policy int32 `[sites]` (scalars); pure, to be mapped."""
    kept = masks_from_choices(problem.space, problem.choices, policy)
    masks = jax.tree.unflatten(jax.tree.structure(problem.params), kept)
    return score_params(problem, _repaired(problem, masks))


def _repaired(problem: Problem, masks: Any) -> Any:
    """The parameters that masks leave, fitted where that is asked for."""
    if problem.wanted is None:
        return mask_params(problem.params, masks)
    assert problem.calibration is not None
    images = rows(problem.calibration, 0)
    network = linear_network(problem.apply, problem.params, problem.state, images, BRIEF.rows)
    params, _ = fit_params(
        network, problem.params, masks, problem.state, images, problem.wanted, RIDGE, BRIEF.steps
    )
    return params


def score_params(problem: Problem, params: Any) -> Scores:
    """Scores of given parameters on the problem's images (scalars).

    Where the plan has several devices share the images, this is to be called inside its `shard_map`.
    """
    plan, state = problem.plan, problem.state
    shared = IMAGE_AXIS if plan.image_shards > 1 else None
    apply = lowered(problem.apply, plan.convolution, plan.precision)
    if problem.calibration is not None and problem.wanted is None:
        train = lowered(problem.apply_train, plan.convolution, plan.precision)
        spread = shared if problem.spread_calibration else None
        state = batch_statistics(train, params, state, problem.calibration, spread)

    def one_batch(
        totals: tuple[jax.Array, jax.Array], batch: tuple[Any, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        images, labels, real = batch
        scores, losses = problem.task.measure(apply(params, state, images), labels)
        return (
            totals[0] + jnp.where(real, scores, 0.0).sum(),
            totals[1] + jnp.where(real, losses, 0.0).sum(),
        ), None

    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    (score, loss), _ = jax.lax.scan(one_batch, start, (problem.images, problem.labels, problem.real))
    count = problem.real.sum().astype(jnp.float32)
    if shared is not None:
        score, loss, count = jax.lax.psum((score, loss, count), shared)
    return _scores(score / count, loss / count)


def _scores(accuracy: jax.Array, loss: jax.Array) -> Scores:
    """A network whose loss is not finite has no accuracy: outputs that are NaN would be counted as wrong."""
    return Scores(jnp.where(jnp.isfinite(loss), accuracy, jnp.nan), loss)


def score_policies(problem: Problem, policies: jax.Array, count: jax.Array | int | None = None) -> Scores:
    """Scores of the first `count` policies of int32 `[n, sites]`; zeros beyond. Pure: for use inside jit.

    The loop runs `count / policies_per_chunk` times on each device, so a traced `count` leaves work undone instead of
    masked. Over several devices policies are dealt out one by one, so that all have work whatever `count` is, and every
    device ends with all scores. Under `vmap` the policies asked for are scored in one such loop, one batch behind the other: networks
    side by side are what the plan decides about.
    """
    return _score(problem, policies, jnp.asarray(policies.shape[0] if count is None else count, jnp.int32))


@custom_vmap
def _score(problem: Problem, policies: jax.Array, count: jax.Array) -> Scores:
    plan, n = problem.plan, policies.shape[0]
    if plan.devices == 1:
        return _score_rows(problem, policies, count)
    shards = plan.policy_shards

    def on_device(problem: Problem, policies: jax.Array, count: jax.Array) -> Scores:
        own = (count - jax.lax.axis_index(POLICY_AXIS) + shards - 1) // shards
        scores = _score_rows(problem, policies[:, 0], own)
        return jax.tree.map(lambda s: jax.lax.all_gather(s, POLICY_AXIS, axis=1), scores)

    dealt = jnp.pad(policies, ((0, -n % shards), (0, 0))).reshape(-1, shards, policies.shape[1])
    specs = (problem.partition(), P(None, POLICY_AXIS), P())
    # The gathered scores are alike on all devices, which the check cannot see through the loop.
    run = jax.shard_map(on_device, mesh=plan.mesh(), in_specs=specs, out_specs=P(), check_vma=False)
    return jax.tree.map(lambda s: s.reshape(-1)[:n], run(problem, dealt, count))


@_score.def_vmap
def _score_batches(
    batches: int, mapped: Any, problem: Problem, policies: jax.Array, count: jax.Array
) -> tuple[Scores, Scores]:
    """What all batches ask for, in one run of `_score`; in one after another where they have networks or images of their own."""
    arguments, treedef = jax.tree.flatten((problem, policies, count))
    flags = jax.tree.leaves(mapped)
    if any(jax.tree.leaves(mapped[0])):  # each batch has a problem of its own: one after another

        def one(rows: list[jax.Array]) -> Scores:
            own = iter(rows)
            return _score(
                *treedef.unflatten([next(own) if flag else arg for arg, flag in zip(arguments, flags)])
            )

        scores = jax.lax.map(one, [arg for arg, flag in zip(arguments, flags) if flag])
        return scores, Scores(True, True)  # type: ignore[arg-type]
    policies, count = (
        value if flag else jnp.broadcast_to(value, (batches, *value.shape))
        for value, flag in zip((policies, count), mapped[1:])
    )
    asked = (jnp.arange(policies.shape[1], dtype=jnp.int32)[None] < count[:, None]).reshape(-1)
    order = jnp.argsort(~asked, stable=True)
    together = _score(problem, policies.reshape(-1, policies.shape[2])[order], asked.sum(dtype=jnp.int32))
    rank = jnp.argsort(order)  # the inverse: where a policy stands in `order`
    scores = jax.tree.map(lambda s: s[rank].reshape(policies.shape[:2]), together)
    return scores, Scores(True, True)  # type: ignore[arg-type]


def _score_rows(problem: Problem, policies: jax.Array, count: jax.Array) -> Scores:
    """`score_policies` of one device."""
    n = policies.shape[0]
    chunk = min(problem.plan.policies_per_chunk, n)
    padded = jnp.pad(policies, ((0, -n % chunk), (0, 0)))

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


score_compiled = jax.jit(score_policies)


def score_batch(problem: Problem, policies: jax.Array) -> Scores:
    """Compiled `score_policies` of int32 `[n, sites]`; any n up to the next power of two shares one program."""
    n = policies.shape[0]
    capacity = 1 << (n - 1).bit_length()
    rows = problem.plan.place(jnp.pad(policies, ((0, capacity - n), (0, 0))))
    scores = score_compiled(problem, rows, problem.plan.place(jnp.int32(n)))
    return jax.tree.map(lambda s: s[:n], scores)


@checked
def evaluate_policies(
    model: Model,
    space: Space,
    policies: Any,
    images: Any,
    labels: Any,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
    repair: Repair = "recalibrate",
) -> Scores:
    """Scores many policies at once: masks are built from table look-ups inside one compiled loop.

    A second call with the same model functions, space, plan and shapes compiles nothing; any number of policies up to
    the next power of two shares one program. On several hosts every one calls this with the same arguments, and gets the
    same scores.

    Args:
      model: the dense network.
      space: sites and patterns.
      policies: integers `[n, sites]`.
      images: floating-point `[m, ...]`, normalised as the model expects; or whole numbers, such as tokens, where it takes those; or a
        pytree of such arrays.
      labels: integers `[m]`, or what the model's task takes.
      calibration: images `[k, ...]` to take BatchNorm statistics from, for each policy anew, in whole batches of 64
        where there are more (the rest is left out); None keeps the model's
        running statistics, with which a pruned network is often near chance.
      plan: how the work is laid out; None: one device, as `EvaluationPlan()`. `tune_plan` finds the fastest.
      repair: what `calibration` is for. "reconstruct" fits the weights that each policy leaves to what the dense network gives, all
        images at once, as a shorter `sculpt.reconstruct`; statistics then stay. Slower; meant for networks without BatchNorm.

    Returns:
      `Scores` with `accuracy [n]` and `loss [n]`.

    Raises:
      ValueError: if policies, images or labels do not fit, arrays of the model or images are not finite, the plan needs more devices than
        there are, `repair` is unknown, or there are no images to reconstruct on.
    """
    policies = check_policies(space, policies)
    if policies.ndim != 2 or not len(policies):
        raise ValueError(f"expected policies [n, {space.num_sites}] with n >= 1, got {list(policies.shape)}")
    return score_batch(make_problem(model, space, images, labels, calibration, plan, repair), policies)


@checked
def evaluate(
    model: Model,
    images: Any,
    labels: Any,
    images_per_batch: int = 64,
    *,
    normalise: Callable[[Any], Any] | None = None,
) -> Scores:
    """Accuracy and mean cross-entropy (scalars) of a model as it stands, or mean score and loss of its task.

    Args:
      model: the network.
      images: `[m, ...]`, normalised, or what `normalise` takes; a pytree of arrays where the network takes one.
      labels: integers `[m]`, or what the model's task takes.
      images_per_batch: how many are on the device at a time.
      normalise: what is done to the images of a batch first, such as `splits.normalise`; None: nothing.

    Raises:
      ValueError: if images, labels, the model's outputs and its task do not fit together, arrays of the model or images are not finite,
        or `images_per_batch` is not a whole number of at least 1.
    """
    if not is_whole(images_per_batch, 1):
        raise ValueError(f"images_per_batch must be a whole number of at least 1, got {images_per_batch!r}")
    check_finite(model)
    prepared = normalise or (lambda block: block)
    images = arrays_of(images)
    number = number_of(images)
    first = check_images(model, prepared(rows(images, slice(1))))
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype), first)
    labels = check_labels(model, example, labels)
    score = loss = 0.0
    for start in range(0, number, images_per_batch):
        check_interrupt()
        block = slice(start, start + images_per_batch)
        block_images = prepared(rows(images, block))
        check_finite_images(block_images)
        x = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), block_images, first)
        totals = _totals(model.apply, model.task, model.params, model.state, x, labels[block])
        score, loss = score + totals[0], loss + totals[1]
    return _scores(jnp.asarray(score / number), jnp.asarray(loss / number))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _totals(
    apply: ApplyFn, task: Task, params: Any, state: Any, images: Any, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    scores, losses = task.measure(lowered(apply)(params, state, images), labels)
    return scores.sum(), losses.sum()

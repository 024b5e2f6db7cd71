"""`race_policies`: successive halving over images finds the best of many policies with fewer evaluations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, is_whole
from sculpt.inputs import number_of, rows
from sculpt.model import Model
from sculpt.pruning.masks import check_policies
from sculpt.pruning.space import Space
from sculpt.repair.recalibration import images_used
from sculpt.scoring.evaluation import score_batch
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.problem import Repair, make_problem
from sculpt.scoring.rewards import Objective, quality


@dataclasses.dataclass(frozen=True)
class Rung:
    """One round of a race."""

    images: int
    """Images that policies were scored on."""
    policies: int
    """Policies that took part, without those of the sample that had dropped out."""
    rank_correlation: float
    """Spearman correlation of the scores on these images with the scores on all of them, over a random sample of all
    policies; nan where either does not vary."""


@dataclasses.dataclass(frozen=True)
class Race:
    """How a race ended."""

    order: np.ndarray
    """int64 `[n]`: indices of the policies, best first: those that were scored on all images (finalists and sample) by that
    score, then who dropped out last."""
    accuracy: np.ndarray
    """float32 `[n]`: of every policy on the images of the last rung that it ran in."""
    loss: np.ndarray
    """float32 `[n]`: the same, cross-entropy in nats."""
    images: np.ndarray
    """int64 `[n]`: images that accuracy and loss were measured on."""
    rungs: tuple[Rung, ...]
    """From few images to all."""
    work: float
    """Forward passes through the network, calibration (reconstruction is counted as two over its images) and the sample for the correlation
    included, as a share of what scoring all policies on all images would have taken."""


@checked
def race_policies(
    model: Model,
    space: Space,
    policies: Any,
    images: Any,
    labels: Any,
    key: jax.Array,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
    *,
    first_images: int = 64,
    factor: int = 4,
    objective: Objective = "loss",
    sample: int = 32,
    repair: Repair = "recalibrate",
) -> Race:
    """Scores all policies on a few images, the best of them on more, and so on up to all images.

    Successive halving (Jamieson and Talwalkar, arXiv 1502.07943). The winner may differ from the one of
    `evaluate_policies`; how far the early rungs are to be trusted is measured on a random sample of policies that are scored
    on everything.

    Args:
      model: the dense network.
      space: sites and patterns.
      policies: integers `[n, sites]`.
      images: `[m, ...]`, in random order; a rung takes the first of them.
      labels: integers `[m]`.
      key: draws the sample.
      calibration: as for `evaluate_policies`.
      plan: as for `evaluate_policies`.
      first_images: images of the first rung.
      factor: from rung to rung the images grow by it and the policies shrink by it.
      objective: what is compared: "loss", or "accuracy", which ties on few images.
      sample: policies for the correlation, at least 2.
      repair: as for `evaluate_policies`.

    Raises:
      ValueError: if the arguments do not fit, or a number is out of range.
    """
    policies = np.asarray(check_policies(space, policies))
    if policies.ndim != 2 or not len(policies):
        raise ValueError(f"expected policies [n, {space.num_sites}] with n >= 1, got {list(policies.shape)}")
    for name, value, least in (
        ("first_images", first_images, 1),
        ("factor", factor, 2),
        ("sample", sample, 2),
    ):
        if not is_whole(value, least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    number, total = len(policies), number_of(images)
    sizes = _sizes(min(first_images, total), total, factor)
    # What a policy costs beside its score images: a training-mode pass over the calibration images, or one and about another of fits.
    fixed = 0
    if calibration is not None:
        count = number_of(calibration)
        fixed = 2 * count if repair == "reconstruct" else images_used(count)
    drawn = np.asarray(jax.random.permutation(key, number))[: min(sample, number)]
    accuracy, loss = np.zeros(number, np.float32), np.zeros(number, np.float32)
    seen = np.zeros(number, np.int64)
    running, early, passes, order = np.arange(number), [], 0, []
    for size in sizes:
        # The sample is scored in every rung, so that its last scores are its full ones.
        scored = np.unique(np.concatenate([running, drawn]))
        problem = make_problem(
            model, space, rows(images, slice(size)), labels[:size], calibration, plan, repair
        )
        scores = jax.device_get(score_batch(problem, jnp.asarray(policies[scored])))
        accuracy[scored], loss[scored], seen[scored] = scores.accuracy, scores.loss, size
        passes += len(scored) * (size + fixed)
        early.append(
            (size, len(running), quality(jnp.asarray(accuracy[drawn]), jnp.asarray(loss[drawn]), objective))
        )
        if size == total:  # who dropped out before, but is in the sample, has a full score too
            running = scored
        worth = np.asarray(quality(jnp.asarray(accuracy[running]), jnp.asarray(loss[running]), objective))
        ranked = running[np.lexsort((loss[running], -worth))]
        kept = len(ranked) if size == total else -(-len(ranked) // factor)
        order.append(ranked[kept:])
        running = ranked[:kept]
    full = early[-1][2]
    rungs = tuple(Rung(size, count, _spearman(worth, full)) for size, count, worth in early)
    dropped = np.concatenate(order[::-1])
    finish = np.concatenate([running, dropped[seen[dropped] < total]])
    return Race(finish, accuracy, loss, seen, rungs, passes / (number * (total + fixed)))


def _sizes(first: int, total: int, factor: int) -> list[int]:
    """Images of each rung: from `first`, growing by `factor`, the last being all."""
    sizes = [first]
    while sizes[-1] * factor < total:
        sizes.append(sizes[-1] * factor)
    return sizes if sizes[-1] == total else [*sizes, total]


def _spearman(one: Any, other: Any) -> float:
    from scipy.stats import rankdata

    ranks = [rankdata(np.asarray(values)) for values in (one, other)]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])

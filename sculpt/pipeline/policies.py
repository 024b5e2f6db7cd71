"""`sculpt evaluate --policies FILE --out FILE`: scores many policies for the dense network of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.pipeline.artefacts import Artefacts
from sculpt.pruning.masks import check_policies
from sculpt.repair.recalibration import check_calibration_images
from sculpt.report import RunDirectory
from sculpt.scoring.journal import StreamReport, evaluate_file
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.policy_file import check_scores_file, count_policies, read_policies
from sculpt.scoring.precision import PrecisionGap, precision_gap
from sculpt.scoring.problem import Repair
from sculpt.scoring.tune import Tuning, tune_plan

PLAN_FIELDS = tuple(field.name for field in dataclasses.fields(EvaluationPlan))
_IMAGES = 512
_COMPARED = 8
"""Policies that are scored in float32 as well, where half precision is asked for."""


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """What is scored on what, and how.

    Raises:
      ValueError: on numbers out of range, another kind of file, or what would have no effect.
    """

    policies: Path
    """File of policies, see `sculpt.scoring.read_policies`."""
    out: Path
    """`.jsonl` or `.parquet`."""
    images: int | None = None
    """Images of the validation split, the first ones; None: 512, or all where there are fewer."""
    calibration_images: int = 128
    """Images of the train split for what `repair` does to each pruned network; 0: nothing."""
    repair: Repair | None = None
    """As `SearchConfig.repair`."""
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `EvaluationPlan` that are asked for; none, or only the precision: the plan is tuned."""
    explain: bool = False
    """Whether to say how the plan was found, where it is tuned."""

    def __post_init__(self) -> None:
        if (self.images is not None and self.images < 1) or self.calibration_images < 0:
            raise ValueError(
                f"expected --images of at least 1 and --calibration-images of at least 0, got {self.images} and "
                f"{self.calibration_images}"
            )
        if self.repair != "reconstruct":
            check_calibration_images(self.calibration_images)
        # Refuses what a search would.
        self.search_config()
        check_scores_file(self.out, self.policies)
        if self.explain and (fixed := self.fixed_plan()) is not None:
            raise ValueError(
                f"--explain says how a plan was tuned, and this one is given ({fixed.describe()}): "
                "leave out --explain, or the options of the plan"
            )

    def search_config(self) -> SearchConfig:
        """A search that would score in the same way."""
        return SearchConfig(calibration_images=self.calibration_images, repair=self.repair)

    def fixed_plan(self) -> EvaluationPlan | None:
        """The plan that is asked for, on all devices unless it says otherwise; None where it is to be tuned.

        Raises:
          ValueError: on sizes out of range.
        """
        if set(self.plan) <= {"precision"}:
            return None
        plan = EvaluationPlan(**self.plan)
        if "policy_shards" in self.plan:
            return plan
        return dataclasses.replace(plan, policy_shards=max(1, jax.device_count() // plan.image_shards))


def score_policies_of_run(
    run: RunDirectory,
    options: PolicyOptions,
    cache: Path,
    on_plan: Callable[[EvaluationPlan, Tuning | None, PrecisionGap | None], None],
    on_progress: Callable[[StreamReport, int], None],
) -> StreamReport:
    """Scores the policies of a file for the run's dense network and its space.

    Args:
      run: a run whose network is trained; nothing in it is changed.
      options: what to score.
      cache: folder that tuned plans are kept in.
      on_plan: told the plan, how it was found where it was tuned, and what it costs where it is of half precision.
      on_progress: told after every block, with the number of policies in all.

    Raises:
      ValueError: on what does not fit, a network that is not trained yet, or other data than it was trained on; before
        anything is tuned, as far as the first policy tells.
    """
    run.record("train")
    total = count_policies(options.policies)
    if total == 0:
        raise ValueError(f"{options.policies} holds no policy")
    artefacts = Artefacts(run, {})
    splits = artefacts.splits
    number = min(_IMAGES, len(splits.validation.labels)) if options.images is None else options.images
    for split, name, asked in (
        (splits.validation, "--images", number),
        (splits.train, "--calibration-images", options.calibration_images),
    ):
        if asked > len(split.labels):
            raise ValueError(f"{name} {asked} is more than the {len(split.labels)} images of that split")
    model, space = artefacts.dense, artefacts.ranked_space
    chosen, tuning = options.fixed_plan(), None
    if chosen is not None:
        chosen.mesh()  # are there so many devices?
    first = list(itertools.islice(read_policies(options.policies), _COMPARED))
    for index, policy in enumerate(first):
        try:
            check_policies(space, policy)
        except ValueError as error:
            raise ValueError(f"{options.policies}, policy {index}: {error}") from error
    images = splits.normalise(splits.validation.images[:number])
    labels = splits.validation.labels[:number]
    calibration = None
    if options.calibration_images:
        calibration = splits.normalise(splits.train.images[: options.calibration_images])
    repair = options.search_config().repair_of(model)
    if chosen is None:
        tuning = tune_plan(
            model, space, images, labels, calibration, cache=cache, repair=repair, **options.plan
        )
        chosen = tuning.plan
    gap = None
    if chosen.precision != "float32":
        gap = precision_gap(model, space, np.stack(first), images, labels, calibration, chosen, repair)
    on_plan(chosen, tuning, gap)
    return evaluate_file(
        model,
        space,
        options.policies,
        options.out,
        images,
        labels,
        calibration,
        chosen,
        repair=repair,
        on_progress=lambda report: on_progress(report, total),
    )

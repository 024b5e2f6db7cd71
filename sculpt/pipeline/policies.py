"""`sculpt evaluate --policies FILE --out FILE`: scores of many policies for the dense network of a run, beside its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sculpt.pipeline.artefacts import Artefacts
from sculpt.report import RunDirectory
from sculpt.scoring import EvaluationPlan, StreamReport, Tuning, evaluate_file, tune_plan
from sculpt.scoring.policy_file import count_policies

PLAN_FIELDS = tuple(field.name for field in dataclasses.fields(EvaluationPlan))


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """What is scored on what.

    Raises:
      ValueError: on numbers out of range.
    """

    policies: Path
    """File of policies, see `sculpt.scoring.read_policies`."""
    out: Path
    """`.jsonl` or `.parquet`."""
    images: int = 512
    """Images of the validation split, the first ones."""
    calibration_images: int = 128
    """Images of the train split for the BatchNorm statistics of each policy; 0: the running ones."""

    def __post_init__(self) -> None:
        if self.images < 1 or self.calibration_images < 0:
            raise ValueError(
                f"expected --images of at least 1 and --calibration-images of at least 0, got {self.images} and "
                f"{self.calibration_images}"
            )


def score_policies_of_run(
    run: RunDirectory,
    options: PolicyOptions,
    plan: dict[str, Any],
    cache: Path,
    on_plan: Callable[[EvaluationPlan, Tuning | None], None],
    on_progress: Callable[[StreamReport, int], None],
) -> StreamReport:
    """Scores the policies of a file for the run's dense network and its space.

    Args:
      run: a run whose network is trained; nothing in it is changed.
      options: what to score.
      plan: fields of `EvaluationPlan` that are asked for; none, or only the precision: the plan is tuned.
      cache: folder that tuned plans are kept in.
      on_plan: told the plan, and how it was found where it was tuned.
      on_progress: told after every block, with the number of policies in all.

    Raises:
      ValueError: on what does not fit, or a network that is not trained yet.
    """
    run.record("train")
    total = count_policies(options.policies)
    artefacts = Artefacts(run, {})
    model, space, splits = artefacts.dense, artefacts.ranked_space, artefacts.splits
    for split, name, asked in (
        (splits.validation, "--images", options.images),
        (splits.train, "--calibration-images", options.calibration_images),
    ):
        if asked > len(split.labels):
            raise ValueError(f"{name} {asked} is more than the {len(split.labels)} images of that split")
    images = splits.normalise(splits.validation.images[: options.images])
    labels = splits.validation.labels[: options.images]
    calibration = None
    if options.calibration_images:
        calibration = splits.normalise(splits.train.images[: options.calibration_images])
    tuning = None
    if set(plan) <= {"precision"}:
        tuning = tune_plan(model, space, images, labels, calibration, cache=cache, **plan)
    chosen = EvaluationPlan(**plan) if tuning is None else tuning.plan
    on_plan(chosen, tuning)
    return evaluate_file(
        model,
        space,
        options.policies,
        options.out,
        images,
        labels,
        calibration,
        chosen,
        on_progress=lambda report: on_progress(report, total),
    )

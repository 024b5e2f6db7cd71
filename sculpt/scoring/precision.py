"""Compares scores in half precision with scores in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sculpt.inputs import number_of
from sculpt.model import Model
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import evaluate_policies
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.problem import Repair


@dataclasses.dataclass(frozen=True)
class PrecisionGap:
    """Largest differences between the scores of a plan and those of the same plan in float32."""

    accuracy: float
    """Of accuracy, in [0, 1]."""
    loss: float
    """Of cross-entropy, nats."""
    policies: int
    images: int

    def describe(self, precision: str) -> str:
        """One line for people."""
        return (
            f"{precision} beside float32, {self.policies} policies on {self.images} images: accuracy differs by "
            f"{self.accuracy:.4f} at the most, loss by {self.loss:.1e}"
        )


def precision_gap(
    model: Model,
    space: Space,
    policies: Any,
    images: Any,
    labels: Any,
    calibration: Any = None,
    plan: EvaluationPlan | None = None,
    repair: Repair = "recalibrate",
) -> PrecisionGap:
    """Scores policies `[n, sites]` by a plan and by the same plan in float32; arguments as of `evaluate_policies`.

    Raises:
      ValueError: as `evaluate_policies` does.
    """
    plan = plan or EvaluationPlan(precision="bfloat16")
    found, exact = (
        evaluate_policies(model, space, policies, images, labels, calibration, chosen, repair)
        for chosen in (plan, dataclasses.replace(plan, precision="float32"))
    )
    accuracy, loss = (
        float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0.0))
        for a, b in ((found.accuracy, exact.accuracy), (found.loss, exact.loss))
    )
    return PrecisionGap(accuracy, loss, len(found.accuracy), number_of(images))

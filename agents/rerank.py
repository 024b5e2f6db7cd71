"""The last step of a search: the proxy score saturates among good policies, so the best few are fine-tuned and compared."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.model import Model
from sculpt.pruning import Space, apply_masks, make_masks
from sculpt.scoring.evaluate import evaluate
from sculpt.scoring.recalibrate import recalibrate
from sculpt.training.data import Splits
from sculpt.training.policies import finetune_policies


@dataclasses.dataclass(frozen=True)
class Referee:
    """Judges one policy at a time by its accuracy on the whole validation split."""

    model: Model
    """The dense network."""
    space: Space
    """Sites and patterns."""
    splits: Splits
    """Fine-tunes on `train` and judges on `validation`; never looks at `test`."""
    config: SearchConfig
    """Whether and how to fine-tune."""
    calibration: jax.Array | None
    """float32 `[k, h, w, c]`: BatchNorm statistics come from these where nothing is fine-tuned; None: left alone."""
    key: jax.Array
    """The same for every candidate: all of them see the same batches."""

    def judge(self, policy: np.ndarray) -> float:
        """Validation accuracy in [0, 1] of `policy` int32 `[sites]`, after fine-tuning (or with `rerank` 0, before any).

        A network whose fine-tuning diverges counts as 0.
        """
        if self.config.rerank:
            config = self.config.rerank_finetune
            teacher = self.model if config.needs_teacher else None
            tuned = finetune_policies(
                self.model, self.space, policy[None], self.splits, config, self.key, teacher=teacher
            )
            return float(tuned.validation_accuracy[0])
        pruned = apply_masks(self.model, make_masks(self.space, self.model.params, jnp.asarray(policy)))
        if self.calibration is not None:
            pruned = recalibrate(pruned, self.calibration)
        validation = self.splits.validation
        images = self.splits.normalise(validation.images)
        return float(evaluate(pruned, images, validation.labels).accuracy)

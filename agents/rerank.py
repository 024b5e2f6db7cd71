"""The last step of a search: the proxy score saturates among good policies, so the best few are fine-tuned and compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.model import Model
from sculpt.pruning import Space, apply_masks, make_masks
from sculpt.scoring.evaluate import evaluate
from sculpt.scoring.recalibrate import recalibrate
from sculpt.scoring.reconstruct import NotFinite, reconstruct
from sculpt.training.data import Splits
from sculpt.training.finetune import finetune
from sculpt.training.run import TrainingDiverged


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
    """float32 `[k, h, w, c]`: candidates are reconstructed on these, or where nothing is fine-tuned recalibrated; None: left alone."""
    key: jax.Array
    """The same for every candidate: all of them see the same batches."""

    def judge(self, policy: np.ndarray) -> float:
        """Validation accuracy in [0, 1] of `policy` int32 `[sites]`, after fine-tuning (or with `rerank` 0, before any).

        A network whose reconstruction or fine-tuning diverges counts as 0.
        """
        masks = make_masks(self.space, self.model.params, jnp.asarray(policy))
        config = self.config.rerank_finetune
        try:
            if not self.config.rerank:
                pruned = self._repaired(masks)
            else:
                # Weights that are to fade must be there to begin with.
                start = self.model if config.gradual else self._repaired(masks)
                teacher = self.model if config.needs_teacher else None
                pruned = finetune(start, masks, self.splits, config, self.key, teacher=teacher)
        except (NotFinite, TrainingDiverged):
            return 0.0
        validation = self.splits.validation
        images = self.splits.normalise(validation.images)
        return float(evaluate(pruned, images, validation.labels).accuracy)

    def _repaired(self, masks: Any) -> Model:
        """The masked network, reconstructed with all effort or recalibrated; statistics are left to fine-tuning where there is any."""
        if self.calibration is not None and self.config.repair_of(self.model) == "reconstruct":
            return reconstruct(self.model, masks, self.calibration)
        pruned = apply_masks(self.model, masks)
        if self.calibration is None or self.config.rerank:
            return pruned
        return recalibrate(pruned, self.calibration)

"""Re-rank: fine-tunes the best few policies briefly and compares them, because the proxy score saturates."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.data.splits import Splits
from sculpt.model import Model
from sculpt.pruning.masks import apply_masks, make_masks
from sculpt.pruning.space import Space
from sculpt.repair.recalibration import recalibrate
from sculpt.repair.reconstruction import NotFinite, reconstruct
from sculpt.scoring.evaluation import evaluate
from sculpt.training.finetuning import finetune
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
    """float32 `[k, h, w, c]`: candidates are reconstructed on these before fine-tuning, or recalibrated before they are judged; None:
    left alone."""
    key: jax.Array
    """The same for every candidate: all of them see the same batches."""

    def judge(self, policy: np.ndarray) -> float:
        """Validation accuracy in [0, 1] of `network(policy)`. A network whose reconstruction or fine-tuning diverges, or whose outputs are not
        finite, counts as 0."""
        try:
            tuned = self.network(policy)
        except (NotFinite, TrainingDiverged):
            return 0.0
        split = self.splits.validation
        accuracy = float(
            evaluate(tuned, split.images, split.labels, normalise=self.splits.normalise).accuracy
        )
        return accuracy if math.isfinite(accuracy) else 0.0

    def network(self, policy: np.ndarray) -> Model:
        """The network under `policy` int32 `[sites]`, after fine-tuning (or with `rerank` 0, before any).

        Raises:
          NotFinite: if its reconstruction diverges.
          TrainingDiverged: if its fine-tuning does.
        """
        masks = make_masks(self.space, self.model.params, jnp.asarray(policy))
        config = self.config.rerank_finetune
        # Weights that are to fade must be there to begin with.
        fades = self.config.rerank and config.gradual
        pruned = self.model if fades else self._pruned(masks)
        if self.config.rerank:
            teacher = self.model if config.needs_teacher else None
            pruned = finetune(pruned, masks, self.splits, config, self.key, teacher=teacher)
        if self.calibration is not None and not self._reconstructs:
            # After so few steps running statistics are still partly those of the dense network.
            pruned = recalibrate(pruned, self.calibration)
        return pruned

    @property
    def _reconstructs(self) -> bool:
        return self.calibration is not None and self.config.repair_of(self.model) == "reconstruct"

    def _pruned(self, masks: Any) -> Model:
        """The masked network, reconstructed with all effort where that is asked for."""
        if self._reconstructs:
            return reconstruct(self.model, masks, self.calibration)
        return apply_masks(self.model, masks)

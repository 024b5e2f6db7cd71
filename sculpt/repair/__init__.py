"""Mending a pruned network without gradients: BatchNorm statistics recalibrated, layers fitted to the dense ones."""

from sculpt.repair.recalibration import recalibrate
from sculpt.repair.reconstruction import reconstruct

__all__ = [
    "recalibrate",
    "reconstruct",
]

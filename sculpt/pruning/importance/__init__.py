"""Importance: which units of a coupled group go first."""

from sculpt.pruning.importance.scores import KINDS, Importance, importance

__all__ = ["KINDS", "Importance", "importance"]

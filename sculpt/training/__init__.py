"""Training with masks held: recipes, the compiled step, checkpoints."""

from sculpt.training.checkpoint import Checkpoints
from sculpt.training.config import FinetuneConfig
from sculpt.training.finetuning import TrainingDiverged, finetune, train
from sculpt.training.held_zeros import hold_zeros
from sculpt.training.policies import TunedPolicies, finetune_policies
from sculpt.training.recipes import RECIPES, Recipe, recipe_for

__all__ = [
    "RECIPES",
    "Checkpoints",
    "FinetuneConfig",
    "Recipe",
    "TrainingDiverged",
    "TunedPolicies",
    "finetune",
    "finetune_policies",
    "hold_zeros",
    "recipe_for",
    "train",
]

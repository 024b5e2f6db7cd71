"""Teaching the survivor: data, augmentation, masked training, checkpoints."""

from sculpt.training.checkpoint import Checkpoints
from sculpt.training.config import FinetuneConfig
from sculpt.training.data import Split, Splits, from_arrays, from_examples, from_sources
from sculpt.training.finetune import TrainingDiverged, finetune, train
from sculpt.training.hold_zeros import hold_zeros
from sculpt.training.load import load_data, load_folder, load_parquet
from sculpt.training.policies import TunedPolicies, finetune_policies
from sculpt.training.recipes import RECIPES, Recipe, recipe_for
from sculpt.training.stream import Source, StreamedImages

__all__ = [
    "RECIPES",
    "Checkpoints",
    "FinetuneConfig",
    "Recipe",
    "Source",
    "Split",
    "Splits",
    "StreamedImages",
    "TrainingDiverged",
    "TunedPolicies",
    "finetune",
    "finetune_policies",
    "from_arrays",
    "from_examples",
    "from_sources",
    "hold_zeros",
    "load_data",
    "load_folder",
    "load_parquet",
    "recipe_for",
    "train",
]

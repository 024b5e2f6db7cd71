"""Teaching the survivor: data, augmentation, masked training, checkpoints."""

from sculpt.training.checkpoint import Checkpoints
from sculpt.training.config import FinetuneConfig
from sculpt.training.data import Split, Splits, from_arrays, load_data, load_folder, load_parquet
from sculpt.training.finetune import TrainingDiverged, finetune, train

__all__ = [
    "Checkpoints",
    "FinetuneConfig",
    "Split",
    "Splits",
    "TrainingDiverged",
    "finetune",
    "from_arrays",
    "load_data",
    "load_folder",
    "load_parquet",
    "train",
]

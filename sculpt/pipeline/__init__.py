"""From a name to a pruned network: the stages of `sculpt prune` on a run directory."""

from sculpt.pipeline.progress import Watcher
from sculpt.pipeline.settings import SECTIONS, FinetuneSettings, SearchSettings, TrainSettings
from sculpt.pipeline.stages import STAGES, Pipeline

__all__ = [
    "SECTIONS",
    "STAGES",
    "FinetuneSettings",
    "Pipeline",
    "SearchSettings",
    "TrainSettings",
    "Watcher",
]

"""What a run is asked to do; each class is a section of `config.json`, each field an option of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt.agents import SearchConfig
from sculpt.report.run_directory import RunDirectory
from sculpt.training import FinetuneConfig, Splits


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Where the dense network comes from."""

    model: str
    """Name of a network, one of `sculpt.nets.list_models()`."""
    dataset: str
    """Name of a data set, as `sculpt.load_data` takes it."""
    seed: int = 0
    """Of every random draw of the run."""
    data_dir: str | None = None
    """Folder of the data set, where it needs one."""
    weights: str | None = None
    """File of pretrained weights; None: train from scratch."""
    train_epochs: int = 20
    """Epochs of dense training."""
    train_learning_rate: float = 0.1
    """Its peak learning rate."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.weights is not None and not Path(self.weights).is_file():
            raise ValueError(f"no weights at {self.weights}: give the path of a .safetensors file")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"no such data directory: {self.data_dir}")
        self.config(augment="none")

    def config(self, augment: Any) -> FinetuneConfig:
        """How the dense network is trained."""
        return FinetuneConfig(
            epochs=self.train_epochs, learning_rate=self.train_learning_rate, augment=augment
        )


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """What is searched for, and how long."""

    budget: float = 0.5
    """Theoretical MACs kept / dense, at the most."""
    families: tuple[str, ...] = ("channels", "rect")
    """Pattern families."""
    method: str = "agent"
    """Who proposes policies; see `SearchConfig.method`."""
    evaluations: int = 512
    """Policies scored."""
    rerank: int = 4
    """Policies that are fine-tuned briefly for the last choice."""
    round_to: int = 1
    """Kept channel counts are multiples of it."""

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "families", tuple(self.families))
        self.config()

    def config(self) -> SearchConfig:
        """The settings of the search; a checkpoint about every tenth part."""
        config = SearchConfig(
            method=self.method,  # type: ignore[arg-type]
            budget=self.budget,
            evaluations=self.evaluations,
            rerank=self.rerank,
        )
        return dataclasses.replace(config, checkpoint_every=max(1, config.updates // 10))


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """How the pruned network is fine-tuned."""

    finetune_epochs: int = 15
    """Epochs."""
    finetune_learning_rate: float = 0.03
    """Peak learning rate."""

    def __post_init__(self) -> None:
        self.config(augment="none")

    def config(self, augment: Any) -> FinetuneConfig:
        """How the pruned network is fine-tuned."""
        return FinetuneConfig(
            epochs=self.finetune_epochs, learning_rate=self.finetune_learning_rate, augment=augment
        )


SECTIONS: dict[str, type] = {
    "train": TrainSettings,
    "search": SearchSettings,
    "finetune": FinetuneSettings,
}
"""Section of `config.json` -> its settings."""


def read_settings(run: RunDirectory, section: str, given: Mapping[str, Any]) -> Any:
    """The settings of a section: those on disk, or else the given ones and defaults. Writes nothing.

    Raises:
      ValueError: if a setting is bad, missing, or differs from the one on disk.
    """
    kind = SECTIONS[section]
    fields = dataclasses.fields(kind)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    own = {f.name: given[f.name] for f in fields if f.name in given}
    merged = run.merged(section, own, defaults)
    names = {f.name for f in fields}
    missing, unknown = sorted(names - set(merged)), sorted(set(merged) - names)
    if unknown:
        raise ValueError(f"{run.path} was written by another version: unknown {section} settings {unknown}")
    if missing:
        options = " and ".join(f"--{name}" for name in missing)
        raise ValueError(f"a new run needs {options}")
    return kind(**merged)


def augmentation(splits: Splits) -> str:
    """How images are augmented: grey ones (digits, letters) must not be mirrored, colour ones (things) may be."""
    return "shift" if len(splits.mean) == 1 else "crop_flip"

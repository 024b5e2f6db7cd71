"""What a run is asked to do; each class is a section of `config.json`, each field an option of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sculpt.agents import SearchConfig
from sculpt.pruning import KINDS
from sculpt.report.run_directory import RunDirectory
from sculpt.scoring.recalibrate import check_calibration_images
from sculpt.training import FinetuneConfig, Splits

_PATHS = ("data_dir", "weights")
DEFAULT_IMPORTANCE = "energy"
"""What masks rank channels by when they are told nothing."""


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
    augment: str | None = None
    """How train images are varied: "none", "shift", "crop_flip" or "resized_crop", see `FinetuneConfig.augment`; None: by the data."""
    weights: str | None = None
    """File of pretrained weights; None: train from scratch."""
    train_epochs: int = 20
    """Epochs of dense training."""
    train_learning_rate: float = 0.1
    """Its peak learning rate."""
    train_clip_norm: float | None = None
    """Largest norm of its gradients; None: any."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        self.config("none" if self.augment is None else self.augment)
        if self.weights is not None:
            training = ("train_epochs", "train_learning_rate", "train_clip_norm")
            _refuse(self, training, "pretrained weights are not trained")
        if self.dataset == "digits":
            _refuse(self, ("data_dir",), "digits comes with the package")

    def config(self, augment: Any) -> FinetuneConfig:
        """How the dense network is trained."""
        return FinetuneConfig(
            epochs=self.train_epochs,
            learning_rate=self.train_learning_rate,
            clip_norm=self.train_clip_norm,
            augment=augment,
        )

    def augmentation(self, splits: Splits) -> str:
        """How images are varied: as asked, or else grey ones (digits, letters) are shifted, colour ones mirrored as well."""
        if self.augment is not None:
            return self.augment
        return "shift" if len(splits.mean) == 1 else "crop_flip"


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
    objective: str = "accuracy"
    """What a policy is scored by; see `SearchConfig.objective`."""
    score_images: int = 256
    """Images of the train split that a policy is scored on."""
    calibration_images: int = 128
    """Further ones, for the BatchNorm statistics of each pruned network."""
    importance: str = DEFAULT_IMPORTANCE
    """Which channels of a group go first: one of `sculpt.pruning.KINDS`."""
    rerank: int = 4
    """Policies that are fine-tuned briefly for the last choice."""
    round_to: int = 1
    """Kept channel counts are multiples of it."""

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "families", tuple(self.families))
        self.config()
        check_calibration_images(self.calibration_images)
        if self.importance not in KINDS:
            raise ValueError(f"importance must be one of {', '.join(KINDS)}, got {self.importance!r}")
        if "channels" not in self.families:
            families = ", ".join(self.families)
            _refuse(self, ("importance", "round_to"), f"families {families} removes no channels")

    def config(self) -> SearchConfig:
        """The settings of the search; a checkpoint about every tenth part."""
        config = SearchConfig(
            method=self.method,  # type: ignore[arg-type]
            budget=self.budget,
            evaluations=self.evaluations,
            objective=self.objective,  # type: ignore[arg-type]
            score_images=self.score_images,
            calibration_images=self.calibration_images,
            rerank=self.rerank,
        )
        return dataclasses.replace(config, checkpoint_every=max(1, config.updates // 10))

    def check_images(self, splits: Splits) -> None:
        """Raises ValueError unless the train split is large enough to score and calibrate on."""
        need, have = self.score_images + self.calibration_images, len(splits.train.labels)
        if need > have:
            raise ValueError(
                f"--score-images {self.score_images} and --calibration-images {self.calibration_images} need {need} images "
                f"of the train split of {splits.name}, which has {have}: lower them"
            )


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """How the pruned network is fine-tuned."""

    finetune_epochs: int = 15
    """Epochs."""
    finetune_learning_rate: float = 0.03
    """Peak learning rate."""
    finetune_clip_norm: float | None = None
    """Largest norm of the gradients; None: any."""

    def __post_init__(self) -> None:
        self.config(augment="none")

    def config(self, augment: Any) -> FinetuneConfig:
        """How the pruned network is fine-tuned."""
        return FinetuneConfig(
            epochs=self.finetune_epochs,
            learning_rate=self.finetune_learning_rate,
            clip_norm=self.finetune_clip_norm,
            augment=augment,
        )


SECTIONS: dict[str, type] = {
    "train": TrainSettings,
    "search": SearchSettings,
    "finetune": FinetuneSettings,
}
"""Section of `config.json` -> its settings."""


def _refuse(settings: Any, names: Sequence[str], why: str) -> None:
    """Raises ValueError where fields that have no effect are given another value than their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    if asked := [name for name in names if getattr(settings, name) != defaults[name]]:
        options = " and ".join(f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in asked)
        raise ValueError(f"leave out {options}, which would have no effect: {why}")


def read_settings(run: RunDirectory, section: str, given: Mapping[str, Any]) -> Any:
    """The settings of a section: those on disk, or else the given ones and defaults. Writes nothing.

    Paths become absolute, so that a run goes on from any working directory; nothing is looked up at them yet.

    Raises:
      ValueError: if a setting is bad, missing, or differs from the one on disk.
    """
    kind = SECTIONS[section]
    fields = dataclasses.fields(kind)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    own = {f.name: given[f.name] for f in fields if f.name in given}
    for name in _PATHS:
        if own.get(name) is not None:
            own[name] = str(Path(own[name]).expanduser().resolve())
    merged = run.merged(section, own, defaults)
    names = {f.name for f in fields}
    missing, unknown = sorted(names - set(merged)), sorted(set(merged) - names)
    if unknown or (missing and section in run.config):
        raise ValueError(
            f"{run.path} was written by another version, choose another --run: its {section} settings lack {missing} "
            f"and have the unknown {unknown}"
        )
    if missing:
        options = " and ".join(f"--{name}" for name in missing)
        raise ValueError(f"a new run needs {options}")
    return kind(**merged)

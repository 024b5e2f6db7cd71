"""Settings of a run: each class is a section of `config.json`, each field a command-line option."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sculpt import nets
from sculpt.agents.config import LEARNERS, RULES, SearchConfig
from sculpt.arguments import did_you_mean, is_whole
from sculpt.data.decode import check_size
from sculpt.data.named import ONE_SIZE
from sculpt.data.splits import Splits
from sculpt.latency.engines import engine_of
from sculpt.model import Model
from sculpt.pruning.importance.scores import KINDS
from sculpt.repair.recalibration import check_calibration_images, has_statistics, images_used
from sculpt.report.run_directory import RunDirectory
from sculpt.training.config import FinetuneConfig
from sculpt.training.recipes import LARGE_IMAGES, RECIPES, Recipe, recipe_for

_RECONSTRUCTION_IMAGES = 512
_PATHS = ("data_dir", "weights", "agent")
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
    image_size: int | None = None
    """Pixels that images are brought to, as `size` of `sculpt.load_data`; None: they are of one size already."""
    stream: bool = False
    """Whether train images stay on disk and are read while they are used."""
    skip_unreadable: bool = False
    """Whether images that cannot be decoded are left out, instead of being an error."""
    augment: str | None = None
    """How train images are varied: "none", "shift", "crop_flip" or "resized_crop", see `FinetuneConfig.augment`; None: by the data."""
    weights: str | None = None
    """File of pretrained weights; None: train from scratch."""
    new_head: bool = False
    """Whether the weights are for other classes: their head is drawn anew, and the network trained."""
    recipe: str | None = None
    """How the network is trained and fine-tuned: one of `sculpt.training.RECIPES`; None: by the network and the images."""
    batch_size: int = 64
    """Images per step of training and fine-tuning."""
    train_epochs: int = 20
    """Epochs of dense training."""
    train_learning_rate: float | None = None
    """Its peak learning rate; None: that of the recipe."""
    train_clip_norm: float | None = None
    """Largest norm of its gradients; None: any."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.recipe is not None and self.recipe not in RECIPES:
            hint = did_you_mean(self.recipe, RECIPES)
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}{hint}")
        self._config(RECIPES["residual"], "none" if self.augment is None else self.augment)
        if self.new_head and self.weights is None:
            raise ValueError("--new-head goes with --weights, which would give all but the head")
        if not self.trains:
            training = ("train_epochs", "train_learning_rate", "train_clip_norm")
            _refuse(self, training, "pretrained weights are not trained, save with a new head")
        if self.dataset == "digits":
            _refuse(self, ("data_dir",), "digits comes with the package")
        if self.dataset in ONE_SIZE:
            _refuse(
                self, ("image_size", "stream", "skip_unreadable"), f"{self.dataset} is small and of one size"
            )
        check_size(self.image_size)

    @property
    def trains(self) -> bool:
        """Whether the dense network is trained, or taken as it is."""
        return self.weights is None or self.new_head

    def config(self, splits: Splits) -> FinetuneConfig:
        """How the dense network is trained; pretrained weights as gently as after pruning."""
        return self._config(self.recipe_for(splits), self.augmentation(splits))

    def _config(self, recipe: Recipe, augment: Any) -> FinetuneConfig:
        trained = recipe.train if self.weights is None else recipe.finetune
        return trained(
            epochs=self.train_epochs,
            batch_size=self.batch_size,
            clip_norm=self.train_clip_norm,
            augment=augment,
            **_given(learning_rate=self.train_learning_rate),
        )

    def recipe_for(self, splits: Splits) -> Recipe:
        """The recipe asked for, or that of the network and the size of the images."""
        if self.recipe is not None:
            return RECIPES[self.recipe]
        return recipe_for(nets.family(self.model), _side(splits))

    def augmentation(self, splits: Splits) -> str:
        """How images are varied: as asked, or else grey ones (digits, letters) are shifted, small colour ones cropped and mirrored,
        large ones cut out at random and mirrored."""
        if self.augment is not None:
            return self.augment
        if len(splits.mean) == 1:
            return "shift"
        return "crop_flip" if _side(splits) < LARGE_IMAGES else "resized_crop"


def unused_by(method: str) -> dict[str, str]:
    """Settings of a search that a method does not use, and why."""
    unused = {}
    if method != "agent":
        unused["agent"] = f"method {method} learns nothing that another could begin with"
    if method not in LEARNERS:
        unused["front"] = f"method {method} looks for one budget only"
    if method in RULES:
        unused["evaluations"] = f"method {method} proposes one policy"
    return unused


RESOURCES = ("macs", "macs_realised", "params", "latency")
"""What budgets can be of."""


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """What is searched for, and how long."""

    budget: float = 0.5
    """Share of the resource that is kept, at the most."""
    resource: tuple[str, ...] = ("macs",)
    """What budgets are shares of: of `RESOURCES`; with several the budget holds for each."""
    latency_engine: str = "xla"
    """Engine that layers are measured in, for the resource "latency"."""
    latency_batch: int = 32
    """Images per call, likewise."""
    latency_threads: int | None = None
    """CPU cores that the engine has, likewise; None: all that the process may use."""
    latency_all_sizes: bool = False
    """Whether layers are measured at all their sizes together, which takes longer and is more accurate."""
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
    """Further ones, for what `repair` does."""
    repair: str | None = None
    """What is done to each pruned network before it is scored; see `SearchConfig.repair`."""
    importance: str = DEFAULT_IMPORTANCE
    """Which channels of a group go first: one of `sculpt.pruning.KINDS`."""
    rerank: int = 4
    """Policies that are fine-tuned briefly for the last choice."""
    round_to: int | str = 1
    """Widths are multiples of it, or of what suits a device: "cpu", "gpu", "tpu"."""
    min_keep: int = 1
    """Least number of columns of a group that stay. 0: a residual branch can be removed completely."""
    exclude: tuple[str, ...] = ()
    """Layers that stay as they are; see `make_space`."""
    front: tuple[float, ...] = ()
    """Further budgets that the agent learns for beside; see `SearchConfig.front`."""
    agent: str | None = None
    """File of what an agent learned on other networks; None: it begins anew."""

    def __post_init__(self) -> None:
        # JSON has no tuples.
        object.__setattr__(self, "families", tuple(self.families))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "front", tuple(self.front))
        object.__setattr__(self, "resource", tuple(self.resource))
        self.config()
        if (
            not self.resource
            or len(set(self.resource)) < len(self.resource)
            or set(self.resource) - set(RESOURCES)
        ):
            given = ", ".join(self.resource) or "none"
            hint = "".join(did_you_mean(name, RESOURCES) for name in self.resource if name not in RESOURCES)
            raise ValueError(f"resource must be of {', '.join(RESOURCES)}, each once, got {given}{hint}")
        if "latency" in self.resource:
            engine_of(self.latency_engine)
            if not is_whole(self.latency_batch, 1):
                raise ValueError(
                    f"latency_batch must be a whole number of at least 1, got {self.latency_batch!r}"
                )
            if self.latency_threads is not None and not is_whole(self.latency_threads, 1):
                raise ValueError(
                    f"latency_threads must be a whole number of at least 1, got {self.latency_threads!r}"
                )
        else:
            _refuse(
                self,
                ("latency_engine", "latency_batch", "latency_threads", "latency_all_sizes"),
                "no latency is measured without --resource latency",
            )
        for name, why in unused_by(self.method).items():
            _refuse(self, (name,), why)
        if self.repair != "reconstruct":
            check_calibration_images(self.calibration_images)
        if self.importance not in KINDS:
            hint = did_you_mean(self.importance, KINDS)
            raise ValueError(f"importance must be one of {', '.join(KINDS)}, got {self.importance!r}{hint}")
        if "channels" not in self.families:
            families = ", ".join(self.families)
            _refuse(self, ("importance", "round_to", "min_keep"), f"families {families} removes no channels")

    def image_counts(self, images: int) -> tuple[int, int]:
        """Images to score on and to calibrate on: as asked for; the defaults are lowered for a small train split."""
        counts = self.score_images, self.calibration_images
        if (
            counts == (SearchSettings.score_images, SearchSettings.calibration_images)
            and sum(counts) > images
        ):
            calibration = min(counts[1], images_used(images // 3))
            return min(counts[0], images - calibration), calibration
        return counts

    def config_for(self, images: int) -> SearchConfig:
        """The settings of the search on a train split of so many images."""
        config = self.config()
        score, calibration = self.image_counts(images)
        brief = config.rerank_finetune
        if config.rerank and brief.batch_size > images:
            brief = dataclasses.replace(brief, batch_size=images)
        return dataclasses.replace(
            config, score_images=score, calibration_images=calibration, rerank_finetune=brief
        )

    def config(self) -> SearchConfig:
        """The settings of the search; a checkpoint about every tenth part."""
        config = SearchConfig(
            method=self.method,  # type: ignore[arg-type]
            budget=self.budget,
            evaluations=self.evaluations,
            objective=self.objective,  # type: ignore[arg-type]
            score_images=self.score_images,
            calibration_images=self.calibration_images,
            repair=self.repair,  # type: ignore[arg-type]
            rerank=self.rerank,
            front=self.front,
        )
        return dataclasses.replace(config, checkpoint_every=max(1, config.updates // 10))

    def check_images(self, splits: Splits) -> None:
        """Raises ValueError unless the train split is large enough to score and calibrate on."""
        have = len(splits.train.labels)
        need = sum(self.image_counts(have))
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
    finetune_learning_rate: float | None = None
    """Peak learning rate; None: that of the recipe."""
    finetune_clip_norm: float | None = None
    """Largest norm of the gradients; None: any."""
    distillation: float = 0.5
    """Share of the loss that follows the dense network's predictions instead of the labels, in [0, 1]."""
    gradual: float = 0.0
    """Share of the steps, in [0, 1), over which pruned weights fade to zero; 0: they are zero at once."""
    reconstruct_images: int | None = None
    """Images of the train split on which what is left of every layer is fitted to the dense layer, before the first step; 0: none. None:
    512 for networks without BatchNorm, which gain most by it (benchmarks/results/bench_reconstruct.md), and none with `gradual`."""

    def __post_init__(self) -> None:
        self._config(RECIPES["residual"])
        if self.reconstruct_images is not None and not is_whole(self.reconstruct_images, 0):
            raise ValueError(
                f"reconstruct_images must be a whole number of at least 0, got {self.reconstruct_images!r}"
            )
        if self.gradual and self.reconstruct_images:
            _refuse(self, ("reconstruct_images",), "with --gradual pruned weights are there to begin with")

    def images_to_reconstruct(self, model: Model) -> int:
        """On how many images this network is reconstructed."""
        if self.reconstruct_images is not None:
            return self.reconstruct_images
        return 0 if self.gradual or has_statistics(model) else _RECONSTRUCTION_IMAGES

    def config(self, train: TrainSettings, splits: Splits) -> FinetuneConfig:
        """How the pruned network is fine-tuned, by the recipe, batches and augmentation of the dense one."""
        return self._config(
            train.recipe_for(splits), augment=train.augmentation(splits), batch_size=train.batch_size
        )

    def _config(self, recipe: Recipe, **common: Any) -> FinetuneConfig:
        return recipe.finetune(
            epochs=self.finetune_epochs,
            clip_norm=self.finetune_clip_norm,
            distillation=self.distillation,
            gradual=self.gradual,
            **_given(learning_rate=self.finetune_learning_rate),
            **common,
        )


SECTIONS: dict[str, type] = {
    "train": TrainSettings,
    "search": SearchSettings,
    "finetune": FinetuneSettings,
}
"""Section of `config.json` -> its settings."""


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _side(splits: Splits) -> int:
    """The shorter side of the images, in pixels."""
    return min(splits.train.images.shape[1:3])


def _refuse(settings: Any, names: Sequence[str], why: str) -> None:
    """Raises ValueError where fields that have no effect are given another value than their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    if asked := [name for name in names if getattr(settings, name) != defaults[name]]:
        options = " and ".join(_typed(name, getattr(settings, name)) for name in asked)
        raise ValueError(f"leave out {options}, which would have no effect: {why}")


def _typed(name: str, value: Any) -> str:
    """The option as it is typed."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, tuple | list):
        value = ",".join(map(str, value))
    return option if value is True else f"{option} {value}"


def read_settings(
    run: RunDirectory, section: str, given: Mapping[str, Any], ignored: list[str] | None = None
) -> Any:
    """The settings of a section: those on disk, or else the given ones and defaults. Writes nothing.

    Paths become absolute, so that a run goes on from any working directory; nothing is looked up at them yet. Given settings that the
    method of the search does not use are left out, so that one command line serves several methods; `ignored` is told of each.

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
    if section == "search":
        there = run.config.get(section, {})
        method = own.get("method", there.get("method", SearchSettings.method))
        for name, why in unused_by(method).items():
            if name in own and (value := own.pop(name)) != defaults[name] and ignored is not None:
                ignored.append(f"{_typed(name, value)} is ignored: {why}")
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

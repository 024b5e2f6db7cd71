"""The stages of a run. Each reads what the ones before left in the run directory and leaves its own; done means skipped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt import nets
from sculpt.agents import search
from sculpt.deploy import export_stablehlo, load_params, save_params
from sculpt.model import Model, from_linen
from sculpt.pipeline import closing
from sculpt.pipeline.progress import Watcher
from sculpt.pipeline.settings import (
    SECTIONS,
    FinetuneSettings,
    SearchSettings,
    TrainSettings,
    augmentation,
    read_settings,
)
from sculpt.pruning import Space, apply_masks, check_budget, compact, count_cost, make_masks, make_space
from sculpt.report import RunDirectory
from sculpt.scoring import evaluate
from sculpt.tracing import trace
from sculpt.training import Splits, finetune, load_data, train

STAGES = ("train", "search", "finetune", "compact", "evaluate", "export", "report")
"""In the order in which they run; each is a command."""
_NEEDS = {"train": ("train",), "search": ("train", "search"), "finetune": tuple(SECTIONS)}
_DRAWS = {"init": 0, "train": 1, "search": 2, "finetune": 3}
"""What the seed is folded with, for each use."""


_EXAMPLE_BATCH = 128


class Pipeline:
    """A run on a run directory.

    Args:
      run: the directory.
      given: settings asked for explicitly, by the names of the fields in `sculpt.pipeline.settings`.
      watcher: told about progress; None: nobody is.

    Raises:
      ValueError: if the directory holds a run with other settings.
    """

    def __init__(self, run: RunDirectory, given: Mapping[str, Any], watcher: Watcher | None = None) -> None:
        self.run = run
        self._given = given
        self._watcher = watcher or Watcher()

    def execute(self, stages: tuple[str, ...] = STAGES) -> None:
        """Runs stages that are not complete.

        Everything that can be wrong with the settings is found before anything is computed or written.

        Raises:
          ValueError: on bad settings or data, an unreachable budget, or a stage whose predecessor is not complete.
        """
        sections = [s for s in SECTIONS if any(s in _NEEDS.get(stage, SECTIONS) for stage in stages)]
        settings = {section: getattr(self, f"{section}_settings") for section in sections}
        for needed in STAGES[: STAGES.index(stages[0])]:
            self.run.record(needed)
        if not all(self.run.done(stage) for stage in stages):
            data = self._data()
            if self.run.done("data") and self.run.record("data") != data:
                raise ValueError(
                    f"the data set {self.splits.name} is not the one that {self.run.path} was begun with"
                )
            if "search" in sections:
                check_budget(self.space, self.search_settings.budget)
            for section in sections:
                self.run.settle(section, dataclasses.asdict(settings[section]))
            self.run.complete("data", data)
        for stage in stages:
            if self.run.done(stage):
                self._watcher.finish(stage, None)
                continue
            self._watcher.start(stage)
            begin = time.perf_counter()
            record = getattr(self, f"_{stage}")()
            seconds = time.perf_counter() - begin
            self.run.complete(stage, {**record, "stage_seconds": seconds})
            shutil.rmtree(self._checkpoints(stage), ignore_errors=True)
            self._watcher.finish(stage, seconds)

    @functools.cached_property
    def train_settings(self) -> TrainSettings:
        return read_settings(self.run, "train", self._given)

    @functools.cached_property
    def search_settings(self) -> SearchSettings:
        return read_settings(self.run, "search", self._given)

    @functools.cached_property
    def finetune_settings(self) -> FinetuneSettings:
        return read_settings(self.run, "finetune", self._given)

    @functools.cached_property
    def splits(self) -> Splits:
        settings = self.train_settings
        return load_data(settings.dataset, settings.data_dir, seed=settings.seed)

    @functools.cached_property
    def image(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one normalised image, as a batch of one."""
        return jax.ShapeDtypeStruct((1, *self.splits.train.images.shape[1:]), jnp.float32)

    @functools.cached_property
    def example(self) -> jax.Array:
        """Normalised images `[batch, height, width, channels]` of the train split, to measure latency and export on."""
        return jnp.asarray(self.splits.normalise(self.splits.train.images[:_EXAMPLE_BATCH]))

    @functools.cached_property
    def untrained(self) -> Model:
        """The network as it starts: drawn by the seed, or with pretrained weights."""
        settings = self.train_settings
        if settings.weights is None:
            module = nets.create(settings.model, self.splits.num_classes)
            variables = jax.jit(module.init)(self.key("init"), jnp.zeros(self.image.shape))
        else:
            module, variables = nets.load(settings.model, settings.weights, self.splits.num_classes)
        model = from_linen(module, variables)
        _check_takes(model, self.image, settings)
        return model

    @functools.cached_property
    def space(self) -> Space:
        settings = self.search_settings
        return make_space(trace(self.untrained, self.image), settings.families, settings.round_to)

    @functools.cached_property
    def dense(self) -> Model:
        return self._load("dense", self.untrained)

    @functools.cached_property
    def policy(self) -> np.ndarray:
        return np.asarray(self.run.record("search")["policy"], np.int32)

    @functools.cached_property
    def masks(self) -> Any:
        like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bool_), self.dense.params)
        return load_params(self.run.path / "masks.safetensors", like)

    @functools.cached_property
    def tuned(self) -> Model:
        return self._load("params", self.untrained)

    @functools.cached_property
    def small(self) -> Model:
        return self._load("compact", compact(self.tuned, self.space, self.policy, check=False))

    def key(self, use: str) -> jax.Array:
        """The key of one use of randomness."""
        return jax.random.fold_in(jax.random.key(self.train_settings.seed), _DRAWS[use])

    def _data(self) -> dict[str, Any]:
        """What tells the data set and the network's size from others."""
        digest = hashlib.sha256()
        for split in (self.splits.train, self.splits.validation):
            digest.update(np.ascontiguousarray(split.images).tobytes())
            digest.update(np.ascontiguousarray(split.labels).tobytes())
        return {"sha256": digest.hexdigest(), "parameters": count_leaves(self.untrained)}

    def _train(self) -> dict[str, Any]:
        settings = self.train_settings
        model = self.untrained
        if settings.weights is None:
            config = settings.config(augmentation(self.splits))
            model = train(model, self.splits, config, self.key("train"), **self._hooks("train"))
        self._save("dense", model)
        return {"source": settings.weights or "trained", **self._validated(model)}

    def _search(self) -> dict[str, Any]:
        config = self.search_settings.config()
        total = config.updates * config.policies_per_update

        def on_metrics(row: Mapping[str, float]) -> None:
            self.run.log("search", row)
            done = int(row["update"]) * config.policies_per_update
            self._watcher.progress(done, total, "policies", f"best {row['best']:.3f}")
            if done == total and config.rerank:
                self._watcher.progress(done, total, "policies", f"fine-tuning the best {config.rerank}")

        found = search(
            self.dense,
            self.space,
            self.splits,
            config,
            self.key("search"),
            directory=self._checkpoints("search"),
            on_metrics=on_metrics,
        )
        masks = make_masks(self.space, self.dense.params, found.policy)
        save_params(masks, self.run.path / "masks.safetensors", {"policy": str(found.policy.tolist())})
        return {
            "policy": found.policy,
            "score": found.score,
            "macs_ratio": found.macs_ratio,
            "validation_accuracy": found.validation_accuracy,
            "n_validation": len(self.splits.validation.labels),
            "n_score": config.score_images,
            "pareto": [(ratio, accuracy) for ratio, accuracy, _ in found.pareto],
            "evaluations": found.evaluations,
            "unique_evaluations": found.unique_evaluations,
            "seconds": found.seconds,
            "policies_per_second": found.policies_per_second,
            "history": found.history,
        }

    def _finetune(self) -> dict[str, Any]:
        config = self.finetune_settings.config(augmentation(self.splits))
        pruned = apply_masks(self.dense, self.masks)
        model = finetune(
            pruned, self.masks, self.splits, config, self.key("finetune"), **self._hooks("finetune")
        )
        self._save("params", model)
        return self._validated(model)

    def _compact(self) -> dict[str, Any]:
        small = compact(self.tuned, self.space, self.policy)
        images = self.splits.normalise(self.splits.validation.images[:512])
        difference = np.abs(
            np.asarray(_logits(self.tuned, images)) - np.asarray(_logits(small, images))
        ).max()
        self._save("compact", small)
        macs, params = count_cost(small, self.image)
        return {
            "max_abs_diff": float(difference),
            "n_images": len(images),
            "macs": macs,
            "params": params,
            "arrays": small.apply.describe(),  # type: ignore[attr-defined]
        }

    def _evaluate(self) -> dict[str, Any]:
        record = closing.measure(self)
        self.run.write_result(closing.result(self, record))
        return record

    def _export(self) -> dict[str, Any]:
        file = self.run.path / "compact.stablehlo"
        exported = export_stablehlo(self.small, file, self.example)
        return {
            "batch": exported.batch,
            "platforms": exported.program.platforms,
            "bytes": file.stat().st_size,
        }

    def _report(self) -> dict[str, Any]:
        return {"plots": closing.write_report(self)}

    def _validated(self, model: Model) -> dict[str, Any]:
        split = self.splits.validation
        accuracy = evaluate(model, self.splits.normalise(split.images), split.labels).accuracy
        return {"validation_accuracy": float(accuracy), "n_validation": len(split.labels)}

    def _hooks(self, stage: str) -> dict[str, Any]:
        latest = {"note": ""}

        def on_metrics(row: Mapping[str, float]) -> None:
            self.run.log(stage, row)
            latest["note"] = f"validation {row['validation_accuracy']:.3f}"

        def on_progress(done: int, total: int) -> None:
            self._watcher.progress(done, total, "steps", latest["note"])

        return {
            "directory": self._checkpoints(stage),
            "on_metrics": on_metrics,
            "on_progress": on_progress,
        }

    def _checkpoints(self, stage: str) -> Path:
        return self.run.path / "checkpoints" / stage

    def _save(self, name: str, model: Model) -> None:
        save_params({"params": model.params, "state": model.state}, self.run.path / f"{name}.safetensors")

    def _load(self, name: str, like: Model) -> Model:
        arrays = load_params(
            self.run.path / f"{name}.safetensors", {"params": like.params, "state": like.state}
        )
        return like.replace(**arrays)


def describe(given: Mapping[str, Any]) -> Space:
    """The search space of a network and data set by name, without a run; a budget among the settings is checked.

    Raises:
      ValueError: on bad settings, or a budget that cannot be reached.
    """
    pipeline = Pipeline(RunDirectory(Path("-")), given)
    if "budget" in given:
        check_budget(pipeline.space, given["budget"])
    return pipeline.space


def count_leaves(model: Model) -> int:
    """Number of values in a model's parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.params))


@jax.jit
def _logits(model: Model, images: Any) -> jax.Array:
    return model(images)


def _check_takes(model: Model, image: jax.ShapeDtypeStruct, settings: TrainSettings) -> None:
    """Raises ValueError unless the network takes such images."""
    from flax.errors import FlaxError

    try:
        jax.eval_shape(model.apply, model.params, model.state, image)
    # What a network raises for images of a wrong shape depends on its first operation.
    except (FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{settings.model} with {settings.weights or 'fresh weights'} does not take the images "
            f"{list(image.shape[1:])} of {settings.dataset} ({type(error).__name__})"
        ) from error

"""The stages of a run. Each reads the files of earlier stages and writes its own; finished stages are skipped."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sculpt.agents.config import SearchConfig
from sculpt.agents.loop import search, trial_network
from sculpt.agents.result import SearchResult
from sculpt.environment import check_threads
from sculpt.export.agreement import model_logits
from sculpt.export.params import save_params
from sculpt.export.stablehlo import export_stablehlo
from sculpt.files import remove_folder
from sculpt.interrupts import check_interrupt
from sculpt.model import Model
from sculpt.pipeline import closing
from sculpt.pipeline.artefacts import Artefacts
from sculpt.pipeline.budget import about_latency, latency_note
from sculpt.pipeline.progress import Watcher
from sculpt.pipeline.settings import SECTIONS
from sculpt.pruning.budget import check_budget
from sculpt.pruning.costs import count_cost
from sculpt.pruning.masks import make_masks
from sculpt.repair.reconstruction import NotFinite, reconstruct
from sculpt.report import RunDirectory
from sculpt.scoring.evaluation import evaluate
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.tune import tune_plan
from sculpt.training.devices import check_devices
from sculpt.training.finetuning import TrainingDiverged, check_request, finetune, train

STAGES = ("train", "search", "finetune", "compact", "evaluate", "export", "report")
"""In the order in which they run; each is a command."""
_SETTINGS = {"train": ("train",), "search": ("train", "search")}
"""Sections that a stage needs, where not all of them."""
_WITHOUT_DATA = ("export", "report")


class Pipeline(Artefacts):
    """A run on a run directory.

    Args:
      run: the directory.
      given: settings asked for explicitly, by the names of the fields in `sculpt.pipeline.settings`.
      watcher: told about progress; None: nobody is.
      devices: how many share the evaluations of the search and every batch of training; None: all that there are for the
        search, one for training. No setting of the run, for it changes results by rounding at the most: a run may go on
        with another number.
      plans: folder that plans tuned on accelerators are kept in; None: none.

    Raises:
      ValueError: if the directory holds a run with other settings.
    """

    def __init__(
        self,
        run: RunDirectory,
        given: Mapping[str, Any],
        watcher: Watcher | None = None,
        devices: int | None = None,
        plans: Path | None = None,
    ) -> None:
        super().__init__(run, given)
        self._watcher = watcher or Watcher()
        self._devices = devices
        self._plans = plans

    def execute(self, stages: tuple[str, ...] = STAGES) -> None:
        """Runs stages that are not complete, or no longer are: a file that was removed is made again, as it was.

        Everything that can be wrong with the settings is found before anything is computed or written.

        Raises:
          ValueError: on bad settings or data, an unreachable budget, a stage whose predecessor has not run, training
            that diverges, or a directory that another process writes.
        """
        sections = [s for s in SECTIONS if any(s in _SETTINGS.get(stage, SECTIONS) for stage in stages)]
        settings = {section: getattr(self, f"{section}_settings") for section in sections}
        for note in self.notes:
            self._watcher.note(note)
        for needed in STAGES[: STAGES.index(stages[0])]:
            self.run.record(needed)
        missing = [stage for stage in stages if not self.run.done(stage)]
        self.run.metrics()  # or an error that names the damaged line
        closing.latency_rows(self.run)
        if not missing:
            self.run.tidy()
            for stage in stages:
                self._finish(stage, None)
            return
        self._check(missing)
        with self.run.locked():
            self.run.remove_leftovers()
            for section in sections:
                self.run.settle(section, dataclasses.asdict(settings[section]))
            if not self.run.recorded("data"):
                self.run.complete("data", self.data)
            for stage in stages:
                self._perform(stage)

    def _check(self, stages: list[str]) -> None:
        """Raises ValueError where devices, data, weights and settings do not go together, for stages that are to run."""
        if self._devices is not None:
            _check_devices(self._devices)
        if any(stage not in _WITHOUT_DATA for stage in stages):
            left_out = self.splits.unreadable  # reads and compares the data
            if left_out:
                self._watcher.note(
                    f"{len(left_out)} images that cannot be decoded are left out, such as {left_out[0]}"
                )
        if self._devices is not None and (
            "finetune" in stages or ("train" in stages and self.train_settings.trains)
        ):
            check_devices(self._devices, self.train_settings.config(self.splits))
        if "train" in stages:
            model = self.untrained  # reads the weights
            if self.train_settings.trains:
                check_request(model, self.splits, self.train_settings.config(self.splits), None)
        if "search" in stages:
            self._tell_image_counts()
            if self.search_settings.latency_threads is not None:
                check_threads(self.search_settings.latency_threads)
            if "latency" not in self.search_settings.resource:  # which is not known yet
                space = self.limited(self.space)
                for budget in self.search_config.budgets:
                    check_budget(space, budget)
            self.search_settings.check_images(self.splits)

    def _tell_image_counts(self) -> None:
        """Says which numbers of images are lowered for a small train split."""
        settings, images = self.search_settings, len(self.splits.train.labels)
        score, calibration = settings.image_counts(images)
        pairs = {
            "--score-images": (settings.score_images, score),
            "--calibration-images": (settings.calibration_images, calibration),
        }
        lowered = [
            f"{option} is {now} instead of {asked}" for option, (asked, now) in pairs.items() if now < asked
        ]
        if lowered:
            self._watcher.note(f"{', '.join(lowered)}: the train split has {images} images")

    def _perform(self, stage: str) -> None:
        if self.run.done(stage):
            self._finish(stage, None)
            return
        check_interrupt()
        self._watcher.start(stage)
        begin = time.perf_counter()
        try:
            record = getattr(self, f"_{stage}")()
        except TrainingDiverged as error:
            raise ValueError(
                f"{stage}: training diverged in epoch {error.epoch}, step {error.step}; begin another --run with a lower "
                f"--{stage}-learning-rate, or with --{stage}-clip-norm 1"
            ) from error
        seconds = time.perf_counter() - begin
        # A record that was kept keeps its time too.
        self.run.complete(stage, {"stage_seconds": seconds, **record})
        remove_folder(self.run.checkpoints(stage))
        self._finish(stage, seconds)

    def _finish(self, stage: str, seconds: float | None) -> None:
        record = self.run.record(stage)
        note = ""
        if "n_validation" in record:
            note = "validation accuracy {validation_accuracy:.2%} (n = {n_validation})".format(**record)
        if stage == "search":
            tried = self.search_settings.rerank
            note += f", best of {tried} after trial fine-tuning" if tried else ", before fine-tuning"
        if record.get("from_trial"):
            note += ", of the network after trial fine-tuning, which is better and kept: try more --finetune-epochs"
        if record.get("latency"):
            note += f"\n{latency_note(record['latency'])}"
        if record.get("doubt"):
            note += f"\n{record['doubt']}"
        self._watcher.finish(stage, seconds, note)

    def _train(self) -> dict[str, Any]:
        settings = self.train_settings
        model = self.untrained
        told: dict[str, Any] = {"source": settings.weights or "trained"}
        if settings.trains:
            config = settings.config(self.splits)
            told |= {"recipe": settings.recipe_for(self.splits).name, "config": dataclasses.asdict(config)}
            model = train(
                model,
                self.splits,
                config,
                self.key("train"),
                devices=self._devices or 1,
                **self._hooks("train"),
            )
        self._save("dense", model)
        return {**told, **self._validated(model)}

    def _search(self) -> dict[str, Any]:
        # Where only the masks are lost, the policy is still known.
        record = self.run.record("search") if self.run.recorded("search") else self._searched()
        policy = np.asarray(record["policy"], np.int32)
        masks = make_masks(self.ranked_space, self.dense.params, policy)
        save_params(masks, self.run.path / "masks.safetensors", {"policy": str(policy.tolist())})
        return record

    def _searched(self) -> dict[str, Any]:
        config = self.search_config
        total = config.updates * config.policies_per_update
        log = self._logger("search", "update")

        def on_metrics(row: Mapping[str, float]) -> None:
            log(row)
            done = int(row["update"]) * config.policies_per_update
            note = f"best {row['best']:.3f}" if "best" in row else ""
            self._watcher.progress(done, total, "policies", note)
            if done == total and config.rerank:
                self._watcher.progress(done, total, "policies", f"fine-tuning the best {config.rerank}")

        def on_layers(done: int, total: int) -> None:
            self._watcher.progress(done, total, "sizes of layers measured", "")

        space = self.limited(self.ranked_space, on_layers)
        latency = self.layers() if "latency" in self.search_settings.resource else None
        found = search(
            self.dense,
            space,
            self.splits,
            config,
            self.key("search"),
            directory=self.run.checkpoints("search"),
            on_metrics=on_metrics,
            plan=self._plan(config),
            agent=self.learnt_agent,
        )
        if found.agent is not None:
            save_params(found.agent, self.run.path / "agent.safetensors")
        return {
            "policy": found.policy.tolist(),
            "score": found.score,
            "accuracy": found.score if config.objective == "accuracy" else accuracy_on_front(found),
            "resource": space.resource.name,
            "used": found.used,
            "macs_ratio": found.macs_ratio,
            "validation_accuracy": found.validation_accuracy,
            "n_validation": len(self.splits.validation.labels),
            "n_score": config.score_images,
            "repair": config.repair_of(self.dense),
            "front": [dataclasses.asdict(point) | {"policy": point.policy.tolist()} for point in found.front],
            "pareto": [(ratio, accuracy) for ratio, accuracy, _ in found.pareto],
            "evaluations": found.evaluations,
            "unique_evaluations": found.unique_evaluations,
            "seconds": found.seconds,
            "rerank_seconds": found.rerank_seconds,
            "trial_steps": config.rerank_finetune.max_steps,
            "policies_per_second": found.policies_per_second,
            "history": found.history,
            "doubt": found.doubt,
            "latency": None if latency is None else about_latency(latency),
        }

    def _finetune(self) -> dict[str, Any]:
        settings, train = self.finetune_settings, self.splits.train
        config = settings.config(self.train_settings, self.splits)
        number = min(settings.images_to_reconstruct(self.dense), len(train.labels))
        model = finetune(
            self.reconstructed(number) if number else self.dense,
            self.masks,
            self.splits,
            config,
            self.key("finetune"),
            teacher=self.dense if config.needs_teacher else None,
            devices=self._devices or 1,
            **self._hooks("finetune"),
        )
        model, chosen = self._better(model)
        self._save("params", model)
        recipe = self.train_settings.recipe_for(self.splits).name
        told = {"recipe": recipe, "config": dataclasses.asdict(config), "reconstruct_images": number}
        return {**told, **chosen}

    def _better(self, model: Model) -> tuple[Model, dict[str, Any]]:
        """The fine-tuned network, or the one of the same policy that the search fine-tuned briefly, where that is better; and what it
        is worth."""
        config, found = self.rerank_config, self.run.record("search")
        best = {**self._validated(model), "from_trial": False}
        # A search that was run alone may not have known how short the fine-tuning would be.
        known = found.get("trial_steps") == config.rerank_finetune.max_steps
        if not config.rerank or (known and found["validation_accuracy"] <= best["validation_accuracy"]):
            return model, best
        key = self.key("search")
        try:
            trial = trial_network(self.dense, self.ranked_space, self.splits, config, key, self.policy)
        except (NotFinite, TrainingDiverged):
            return model, best
        validated = self._validated(trial)
        if validated["validation_accuracy"] <= best["validation_accuracy"]:
            return model, best
        return trial, {**validated, "from_trial": True}

    def reconstructed(self, number: int) -> Model:
        """The masked network fitted to the dense one on so many train images: what fine-tuning begins with, where that is asked for."""
        return reconstruct(self.dense, self.masks, self.splits.normalise(self.splits.train.images[:number]))

    def _compact(self) -> dict[str, Any]:
        small = self.compacted(check=True)
        images = self.splits.normalise(self.splits.validation.images[:512])
        difference = np.abs(model_logits(self.tuned, images) - model_logits(small, images)).max()
        self._save("compact", small)
        macs, params = count_cost(small, self.image)
        return {
            "max_abs_diff": float(difference),
            "n_images": len(images),
            "macs": macs,
            "params": params,
            "overheads": self.group_overheads,
            "arrays": small.apply.describe(),  # type: ignore[attr-defined]
        }

    def _evaluate(self) -> dict[str, Any]:
        # The test split is read once: where only the result is lost, it is written again from the record.
        record = self.run.record("evaluate") if self.run.recorded("evaluate") else closing.measure(self)
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
        accuracy = float(
            evaluate(model, split.images, split.labels, normalise=self.splits.normalise).accuracy
        )
        if not math.isfinite(accuracy):
            raise ValueError(
                "outputs of the network are not finite on the validation split: train it again with a lower learning rate"
            )
        return {"validation_accuracy": accuracy, "n_validation": len(split.labels)}

    def _plan(self, config: SearchConfig) -> EvaluationPlan:
        """How the search's evaluations are laid out: on CPUs by the default, which is the fastest measured; else tuned."""
        devices = self._devices or jax.device_count()
        plan = EvaluationPlan(policy_shards=devices)
        if jax.default_backend() == "cpu":
            return plan
        train, score, calibrate = self.splits.train, config.score_images, config.calibration_images
        images = self.splits.normalise(train.images[: score + calibrate])
        tuning = tune_plan(
            self.dense,
            self.ranked_space,
            images[:score],
            train.labels[:score],
            images[score:] if calibrate else None,
            cache=self._plans,
            repair=config.repair_of(self.dense),
        )
        if devices == jax.device_count():
            return tuning.plan
        return dataclasses.replace(tuning.plan, policy_shards=devices, image_shards=1)

    def _hooks(self, stage: str) -> dict[str, Any]:
        latest = {"note": ""}
        log = self._logger(stage, "epoch")

        def on_metrics(row: Mapping[str, float]) -> None:
            log(row)
            latest["note"] = f"validation {row['validation_accuracy']:.3f}"

        def on_progress(done: int, total: int) -> None:
            self._watcher.progress(done, total, "steps", latest["note"])

        return {
            "directory": self.run.checkpoints(stage),
            "on_metrics": on_metrics,
            "on_progress": on_progress,
        }

    def _logger(self, stage: str, counter: str) -> Callable[[Mapping[str, float]], None]:
        """Logs the rows of a stage, which count up, in place of those that a kill or an earlier call left from there on."""
        fresh = True

        def log(row: Mapping[str, float]) -> None:
            nonlocal fresh
            if fresh:
                self.run.rewind(stage, counter, row[counter])
            fresh = False
            self.run.log(stage, row)

        return log

    def _save(self, name: str, model: Model) -> None:
        save_params({"params": model.params, "state": model.state}, self.run.path / f"{name}.safetensors")


def accuracy_on_front(found: SearchResult) -> float | None:
    """Accuracy of the chosen policy on the score images, which a search by loss tells of undominated policies only."""
    return next((a for _, a, policy in found.pareto if np.array_equal(policy, found.policy)), None)


def _check_devices(asked: int) -> None:
    """Raises ValueError unless there are so many devices."""
    there = jax.device_count()
    if not 1 <= asked <= there:
        raise ValueError(
            f"--devices must be from 1 to {there}, the devices that JAX finds here, got {asked}: "
            "give another number, or leave it out"
        )

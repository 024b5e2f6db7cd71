"""Inputs and outputs of the stages: settings, data, networks, space and masks, each read on first use."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt import nets
from sculpt.agents.config import SearchConfig
from sculpt.agents.transfer import size_of
from sculpt.data.named import load_data
from sculpt.data.splits import Splits, add_examples
from sculpt.environment import cores, device_name
from sculpt.export.params import load_params
from sculpt.latency.group_overheads import measure_group_overheads
from sculpt.latency.layer_latency import LayerLatency, load_layers, measure_layers, save_layers
from sculpt.model import Model, Params, from_linen
from sculpt.pipeline.settings import (
    DEFAULT_IMPORTANCE,
    FinetuneSettings,
    SearchSettings,
    TrainSettings,
    read_settings,
)
from sculpt.pruning.budget import check_budget
from sculpt.pruning.compaction.compactor import compact
from sculpt.pruning.compaction.plan import grouped_kernels
from sculpt.pruning.importance.scores import Importance, importance
from sculpt.pruning.space import Space, make_space, with_resource
from sculpt.report import RunDirectory
from sculpt.tracing.tracer import Trace, trace

_DRAWS = {
    "init": 0,
    "train": 1,
    "search": 2,
    "finetune": 3,
    "importance": 4,
    "example": 5,
    "head": 6,
    "layers": 7,
}
"""What the seed is folded with, for each use."""
_EXAMPLE_BATCH = 128
_IMPORTANCE_IMAGES = 1024
_SIDE_OF_CIFAR = 32


class Artefacts:
    """What a run directory holds, and what its settings name.

    Data are read by the stages that need images, pretrained weights by the first stage only: the others go by the shapes
    that were recorded, so that a finished run can be reported and exported without either.

    Args:
      run: the directory.
      given: settings asked for explicitly, by the names of the fields in `sculpt.pipeline.settings`.

    Every property raises ValueError on bad settings, and where what it reads is absent or damaged.
    """

    def __init__(self, run: RunDirectory, given: Mapping[str, Any]) -> None:
        self.run = run
        self._given = given
        self.notes: list[str] = []
        """Sentences about settings that are not taken as given."""

    @functools.cached_property
    def train_settings(self) -> TrainSettings:
        return read_settings(self.run, "train", self._given)

    @functools.cached_property
    def search_settings(self) -> SearchSettings:
        return read_settings(self.run, "search", self._given, self.notes)

    @functools.cached_property
    def learnt_agent(self) -> Params | None:
        """What the agent of the search begins with; None where it begins anew."""
        file = self.search_settings.agent
        return None if file is None else load_params(file)

    @functools.cached_property
    def search_config(self) -> SearchConfig:
        """The settings of the search, its agent of the size of what it begins with."""
        if self.learnt_agent is None:
            return self.rerank_config
        return dataclasses.replace(self.rerank_config, agent=size_of(self.learnt_agent))

    @functools.cached_property
    def rerank_config(self) -> SearchConfig:
        """What the re-rank of the search goes by: no candidate is fine-tuned for longer than the one that is chosen."""
        config = self.search_settings.config_for(len(self.splits.train.labels))
        if not config.rerank:
            return config
        final = self.finetune_settings.config(self.train_settings, self.splits)
        steps = max(final.steps(len(self.splits.train.labels)), 1)
        brief = config.rerank_finetune
        brief = dataclasses.replace(brief, max_steps=min(brief.max_steps or steps, steps))
        return dataclasses.replace(config, rerank_finetune=brief)

    @functools.cached_property
    def finetune_settings(self) -> FinetuneSettings:
        return read_settings(self.run, "finetune", self._given)

    @functools.cached_property
    def splits(self) -> Splits:
        """The images, normalised as pretrained weights expect; ValueError where they are not those that the run was begun with."""
        settings = self.train_settings
        if settings.data_dir is not None and not Path(settings.data_dir).is_dir():
            raise ValueError(f"no such data directory: {settings.data_dir}")
        splits = load_data(
            settings.dataset,
            settings.data_dir,
            size=settings.image_size,
            stream=settings.stream,
            skip_unreadable=settings.skip_unreadable,
            seed=settings.seed,
        )
        if self.run.recorded("data") and self.run.record("data") != _about(splits):
            raise ValueError(
                f"the data set {splits.name} is not the one that {self.run.path} was begun with: "
                "restore that one, or choose another --run"
            )
        if settings.weights is not None and len(splits.mean) == len(nets.colours(settings.model)[0]):
            mean, std = nets.colours(settings.model)
            splits = dataclasses.replace(splits, mean=mean, std=std)
        return splits

    @functools.cached_property
    def data(self) -> Mapping[str, Any]:
        """What tells the data set from others, as it was recorded or, in a new run, as it is."""
        return self.run.record("data") if self.run.recorded("data") else _about(self.splits)

    @property
    def image(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one normalised image, as a batch of one."""
        return jax.ShapeDtypeStruct((1, *self.data["image"]), jnp.float32)

    @functools.cached_property
    def example(self) -> jax.Array:
        """Noise `[batch, height, width, channels]` like normalised images, to measure latency and export on."""
        return self.noise(_EXAMPLE_BATCH)

    def noise(self, batch: int) -> jax.Array:
        """So many of such images."""
        return jax.random.normal(self.key("example"), (batch, *self.image.shape[1:]))

    @functools.cached_property
    def outline(self) -> Model:
        """The network with shapes and dtypes in place of its arrays."""
        module = nets.create(self.train_settings.model, self.data["num_classes"])
        shapes = jax.eval_shape(module.init, self.key("init"), self.image)
        return from_linen(module, shapes)

    @functools.cached_property
    def untrained(self) -> Model:
        """The network as it starts: drawn by the seed, or with pretrained weights."""
        settings, classes = self.train_settings, self.data["num_classes"]
        if settings.weights is None:
            module = nets.create(settings.model, classes)
            variables = jax.jit(module.init)(self.key("init"), jnp.zeros(self.image.shape))
        else:
            head_key = self.key("head") if settings.new_head else None
            side = self.image.shape[1] if nets.family(settings.model) == "vit" else None
            module, variables = nets.load(
                settings.model, settings.weights, classes, side=side, head_key=head_key
            )
        model = from_linen(module, variables)
        _check_takes(model, self.image, settings)
        return model

    @functools.cached_property
    def space(self) -> Space:
        return self._space_of(trace(self.outline, self.image))

    def _space_of(self, traced: Trace, scores: Importance | None = None) -> Space:
        settings = self.search_settings
        return make_space(
            traced, settings.families, settings.round_to, settings.min_keep, scores, exclude=settings.exclude
        )

    @functools.cached_property
    def ranked_space(self) -> Space:
        """The space whose masks rank channels by the importance asked for.

        Only masks are made with it. After them the channels that stay are told by their energy: the others have none.
        """
        settings, train = self.search_settings, self.splits.train
        if settings.importance == DEFAULT_IMPORTANCE:
            return self.space
        scores = importance(
            self.dense,
            self.space.trace,
            settings.importance,
            images=self.splits.normalise(train.images[:_IMPORTANCE_IMAGES]),
            labels=train.labels[:_IMPORTANCE_IMAGES],
            key=self.key("importance"),
        )
        return self._space_of(self.space.trace, scores)

    def limited(
        self, space: Space, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Space:
        """The space with the resource that budgets are shares of; a latency is measured, unless the run has it already."""
        found = [
            self.layers(on_progress).resource if name == "latency" else name
            for name in self.search_settings.resource
        ]
        return with_resource(space, found if len(found) > 1 else found[0])

    def layers(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> LayerLatency:
        """The latency of the layers as the settings ask for it: measured, unless the run has it already.

        Raises:
          ValueError: if the run has one of another device; what `measure_layers` raises.
        """
        file, settings = self.run.path / "layers.safetensors", self.search_settings
        kept = load_layers(file) if file.is_file() else None
        # Settings may change as long as no search has begun by them.
        if kept is None or not self._is_asked_for(kept):
            found = measure_layers(
                self.dense,
                self.space,
                self.noise(settings.latency_batch),
                self.key("layers"),
                engine=settings.latency_engine,
                threads=settings.latency_threads,
                all_sizes=settings.latency_all_sizes,
                on_progress=on_progress,
            )
            save_layers(found, file)
            # Read even so: what it is rounded to must not depend on who measured it.
            return load_layers(file)
        here = device_name(None if kept.engine == "xla" else "cpu")
        # However many cores there are: the engine was held to those that it was given.
        if kept.device.partition(",")[0] != here.partition(",")[0]:
            raise ValueError(
                f"the latency of the layers in {file} was measured on {kept.device}, this is {here}: remove it to have it measured here, or "
                "go on there"
            )
        return kept

    def _is_asked_for(self, found: LayerLatency) -> bool:
        settings = self.search_settings
        same = (
            found.engine == settings.latency_engine
            and found.batch == settings.latency_batch
            and found.threads == (settings.latency_threads or found.threads)
            and found.all_sizes == settings.latency_all_sizes
        )
        return same and found.is_of(self.space)

    @functools.cached_property
    def group_overheads(self) -> dict[str, int | None]:
        """What groups of filters cost: as the run has it, for what was compacted once is made again as it was; else measured where budgets
        are of latency, as the layers were that the search went by; else what `compact` takes them to cost."""
        if self.run.recorded("compact"):
            return self.run.record("compact").get("overheads", {})
        if "latency" not in self.search_settings.resource or not grouped_kernels(self.space):
            return {}
        about = self.run.record("search")["latency"]
        return measure_group_overheads(
            self.tuned,
            self.space,
            self.policy,
            self.noise(about["batch"]),
            engine=about["engine"],
            threads=min(about["threads"], cores()),
            masks=self.masks,
        )

    def compacted(self, check: bool) -> Model:
        """The fine-tuned network without its zeros."""
        return compact(
            self.tuned, self.space, self.policy, check, masks=self.masks, overheads=self.group_overheads
        )

    @functools.cached_property
    def dense(self) -> Model:
        return self._load("dense", self.outline)

    @functools.cached_property
    def policy(self) -> np.ndarray:
        return np.asarray(self.run.record("search")["policy"], np.int32)

    @functools.cached_property
    def masks(self) -> Any:
        like = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bool_), self.outline.params)
        return load_params(self.run.file("masks.safetensors"), like)

    @functools.cached_property
    def tuned(self) -> Model:
        return self._load("params", self.outline)

    @functools.cached_property
    def small(self) -> Model:
        return self._load("compact", self.compacted(check=False))

    def key(self, use: str) -> jax.Array:
        """The key of one use of randomness."""
        return jax.random.fold_in(jax.random.key(self.train_settings.seed), _DRAWS[use])

    def _load(self, name: str, like: Model) -> Model:
        template = {"params": like.params, "state": like.state}
        return like.replace(**load_params(self.run.file(f"{name}.safetensors"), template))


def describe(given: Mapping[str, Any]) -> Space:
    """The search space of a network by name, without a run; a budget among the settings is checked.

    Without a data set the network is as published: its image size, or the one given, in three colours, and the classes of ImageNet or
    CIFAR-10.

    Raises:
      ValueError: on bad settings, or a budget that cannot be reached.
    """
    artefacts = Artefacts(RunDirectory(Path("-")), {"dataset": "", **given})
    if "dataset" not in given:
        published = nets.image_size(given["model"])
        side = given.get("image_size", published)
        classes = 10 if published <= _SIDE_OF_CIFAR else 1000
        artefacts.data = {"image": (side, side, 3), "num_classes": classes}
    if "budget" in given:
        check_budget(artefacts.space, given["budget"])
    return artefacts.space


def _about(splits: Splits) -> dict[str, Any]:
    """What tells a data set from others, read from the images themselves (some, of a stream); the test split is left alone."""
    digest = hashlib.sha256()
    add_examples(digest, splits)
    return {
        "sha256": digest.hexdigest(),
        "image": list(splits.train.images.shape[1:]),
        "num_classes": splits.num_classes,
        **({"unreadable": len(splits.unreadable)} if splits.unreadable else {}),
    }


def _check_takes(model: Model, image: jax.ShapeDtypeStruct, settings: TrainSettings) -> None:
    """Raises ValueError unless the network takes such images."""
    from flax.errors import FlaxError

    try:
        jax.eval_shape(model.apply, model.params, model.state, image)
    # What a network raises for images of a wrong shape depends on its first operation.
    except (FlaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{settings.model} with {settings.weights or 'fresh weights'} does not take the images "
            f"{list(image.shape[1:])} of {settings.dataset}: it was published for "
            f"{[nets.image_size(settings.model)] * 2 + [3]}, and trained weights keep to their number of colours"
        ) from error

"""Measured latency of each layer under every option of a space: a resource for budgets.

Each layer is measured by itself, at sizes that its sites may leave of it; sizes between them are interpolated. What a whole
network takes beside its layers (additions, normalisation, calls) is fitted on a few compacted networks, which also tell
how far such predictions are off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sculpt.arguments import checked, is_whole
from sculpt.environment import check_threads, cores
from sculpt.export.params import load_metadata, load_params, save_params
from sculpt.inputs import number_of
from sculpt.interrupts import check_interrupt
from sculpt.latency.engines import Engine, confined, engine_of
from sculpt.latency.layer_alone import Layer, name_of, prepare_alone, traced_example
from sculpt.latency.layer_grid import Part
from sculpt.latency.layer_points import layers_of
from sculpt.latency.layer_sizes import find_parts
from sculpt.latency.measurement import compare_latency, seconds_beside
from sculpt.model import Model
from sculpt.pruning.budget import energy_logits, project
from sculpt.pruning.compaction.compactor import compact
from sculpt.pruning.importance.units import fitting_leaves
from sculpt.pruning.masks import apply_masks, check_policies, make_masks
from sculpt.pruning.resources import Lookup
from sculpt.pruning.space import Space, make_choices, with_resource

_CALIBRATION_BUDGETS = (0.2, 0.8)
"""Between these shares of the time of all layers the networks lie that the fit is made on."""
_DISTURBED = 1.5
"""A layer beside which the reference took so many times as long or as short as usual is measured once more."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerLatency:
    """What `measure_layers` found."""

    resource: Lookup
    """For `sculpt.with_resource`: budgets are then shares of the dense network's latency."""
    engine: str
    """What computed the layers."""
    batch: int
    """Images per call."""
    threads: int
    """CPU cores that it had."""
    all_sizes: bool
    """Whether layers were measured at all their sizes together."""
    options: str
    """Tells the sites and options that were measured from others."""
    device: str
    """Where it was measured."""
    versions: Mapping[str, str]
    """What it was measured with, the engine included."""
    policies: np.ndarray
    """int32 `[networks, sites]`: the compacted networks that were measured whole; the first is dense."""
    measured: np.ndarray
    """float32 `[networks]`: seconds per call of each."""
    predicted: np.ndarray
    """float32 `[networks]`: seconds that a fit to the other networks predicts for each. That of `resource` goes through the dense one."""

    @property
    def error(self) -> np.ndarray:
        """float32 `[networks]`: |predicted - measured| / measured, of networks that the prediction has not seen."""
        return np.abs(self.predicted - self.measured) / self.measured

    def __repr__(self) -> str:
        return (
            f"LayerLatency({self.engine}, batch {self.batch}, threads: {self.threads}, {self.device}; dense {1e3 * self.measured[0]:.3f} ms; "
            f"{len(self.error)} networks predicted within {np.median(self.error):.1%} in the median, {self.error.max():.1%} at the most)"
        )

    def is_of(self, space: Space) -> bool:
        """Whether a space has the sites and options that were measured."""
        return self.options == _options_of(space)

    def seconds(self, space: Space, policies: Any) -> jax.Array:
        """Predicted seconds per call of the networks that policies int32 `[..., sites]` leave: float32 `[...]`."""
        return self.resource.used(space, check_policies(space, policies)) * np.float32(self.resource.total)


@checked
def measure_layers(
    model: Model,
    space: Space,
    example_input: Any,
    key: jax.Array,
    *,
    engine: str = "xla",
    threads: int | None = None,
    networks: int = 8,
    repeats: int = 7,
    all_sizes: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerLatency:
    """Measures how long each layer takes under the options of its sites; `sculpt.latency.save_layers` keeps it.

    A tenth of a second and more for every size of every layer (ResNet-20, channels and windows, batch 32: 1,324 sizes, or 4,809).

    Args:
      model: the dense network.
      space: its sites; of families whose zeros stay in place no layer becomes faster. Windows are those that the weights of this model
        choose; filters in groups (`rect_grouped`) are measured with all channels, in the groups that `compact` makes if told nothing else.
      example_input: `[batch, ...]`, float32: latency is that of such a batch.
      key: draws the networks that are measured whole.
      engine: as for `compare_latency`.
      threads: as for `compare_latency`.
      networks: how many are measured whole, the dense one included; 3 at least.
      repeats: samples of each layer and size; of whole networks three times as many.
      all_sizes: whether layers with more than two dimensions that shrink (channels in and out, and windows) are measured at all their
        sizes together, where that is up to 600 of each and they are not too large: takes three to four times as long, and is more
        accurate in XLA (in onnxruntime it was not). Sizes that several sites add up to come on top, up to 64 with up to eight of the
        other channels.
      on_progress: told how many of how many sizes of layers are done.

    Raises:
      ValueError: like `compare_latency`; for a model or an input that is not of the space; for a network of no layers outside loops, or
        none that an option makes smaller; where whole networks do not become slower with their layers, as on a machine that is busy with other work.
    """
    for name, value, least in (("networks", networks, 3), ("repeats", repeats, 1)):
        if not is_whole(value, least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    threads = cores() if threads is None else threads
    check_threads(threads)
    fitting_leaves(space.trace, model.params)
    x = traced_example(space.trace, example_input)
    batch = number_of(x)
    parts = find_parts(space, batch, all_sizes)
    if all(part.grouped is None and len(part.points) == 1 for part in parts):
        raise ValueError(
            f"no option of the families {', '.join(space.families)} makes a layer smaller, zeros stay in place: add channels, rect or "
            "rect_grouped for a budget of latency"
        )
    seconds = _measured(model, space, parts, batch, engine_of(engine), threads, repeats, on_progress)
    tables = [part.table(found) for part, found in zip(parts, seconds, strict=True)]
    layers = _lookup(space, parts, tables)
    policies = _drawn(space, model, layers, networks, key)
    whole = {str(i): _left(model, space, policy) for i, policy in enumerate(policies)}
    latencies = compare_latency(whole, x, 3 * repeats, engine=engine, threads=threads)
    measured = np.asarray([latencies[str(i)].median for i in range(networks)])
    sums = np.asarray(layers.used(space, policies), np.float64)
    others = [np.delete(np.arange(networks), i) for i in range(networks)]
    fits = [_line, *[_line_through_first] * (networks - 1)]
    predicted = np.asarray(
        [fit(sums[rest], measured[rest]) @ (1.0, sums[i]) for i, (fit, rest) in enumerate(zip(fits, others))]
    )
    # Budgets are shares of the dense network's latency: there the line has no error.
    fixed, slope = _line_through_first(sums, measured)
    total = float(measured[0])
    if slope <= 0.0:
        raise ValueError(
            f"whole networks took {np.array2string(1e3 * measured, precision=3)} ms where their layers take "
            f"{np.array2string(1e3 * sums, precision=3)} ms, which do not hang together: leave the machine to the measurement, or ask for "
            "more repeats"
        )
    resource = dataclasses.replace(
        layers,
        name=f"latency ({engine}, batch {batch})",
        total=total,
        fixed=float(fixed) / total,
        values=(layers.values * (slope / total)).astype(np.float32),
    )
    dense = latencies["0"]
    return LayerLatency(
        resource,
        engine,
        batch,
        threads,
        all_sizes,
        _options_of(space),
        dense.device,
        dense.versions,
        policies,
        measured.astype(np.float32),
        predicted.astype(np.float32),
    )


def _options_of(space: Space) -> str:
    """SHA-256 of the sites' names and what their options keep."""
    sites = [(site.name, site.family, [(o.counts, o.pattern) for o in site.options]) for site in space.sites]
    return hashlib.sha256(json.dumps(sites).encode()).hexdigest()


def _drawn(space: Space, model: Model, layers: Lookup, number: int, key: jax.Array) -> np.ndarray:
    """int32 `[number, sites]`: the dense network, then such as budgets of the layers' time leave, all options liked alike and those that
    retain energy by turns: what a search finds is fast by this table, its errors in their favour included."""
    dense = np.zeros(space.num_sites, np.int32)
    seconds = float(layers.used(space, dense))
    shares = dataclasses.replace(layers, total=seconds, values=(layers.values / seconds).astype(np.float32))
    timed = with_resource(space, shares)
    if timed.reachable[0] > _CALIBRATION_BUDGETS[1]:
        timed = space  # the sites hardly change any layer
    prior = energy_logits(timed, model.params)
    low, high = _CALIBRATION_BUDGETS
    drawn = [
        project(
            timed, prior * (i % 2), max(budget, timed.reachable[0] + 1e-3), jax.random.fold_in(key, i)
        ).policy
        for i, budget in enumerate(np.linspace(low, high, number - 1))
    ]
    return np.stack([dense, *map(np.asarray, drawn)]).astype(np.int32)


def _left(model: Model, space: Space, policy: np.ndarray) -> Model:
    """What a policy leaves of a model."""
    masked = apply_masks(model, make_masks(space, model.params, policy))
    return compact(masked, space, policy, check=False)


def _line(sums: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Intercept and slope float64 `[2]` of seconds over sums, by least squares of the relative error."""
    rows = np.stack([np.ones_like(sums), sums], axis=1) / seconds[:, None]
    return np.linalg.lstsq(rows, np.ones(len(sums)), rcond=None)[0]


def _line_through_first(sums: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The same, of those lines that go through the first point."""
    x, y = (sums[1:] - sums[0]) / seconds[1:], (seconds[1:] - seconds[0]) / seconds[1:]
    slope = float(x @ y / max(x @ x, 1e-30))
    return np.asarray([seconds[0] - slope * sums[0], slope])


def _measured(
    model: Model,
    space: Space,
    parts: Sequence[Part],
    batch: int,
    runner: Engine,
    threads: int,
    repeats: int,
    on_progress: Callable[[int, int], None],
) -> list[np.ndarray]:
    """Seconds of every part at its points and under the options of its filters' windows, float64 each."""
    layers: dict[Any, Layer] = {}
    wanted: list[list[Any]] = []
    choices = make_choices(space, model.params)
    for part in parts:
        found = []
        for layer in layers_of(space, choices, part, batch):
            # Layers of one size are measured once.
            name = name_of(layer)
            layers.setdefault(name, layer)
            found.append(name)
        wanted.append(found)
    ratios: dict[Any, float] = {}
    beside: dict[Any, float] = {}
    with confined(threads):
        reference = prepare_alone(next(iter(layers.values())), runner, threads)
        for done, (name, layer) in enumerate(layers.items()):
            check_interrupt()
            on_progress(done, len(layers))
            # Its arrays are made here: those of all sizes together may be more than memory holds.
            call = prepare_alone(layer, runner, threads)
            ratios[name], beside[name] = seconds_beside(call, reference, repeats)
        usual = float(np.median([*beside.values()]))
        for name, layer in layers.items():
            if not 1.0 / _DISTURBED <= beside[name] / usual <= _DISTURBED:
                ratios[name], _ = seconds_beside(prepare_alone(layer, runner, threads), reference, repeats)
    on_progress(len(layers), len(layers))
    # Minutes lie between the first and the last, in which a machine may become slower and faster again.
    return [usual * np.asarray([ratios[name] for name in found]) for found in wanted]


def _lookup(space: Space, parts: Sequence[Part], tables: Sequence[np.ndarray]) -> Lookup:
    """The sum over all parts, in seconds."""
    degree = max(1, *(len(part.steps) for part in parts))
    sites = np.zeros((len(parts), degree), np.int32)
    steps = np.zeros((len(parts), degree, space.max_options), np.int32)
    for row, part in enumerate(parts):
        for column, (site, own) in enumerate(part.steps.items()):
            sites[row, column] = site
            steps[row, column, : len(own)] = own
    start = np.cumsum([0, *(len(table) for table in tables[:-1])]).astype(np.int32)
    return Lookup(
        "latency of the layers",
        1.0,
        0.0,
        sites,
        steps,
        start,
        np.concatenate(tables).astype(np.float32),
        space.num_options,
    )


def save_layers(latency: LayerLatency, path: str | Path) -> None:
    """Writes it as a safetensors file.

    Raises:
      ValueError: like `sculpt.save_params`.
    """
    arrays, about = {}, {}
    for part in (latency, latency.resource):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = value
            elif not isinstance(value, Lookup):
                about[field.name] = json.dumps(value)
    save_params(arrays, path, about)


def load_layers(path: str | Path) -> LayerLatency:
    """Reads what `save_layers` wrote.

    Raises:
      ValueError: if the file is absent, damaged, or another one.
    """
    found, about = load_params(path), load_metadata(path)
    nested = not isinstance(found, dict) or any(isinstance(array, dict) for array in found.values())
    arrays = {} if nested else {name: np.asarray(array) for name, array in found.items()}

    def read(kind: Any) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(kind) if field.name != "resource"]
        if missing := [name for name in names if name not in arrays and name not in about]:
            raise ValueError(
                f"{path} is no latency of layers, it lacks {', '.join(missing)}: remove it, and measure again"
            )
        try:
            return {name: arrays[name] if name in arrays else json.loads(about[name]) for name in names}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and measure again") from error

    return LayerLatency(resource=Lookup(**read(Lookup)), **read(LayerLatency))

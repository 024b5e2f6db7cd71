"""Measured latency: seconds per call of a compiled model on the current device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sculpt.deploy.environment import device_name, versions
from sculpt.model import Model

_SHORTEST_SAMPLE = 2e-3
"""Seconds. Calls quicker than this are timed several at a time, so that the clock and the dispatch do not count."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds that one call takes on one batch."""

    median: float
    """Seconds per call: median of the samples."""
    spread: tuple[float, float]
    """Seconds per call: first and third quartile of the samples."""
    n: int
    """Number of samples."""
    batch: int
    """Images per call."""
    device: str
    """Where it was measured."""
    versions: dict[str, str]
    """What it was measured with."""


def measure_latency(model: Model, example_input: Any, repeats: int = 30) -> Latency:
    """Median and quartiles of the seconds that one call takes, compiled beforehand, on the current device.

    To compare models use `compare_latency`: two runs of this one see two different loads of the machine.

    Args:
      model: the model.
      example_input: `[batch, ...]`, what the model takes.
      repeats: number of samples.

    Raises:
      ValueError: if `repeats` is below 1 or the input is a scalar.
    """
    return compare_latency({"model": model}, example_input, repeats)["model"]


def compare_latency(models: Mapping[str, Model], example_input: Any, repeats: int = 30) -> dict[str, Latency]:
    """Latencies of several models on the same input, interleaved: each sample of one is taken beside one of the others.

    Args:
      models: name -> model.
      example_input: `[batch, ...]`, what every model takes.
      repeats: number of samples of each.

    Raises:
      ValueError: if there is no model, `repeats` is below 1, or the input is a scalar.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not models:
        raise ValueError("expected at least one model to measure, got none")
    if not np.shape(example_input):
        raise ValueError("expected an example input [batch, ...], got a scalar")
    x = jax.device_put(example_input)
    calls = {name: _compiled(model, x) for name, model in models.items()}
    # The first calls also fault memory in and settle clocks.
    slowest = max(max(_seconds(call, 1) for _ in range(3)) for call in calls.values())
    times = max(1, round(_SHORTEST_SAMPLE / max(slowest, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        # Who goes first takes turns, for the caches.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(_seconds(calls[name], times))
    return {name: _summary(np.asarray(values), x.shape[0]) for name, values in samples.items()}


def _compiled(model: Model, x: jax.Array) -> Callable[[], jax.Array]:
    params, state = jax.device_put((model.params, model.state))
    program = jax.jit(model.apply).lower(params, state, x).compile()
    return lambda: program(params, state, x)


def _seconds(call: Callable[[], jax.Array], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / times


def _summary(seconds: np.ndarray, batch: int) -> Latency:
    low, median, high = (float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    return Latency(median, (low, high), len(seconds), batch, device_name(), versions())

"""Measured latency of a model: seconds per call, in JAX or in another engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sculpt.arguments import check_argument, checked, is_whole
from sculpt.environment import cores, device_name, version, versions
from sculpt.interrupts import check_interrupt
from sculpt.ir.any_batch import example_batch
from sculpt.latency.engines import Call, confined, engine_of, prepared
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
    engine: str
    """What computed it."""
    threads: int
    """CPU cores that it had."""
    precision: str
    """Dtype of the images, of several inputs the first of floating-point numbers; engines other than XLA compute in it throughout."""
    device: str
    """Where it was measured."""
    versions: dict[str, str]
    """What it was measured with, the engine included."""


@checked
def measure_latency(
    model: Model, example_input: Any, repeats: int = 30, *, engine: str = "xla", threads: int | None = None
) -> Latency:
    """Median and quartiles of the seconds that one call takes, compiled beforehand.

    To compare models use `compare_latency`: two runs of this one see two different loads of the machine.

    Args:
      model: the model.
      example_input: `[batch, ...]`, what the model takes: an array or a pytree of them.
      repeats: number of samples.
      engine: as in `compare_latency`.
      threads: as in `compare_latency`.

    Raises:
      ValueError: like `compare_latency`.
    """
    return compare_latency({"model": model}, example_input, repeats, engine=engine, threads=threads)["model"]


def compare_latency(
    models: Mapping[str, Model],
    example_input: Any,
    repeats: int = 30,
    *,
    engine: str = "xla",
    threads: int | None = None,
) -> dict[str, Latency]:
    """Latencies of several models on the same input, interleaved: each sample of one is taken beside one of the others, and after a call of
    its own that is not timed.

    In XLA images and logits stay on the device; the other engines take and give host arrays.

    Args:
      models: name -> model.
      example_input: `[batch, ...]`, what every model takes: an array or a pytree of them.
      repeats: number of samples of each.
      engine: "xla" (JAX, on its default device), or "onnxruntime", "openvino" or "litert" on the CPU, in float32; each is checked to give
        the model's logits before it is timed.
      threads: CPU cores that the engine has; None: all that this process may use.

    Raises:
      ValueError: if there is no model, `repeats` or `threads` is below 1, the input is no batch of images, there are fewer cores than
        `threads`, or the engine is unknown, not installed (the extra is named), does not take a model or gives other logits.
    """
    threads = cores() if threads is None else threads
    if not is_whole(repeats, 1):
        raise ValueError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    if not isinstance(models, Mapping) or not models:
        raise ValueError(
            f"expected models by their names, such as {{'dense': model}}, got {'none' if models == {} else type(models).__name__}"
        )
    for name, model in models.items():
        check_argument(name, model, Model)
    x = example_batch(example_input)
    about = versions() | {(package := engine_of(engine).package): version(package)}
    with confined(threads):
        calls = {name: prepared(engine, model, x, threads) for name, model in models.items()}
        samples = _samples(calls, repeats)
    device = device_name() if engine == "xla" else device_name("cpu")
    arrays = jax.tree.leaves(x)
    precision = next((a for a in arrays if np.issubdtype(a.dtype, np.inexact)), arrays[0]).dtype.name
    found = {}
    for name, values in samples.items():
        low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
        found[name] = Latency(
            median, (low, high), len(values), len(arrays[0]), engine, threads, precision, device, about
        )
    return found


def seconds_beside(call: Call, reference: Call, repeats: int) -> tuple[float, float]:
    """How many times as long as a reference a call takes, and the seconds of the reference: medians over `repeats` samples of both, each
    taken beside one of the other."""
    samples = _samples({"call": call, "reference": reference}, repeats)
    own, other = (np.asarray(samples[name]) for name in ("call", "reference"))
    return float(np.median(own / other)), float(np.median(other))


def _samples(calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    # The first calls also fault memory in and settle clocks.
    slowest = {name: max(_seconds(call, 1) for _ in range(3)) for name, call in calls.items()}
    times = {name: max(1, round(_SHORTEST_SAMPLE / max(took, 1e-7))) for name, took in slowest.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats):
        check_interrupt()
        # Who goes first takes turns, for the caches.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            # What a call finds in the caches is its own, however many others there are.
            _seconds(calls[name], 1)
            samples[name].append(_seconds(calls[name], times[name]))
    return samples


def _seconds(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / times

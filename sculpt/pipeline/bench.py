"""Benchmarks of a run in an engine: compact network beside the dense one, and files for engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sculpt.environment import check_threads
from sculpt.export.litert import export_litert
from sculpt.export.model_file.files import save_model
from sculpt.export.onnx.exporter import export_onnx
from sculpt.latency.engines import engine_of
from sculpt.latency.measurement import compare_latency
from sculpt.pipeline import closing
from sculpt.pipeline.artefacts import Artefacts
from sculpt.pipeline.stages import Pipeline
from sculpt.report import RunDirectory
from sculpt.report.json_files import write_sealed

FORMATS = {
    "stablehlo": "compact.stablehlo",
    "onnx": "compact.onnx",
    "litert": "compact.tflite",
    "model": "model.json",
}
"""What a compact network is exported to, and the file; arrays of "model" stand beside it in `model.safetensors`."""
_COMPARED_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class LatencyOptions:
    """What is measured."""

    engines: tuple[str, ...] = ("xla", "onnxruntime")
    """Names of `sculpt.latency.engines.ENGINES`."""
    threads: int | None = None
    """CPU cores that an engine has; None: all that this process may use."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images per call."""
    repeats: int = 30
    """Samples of each network."""

    def __post_init__(self) -> None:
        if not self.engines or len(set(self.engines)) < len(self.engines):
            raise ValueError(f"engines must be distinct names, got {', '.join(self.engines) or 'none'}")
        for name in self.engines:
            engine_of(name)
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise ValueError(f"batches must be distinct numbers of at least 1, got {list(self.batches)}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if self.threads is not None:
            check_threads(self.threads)


def bench_latency(
    run: RunDirectory,
    options: LatencyOptions,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[dict[str, Any]]:
    """Measures the dense and the compact network of a run, interleaved, into its `latency.json`; a report that is there is written
    again.

    Args:
      run: a run whose stage `compact` is complete.
      options: what is measured.
      on_progress: told how many of how many comparisons are done, and which comes next.

    Returns:
      A row for each engine, batch size and network: `engine`, `version`, `threads`, `precision`, `batch`, `network`, `median_ms`,
      `quartiles_ms`, `n`, `device`.

    Raises:
      ValueError: if the run is not compacted yet, an engine does not take a network or computes other logits, or another process
        writes the run.
    """
    run.record("compact")  # or an error that says what to run first
    artefacts = Artefacts(run, {})
    networks = {"dense": artefacts.dense, "compact": artefacts.small}
    cases = [(engine, batch) for engine in options.engines for batch in options.batches]
    rows: list[dict[str, Any]] = []
    with run.locked():
        for done, (engine, batch) in enumerate(cases):
            on_progress(done, len(cases), f"{engine}, batch {batch}")
            found = compare_latency(
                networks,
                artefacts.noise(batch),
                options.repeats,
                engine=engine,
                threads=options.threads,
            )
            for name, latency in found.items():
                rows.append(
                    {
                        "engine": engine,
                        "version": latency.versions[engine_of(engine).package],
                        "threads": latency.threads,
                        "precision": latency.precision,
                        "batch": batch,
                        "network": name,
                        "median_ms": 1e3 * latency.median,
                        "quartiles_ms": [1e3 * s for s in latency.spread],
                        "n": latency.n,
                        "device": latency.device,
                    }
                )
            # Kept at once: the next engine may refuse the network.
            write_sealed(run.path / closing.LATENCY, {"rows": rows})
        on_progress(len(cases), len(cases), "")
        if run.done("report"):
            closing.write_report(Pipeline(run, {}))
            run.complete("report", run.record("report"))
    return rows


def export_formats(run: RunDirectory, formats: Sequence[str]) -> list[str]:
    """Writes the compact network of a run in these formats: those of `FORMATS`, of which "stablehlo" is a stage of the run.
    Returns the names of the files.

    Raises:
      ValueError: if there is another format, the run is not compacted yet, or the network cannot be exported so.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"format must be of {', '.join(FORMATS)}, got {', '.join(unknown) or 'none'}")
    run.record("compact")  # or an error that says what to run first
    if "stablehlo" in formats:
        Pipeline(run, {}).execute(("export",))
    artefacts = Artefacts(run, {})
    writers = {
        "onnx": (export_onnx, _COMPARED_IMAGES),
        "litert": (export_litert, 1),
        "model": (save_model, _COMPARED_IMAGES),
    }
    for name, (write, images) in writers.items():
        if name in formats:
            with run.locked():
                write(artefacts.small, run.path / FORMATS[name], artefacts.noise(images))
    return [FORMATS[name] for name in formats]

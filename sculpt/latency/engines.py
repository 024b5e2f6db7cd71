"""Inference engines: each compiles a model for one batch size and runs it on a number of cores.

All compute in float32. What an engine gives is compared with the model's own logits before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from sculpt.environment import check_threads, cores, required
from sculpt.export.agreement import check_logits_of, model_logits
from sculpt.export.litert import interpreted, litert_program, require_litert
from sculpt.export.onnx.exporter import LOGITS, export_onnx, named_inputs
from sculpt.inputs import as_text
from sculpt.model import Model

Call = Callable[[], Any]
"""Computes the batch and returns its logits, which `jax.block_until_ready` waits for where they are a `jax.Array`."""


class Engine(Protocol):
    """Something that runs networks."""

    @property
    def package(self) -> str:
        """Distribution whose version says which engine it was."""
        ...

    @property
    def channels_first(self) -> bool:
        """Whether it computes on images whose channels come before height and width, as `export_onnx` writes them."""
        ...

    def require(self) -> None:
        """Raises ValueError, which names the extra, if the engine is not installed."""
        ...

    def prepare(self, model: Model, x: Any, threads: int) -> Call:
        """Compiles a model.

        Args:
          model: the model.
          x: float32 images `[batch, ...]`, or a pytree of arrays.
          threads: how many the engine may use.

        Raises:
          ValueError: if the engine does not take the model.
        """
        ...


class Xla:
    """JAX's own compiler, on JAX's default device."""

    package = "jaxlib"
    channels_first = False

    def require(self) -> None:
        pass

    def prepare(self, model: Model, x: Any, threads: int) -> Call:
        # Its pool of threads is as large as the cores that it once saw; `confined` is what holds it.
        images, params, state = jax.device_put((x, model.params, model.state))
        try:
            lowered = jax.jit(model.apply).lower(params, state, images)
        except TypeError as error:  # where shapes do not fit
            raise ValueError(f"the model does not take the input {as_text(x)}: {error}") from error
        program = lowered.compile()
        return lambda: program(params, state, images)


class OnnxRuntime:
    """onnxruntime on the CPU, from the file of `export_onnx`, with all of its optimisations."""

    package = "onnxruntime"
    channels_first = True

    def require(self) -> None:
        required("onnx", "onnx")
        required("onnxruntime", "onnx")

    def prepare(self, model: Model, x: Any, threads: int) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        with _onnx_file(model, x) as file:
            session = onnxruntime.InferenceSession(
                file.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        feed = named_inputs(x)
        return lambda: session.run([LOGITS], feed)[0]


class OpenVino:
    """OpenVINO on the CPU, from the file of `export_onnx`. Held to float32: by itself it computes in bfloat16 where it can."""

    package = "openvino"
    channels_first = True

    def require(self) -> None:
        # Its telemetry forks a process that sends word of every import; without the module there is none.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        for module in ("openvino", "onnx", "onnxruntime"):
            required(module, "openvino")

    def prepare(self, model: Model, x: Any, threads: int) -> Call:
        openvino: Any = importlib.import_module("openvino")
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        feed = named_inputs(x)
        with _onnx_file(model, x) as file:
            graph = openvino.Core().read_model(file)
            graph.reshape({name: list(array.shape) for name, array in feed.items()})
            request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


class LiteRt:
    """LiteRT (TensorFlow Lite) on the CPU, converted from the StableHLO of the folded model."""

    package = "ai-edge-litert"
    channels_first = False

    def require(self) -> None:
        require_litert()

    def prepare(self, model: Model, x: Any, threads: int) -> Call:
        return interpreted(litert_program(model, x), x, threads)


ENGINES: dict[str, Engine] = {
    "xla": Xla(),
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVino(),
    "litert": LiteRt(),
}
"""Name -> engine."""


def engine_of(name: str) -> Engine:
    """The engine of that name.

    Raises:
      ValueError: if there is none, or it is not installed; the message names the extra that brings it.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    ENGINES[name].require()
    return ENGINES[name]


def prepared(name: str, model: Model, x: Any, threads: int) -> Call:
    """A model compiled by the engine of that name, its logits compared with those of the model.

    Raises:
      ValueError: if there is no such engine, it is not installed, does not take the model, or computes other logits.
    """
    call = engine_of(name).prepare(model, x, threads)
    if name != "xla":
        check_logits_of(name, np.asarray(call()), model_logits(model, x))
    return call


@contextlib.contextmanager
def _onnx_file(model: Model, x: Any) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file, x)
        yield file


@contextlib.contextmanager
def confined(threads: int) -> Iterator[None]:
    """Keeps this process, threads of engines included, to so many of its cores.

    Raises:
      ValueError: if it has fewer, or the system does not let a process choose.
    """
    check_threads(threads)
    there = cores()
    if threads == there:
        yield
        return
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        raise ValueError(
            f"this system does not let a process keep to {threads} of its {there} cores: leave out threads"
        )
    before = os.sched_getaffinity(0)
    try:
        _keep_to(sorted(before)[:threads], tasks)
        yield
    finally:
        _keep_to(before, tasks)


def _keep_to(chosen: Iterable[int], tasks: Path) -> None:
    for task in tasks.iterdir():
        # Threads come and go.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), chosen)

"""LiteRT (TensorFlow Lite) export, converted from the StableHLO of the folded model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sculpt.arguments import checked
from sculpt.environment import required
from sculpt.export.agreement import check_logits_of, model_logits
from sculpt.export.folding.folder import fold
from sculpt.export.onnx.exporter import IMAGES, LOGITS
from sculpt.files import require_folder, written_whole
from sculpt.ir.any_batch import example_batch, input_names
from sculpt.model import Model
from sculpt.trees import shapes_of


@checked
def export_litert(model: Model, path: str | Path, example_input: Any) -> None:
    """Writes a model as a file of LiteRT, in float32, BatchNorm folded into the weights.

    The batch size is that of the example. The input is called "images", each of several by its path; the output "logits". The file is
    loaded and compared with the model before it gets its name.

    Args:
      model: the model, dense or compact.
      path: the file, `.tflite` by custom; in a folder that exists.
      example_input: float32 array `[batch, ...]` that the model takes, or a pytree of arrays.

    Raises:
      ValueError: if the packages of the extra `litert` are missing, the converter does not take the model, or its logits differ; no file is
        left then.
    """
    require_folder(path)
    require_litert()
    x = example_batch(example_input)
    program = litert_program(model, x)
    check_logits_of("the LiteRT file", interpreted(program, x, 1)(), model_logits(model, x))
    with written_whole(path) as temporary:
        temporary.write_bytes(program)


def require_litert() -> None:
    """Raises ValueError, which names the extra, unless converter and interpreter are installed."""
    required("litert_converter", "litert")
    required("ai_edge_litert", "litert")


def litert_program(model: Model, x: Any) -> bytes:
    """A model as the contents of a file of LiteRT for the batch size of `x`.

    Raises:
      ValueError: if the converter does not take the model.
    """
    names = ("converter_api_ext", "mlir.ir", "mlir.passmanager")
    converter, ir, passes = (importlib.import_module(f"litert_converter.{name}") for name in names)
    folded = fold(model, x)
    program = jax.jit(lambda images: folded.apply(folded.params, folded.state, images), keep_unused=True)
    text = program.lower(shapes_of(x)).as_text()
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        try:
            module = ir.Module.parse(text)
            main = next(f for f in module.body.operations if f.name.value == "main")
            converter.set_signature(main.operation, "serving_default", [*input_names(x, IMAGES)], [LOGITS])
            converter.run_convert_to_tfl_passes(module, passes.PassManager(), converter.ConvertToTFLConfig())
            return converter.export_flatbuffer_to_bytes(module.operation)
        # Errors of MLIR have no common base but Exception.
        except Exception as error:
            raise ValueError(f"litert-converter does not take this model: {error}") from error


def interpreted(program: bytes, x: Any, threads: int) -> Callable[[], np.ndarray]:
    """Computes the logits of `x` by LiteRT's interpreter."""
    litert: Any = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_content=program, num_threads=threads)
    interpreter.allocate_tensors()
    # Inputs are in the order of the arrays of `x`.
    places = [detail["index"] for detail in interpreter.get_input_details()]
    logits = interpreter.get_output_details()[0]["index"]
    arrays = dict(zip(places, jax.tree.leaves(x), strict=True))

    def call() -> np.ndarray:
        for place, array in arrays.items():
            interpreter.set_tensor(place, array)
        interpreter.invoke()
        return interpreter.get_tensor(logits)

    return call

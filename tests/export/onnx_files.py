"""Running ONNX files, and looking into them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime


def run(file: Path, images: Any) -> np.ndarray:
    """Logits by onnxruntime."""
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": np.asarray(images)})[0])


def operators(file: Path) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in onnx.load(file).graph.node)


def sizes(file: Path, value: str) -> list[Any]:
    """Shape of the graph's input or output; open sizes by name."""
    graph = onnx.load(file).graph
    (found,) = (v for v in (*graph.input, *graph.output) if v.name == value)
    return [d.dim_param or d.dim_value for d in found.type.tensor_type.shape.dim]


def arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of the file, by name."""
    return {a.name: onnx.numpy_helper.to_array(a) for a in onnx.load(file).graph.initializer}

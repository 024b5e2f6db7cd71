"""ONNX export: one file with weights, for onnxruntime, OpenVINO, TensorRT and others.

The program is folded first (`sculpt.export.fold`), then written operation by operation. Every file is checked, loaded in
onnxruntime and compared with the model before it gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

# Importing these registers what they write.
import sculpt.export.onnx.contractions
import sculpt.export.onnx.idioms
import sculpt.export.onnx.pointwise
import sculpt.export.onnx.shapes
import sculpt.export.onnx.windows  # noqa: F401
from sculpt.arguments import checked
from sculpt.environment import required, versions
from sculpt.export.agreement import TOLERANCE, difference, model_logits
from sculpt.export.folding.folder import FoldedProgram, fold_program
from sculpt.export.onnx.writer import Unsupported, Writer, write_equation
from sculpt.files import require_folder, written_whole
from sculpt.inputs import as_text, rows
from sculpt.ir.any_batch import example_batch, input_names
from sculpt.ir.program import CONTRACTIONS, Literal
from sculpt.model import Model

LAYOUTS = ("NHWC", "NCHW")
IMAGES, LOGITS = "images", "logits"
"""Names of the graph's input and output."""
_OLDEST = 17
_LARGEST = 2**31 - 2**20
"""Bytes: a protobuf message ends at 2 GiB."""


@checked
def export_onnx(
    model: Model, path: str | Path, example_input: Any, *, opset: int = _OLDEST, layout: str = "NHWC"
) -> None:
    """Writes a model as an ONNX file.

    Weights are inside, BatchNorm is folded into them. The input is called "images", each of several by its path ("tokens", "images/0");
    the output "logits". The batch size stays open where the model's own code allows it, and is that of `example_input` otherwise.
    Convolutions are written channels first, with transposes at the borders only. The same model gives the same bytes.

    Args:
      model: the model, dense or compact, of float32 arrays.
      path: the file; in a folder that exists.
      example_input: array `[batch, ...]` that the model takes, or a pytree of arrays; the file is compared with the model on it.
        Images are float32; integers and booleans, such as tokens and masks, stay what they are.
      opset: version of ONNX's operators, 17 or newer.
      layout: "NHWC" for images as the model takes them; "NCHW" for channels first, which spares a transpose.

    Raises:
      ValueError: if the packages of the extra `onnx` are missing, an operation has no ONNX here (it is named, with its layer), the
        model computes in other than float32, the file would pass 2 GB, or its logits differ; no file is left then.
    """
    require_folder(path)
    onnx = required("onnx", "onnx")
    required("onnxruntime", "onnx")
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST <= opset <= newest:
        raise ValueError(f"opset must be from {_OLDEST} to {newest} (of the installed onnx), got {opset}")
    x = example_batch(example_input)
    if layout not in LAYOUTS or (layout == "NCHW" and np.ndim(x) != 4):
        raise ValueError(
            f"layout must be one of {', '.join(LAYOUTS)}, the latter for images [batch, height, width, channels]; got {layout!r} for "
            f"an input {as_text(x)}"
        )
    order = (0, 3, 1, 2) if layout == "NCHW" else None
    writer = write_program(fold_program(model, x), opset, order)
    message = _message(writer)
    try:
        onnx.checker.check_model(message, full_check=True)
    # The checker's exceptions have no common base but Exception.
    except Exception as error:
        raise ValueError(
            f"export_onnx cannot write this model, onnx refuses the graph: {error}; export_stablehlo takes any model"
        ) from error
    with written_whole(path) as temporary:
        temporary.write_bytes(message.SerializeToString(deterministic=True))
        _compare(model, temporary, x, order, _is_open(writer))


def named_inputs(x: Any) -> dict[str, np.ndarray]:
    """The inputs of an ONNX file by name."""
    return dict(zip(input_names(x, IMAGES), jax.tree.leaves(x), strict=True))


def write_program(folded: FoldedProgram, opset: int, order: tuple[int, ...] | None) -> Writer:
    """The graph of a folded program; None: it holds the axes of its inputs as the model does.

    Raises:
      ValueError: if an operation has no ONNX, or a value is of other than float32, integers and booleans.
    """
    program = folded.program
    images = jax.tree.leaves(folded.inputs)
    if any(x.dtype != jnp.float32 and not _is_discrete(x.dtype) for x in images):
        raise ValueError(
            f"export_onnx takes models of float32 images, integers and booleans, this one takes {as_text(folded.inputs)}"
        )
    names = input_names(folded.inputs, IMAGES)
    orders = [order or tuple(range(len(x.shape))) for x in images]
    writer = Writer(program, folded.arrays, folded.names, opset, dict(zip(names, orders)), LOGITS)
    labels = dict(zip(program.inputs, folded.names))
    layer = "the input"
    for eqn in program.equations:
        named = [labels[i] for i in eqn.inputs if not isinstance(i, Literal) and i in labels]
        if named and eqn.name in CONTRACTIONS:
            layer = f"layer {named[-1].rpartition('/')[0] or named[-1]}"
        place = f"{eqn.name} at {eqn.source}, at or after {layer}"
        for output in eqn.outputs:
            dtype = program.avals[output].dtype
            if jnp.issubdtype(dtype, jnp.inexact) and dtype != jnp.float32:
                raise ValueError(
                    f"export_onnx takes models that compute in float32, but {place} gives {dtype}"
                )
        try:
            write_equation(writer, eqn)
        except Unsupported as error:
            raise ValueError(
                f"export_onnx cannot write {place}: {error}; export_stablehlo takes any model"
            ) from error
    result = program.avals[program.outputs[0]] if not isinstance(program.outputs[0], Literal) else None
    if result is None or result.dtype != jnp.float32:
        raise ValueError(
            f"export_onnx takes models whose result is float32, this one gives {result and result.dtype}"
        )
    if not result.shape:
        raise ValueError("export_onnx takes models whose result is [batch, ...], this one gives one number")
    writer.finish()
    return writer


def _is_discrete(dtype: Any) -> bool:
    return dtype == np.bool_ or jnp.issubdtype(dtype, jnp.integer)


def _is_open(writer: Writer) -> bool:
    return export.is_symbolic_dim(writer.program.shape(writer.program.inputs[-1])[0])


def _message(writer: Writer) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    size = sum(array.nbytes for array in writer.arrays.values())
    if size > _LARGEST:
        raise ValueError(
            f"the weights take {size / 1e9:.2f} GB, a file of ONNX at most 2.1: export_stablehlo takes them"
        )
    program = writer.program
    inputs = [writer.tensor(value) for value in program.inputs[-len(writer.inputs) :]]
    dtypes = [program.avals[value].dtype for value in program.inputs[-len(writer.inputs) :]]
    nodes = []
    for node in writer.nodes:
        attributes: dict[str, Any] = {
            name: helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value
            for name, value in node.attributes.items()
        }
        nodes.append(
            helper.make_node(node.operator, node.inputs, node.outputs, node.outputs[0], **attributes)
        )
    result = program.shape(program.outputs[0])
    graph = helper.make_graph(
        nodes,
        "model",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [_size(x.shape[d]) for d in x.order]
            )
            for name, x, dtype in zip(writer.inputs, inputs, dtypes)
        ],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, [_size(n) for n in result])],
        [numpy_helper.from_array(array, name) for name, array in writer.arrays.items()],
    )
    opsets = [helper.make_opsetid("", writer.opset)]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="sculpt",
        producer_version=versions()["sculpt"],
    )


def _size(size: Any) -> Any:
    return str(size) if export.is_symbolic_dim(size) else size


def _compare(model: Model, file: Path, x: Any, order: Sequence[int] | None, any_batch: bool) -> None:
    """Raises ValueError unless onnxruntime gives the model's logits, for another batch size too where that is open."""
    run = _session(file)

    def differs(images: Any, expected: np.ndarray) -> float:
        turned = jax.tree.map(
            lambda a: np.ascontiguousarray(a if order is None else a.transpose(order)), images
        )
        return difference(run(turned), expected)

    expected, number = model_logits(model, x), len(jax.tree.leaves(x)[0])
    found = {number: differs(x, expected)}
    if any_batch:
        # Images rarely know of each other: the logits of other batches are known without compiling for them. Where they are not, the
        # model is asked.
        chosen = [*range(1, number)] or [0, 0]
        part = rows(x, chosen)
        by_parts = differs(part, expected[chosen])
        found[len(chosen)] = by_parts if by_parts <= TOLERANCE else differs(part, model_logits(model, part))
    for batch, value in found.items():
        if not value <= TOLERANCE:
            raise ValueError(
                f"the logits of the ONNX file differ from the model's by {value:.2e} of the largest for a batch of {batch} (at most "
                f"{TOLERANCE} expected); nothing was written"
            )


def _session(file: Path) -> Callable[[Any], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Errors are raised: none of it need go to the terminal too.
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    # onnxruntime's exceptions have no common base but Exception.
    except Exception as error:
        raise ValueError(f"onnxruntime does not load the ONNX file: {error}") from error
    return lambda images: np.asarray(session.run([LOGITS], named_inputs(images))[0])

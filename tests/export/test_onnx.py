from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.export.onnx import exporter as onnx_export
from sculpt.model import Model
from tests.architectures.architecture import from_linen
from tests.architectures.equality import distance, outputs
from tests.export.onnx_files import arrays, operators, run, sizes
from tests.nets.test_prunable import narrow
from tests.networks import network

IMAGES = jax.random.normal(jax.random.key(11), (3, 8, 8, 3))
WEIGHTS = {
    "w": jax.random.normal(jax.random.key(0), (5, 4)),
    "k": jax.random.normal(jax.random.key(1), (3, 3, 2, 4)),
}
VECTORS = jax.random.normal(jax.random.key(2), (3, 6, 5)) * 2.0
PICTURES = jax.random.normal(jax.random.key(3), (3, 7, 6, 2))
RESNET = from_linen(
    sculpt.nets.create("resnet8", num_classes=10), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
)(jax.random.key(0))
Function = Callable[[dict[str, jax.Array], jax.Array], jax.Array]


def export(model: Model, tmp_path: Path, x: Any, **options: Any) -> Path:
    file = tmp_path / "new" / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    sculpt.export_onnx(model, file, x, **options)
    assert [f.name for f in file.parent.iterdir()] == ["model.onnx"]
    return file


def same(function: Function, x: jax.Array, tmp_path: Path, **options: Any) -> Path:
    """Exports a function, which compares it; looks at it with other images too."""
    model = sculpt.from_function(function, WEIGHTS)
    file = export(model, tmp_path, x, **options)
    other = -x[::-1] * 1.3
    assert distance(outputs(model, other), run(file, other)) <= 1e-5
    return file


def dense(x: jax.Array) -> jax.Array:
    """Something that is not an operand or an image only."""
    return x @ WEIGHTS["w"]


ELEMENTWISE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "expm1_log1p": lambda y: jnp.expm1(y) + jnp.log1p(jnp.abs(y)),
    "exp2": jnp.exp2,
    "erf_erfc": lambda y: jax.lax.erf(y) - 2.0 * jax.lax.erfc(y),
    "rounding": lambda y: (
        jnp.round(y)
        + 2.0 * jnp.floor(y)
        + 3.0 * jnp.ceil(y)
        + jax.lax.round(2.0 * y, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    ),
    "powers": lambda y: (
        y**3 + 1.0 / (1.0 + y**2) + jax.lax.integer_pow(1.0 + y * y, -2) + jnp.abs(y) ** 1.5 + y**10
    ),
    "roots": lambda y: jax.lax.rsqrt(1.0 + y * y) + jnp.sqrt(jnp.abs(y)),
    "trigonometry": lambda y: jnp.sin(y) + jnp.cos(y) + jnp.tanh(y) + jnp.arctan(y) + jnp.sinh(y),
    "bounds": lambda y: (
        jnp.clip(y, -0.5, 0.7) + jnp.maximum(y, 0.2) + jnp.minimum(y, jnp.tanh(y)) + jax.nn.relu6(3.0 * y)
    ),
    "bounds_of_arrays": lambda y: jax.lax.clamp(-jnp.ones_like(y), y, jnp.full_like(y, 0.3)),
    "comparisons": lambda y: (
        jnp.where((y > 0.1) & ~(y >= 1.0) | (y < -1.0), y, -2.0 * y)
        + (y != y.max(1, keepdims=True)).astype(jnp.float32)
    ),
    "sign_and_finite": lambda y: jnp.sign(y) * jnp.isfinite(y).astype(jnp.float32),
    "softplus": jax.nn.softplus,
    "logsumexp": lambda y: y - jax.nn.logsumexp(y, axis=-1, keepdims=True),
    "gelus": lambda y: jax.nn.gelu(y, approximate=False) + jax.nn.gelu(y, approximate=True),
    "swishes": lambda y: jax.nn.silu(y) + jax.nn.hard_swish(y) * jax.nn.hard_sigmoid(y),
    "elus": lambda y: jax.nn.elu(y) + jax.nn.selu(y) + jax.nn.celu(y) + jax.nn.leaky_relu(y),
    "own_derivatives": lambda y: jax.checkpoint(jnp.tanh)(y) + jax.lax.stop_gradient(y),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.fast(
    "exp2",
    "erf_erfc",
    "rounding",
    "powers",
    "roots",
    "trigonometry",
    "bounds",
    "sign_and_finite",
    "softplus",
    "swishes",
    "elus",
    "own_derivatives",
)
def test_elementwise(name: str, tmp_path: Path) -> None:
    same(lambda params, x: ELEMENTWISE[name](dense(x)).sum(1), VECTORS, tmp_path)


SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "slices": lambda y: jnp.concatenate([y[:, 1:4], y[:, ::2], y[:, -1:]], axis=1),
    "strides": lambda y: y[:, 1::2, ::3],
    "reversed": lambda y: y[:, ::-1] + jnp.flip(y, (1, 2)),
    "picked": lambda y: y[:, jnp.asarray([3, 0, 0, 5])] * y[:, 2][:, None],
    "rows_and_columns": lambda y: y[:, jnp.asarray([3, 0])[:, None], jnp.asarray([1, 2, 0])[None]],
    "one": lambda y: y[:, 2, 1][:, None],
    "padded": lambda y: jnp.pad(y, ((0, 0), (1, 2), (0, 3)), constant_values=0.5),
    "cropped": lambda y: jax.lax.pad(y, jnp.float32(0), ((0, 0, 0), (-1, 2, 0), (1, -2, 0))),
    "split": lambda y: jnp.stack([a * (i + 1.0) for i, a in enumerate(jnp.split(y, 3, axis=1))], axis=2),
    "unstacked": lambda y: sum(a * (i + 1.0) for i, a in enumerate(jnp.unstack(y, axis=1))),  # type: ignore[arg-type, return-value]
    "transposed": lambda y: jnp.tanh(y.transpose(0, 2, 1)) @ jnp.ones((6, 2)) + y.mean(1)[..., None],
    "reshaped": lambda y: y.reshape(y.shape[0], 2, 3, 4).transpose(0, 3, 2, 1).reshape(y.shape[0], -1),
    "batch_merged": lambda y: jnp.tanh(y.reshape(-1, 4) @ jnp.ones((4, 3))).reshape(y.shape[0], 6, 3),
    "broadcast": lambda y: jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(4.0), (y.shape[0], 2, 4)), y], axis=1
    ),
    "rolled": lambda y: jnp.roll(y, (1, -2), (1, 2)),
    "dynamic": lambda y: jax.lax.dynamic_slice_in_dim(y, 4, 3, axis=1),
    "repeated": lambda y: jnp.repeat(y, 2, axis=1) * jnp.tile(y, (1, 2, 1)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.fast(
    "slices",
    "strides",
    "reversed",
    "picked",
    "one",
    "padded",
    "cropped",
    "split",
    "unstacked",
    "reshaped",
    "broadcast",
    "rolled",
    "dynamic",
)
def test_shapes(name: str, tmp_path: Path) -> None:
    same(lambda params, x: SHAPES[name](dense(x)), VECTORS, tmp_path)


REDUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all": lambda y: jnp.stack(
        [y.sum((1, 2)), y.max((1, 2)), y.min((1, 2)), y.prod((1, 2)), y.mean((1, 2))], axis=1
    ),
    "apart": lambda y: y.sum(1) + y.max(1) * y.mean(1) - y.min(1),
    "places": lambda y: (y.argmax(1) - 2 * y.argmin(1)).astype(jnp.float32),
    "running": lambda y: jnp.cumsum(y, axis=1) + jax.lax.cumsum(y, axis=2, reverse=True),
    "softmax_of_another_axis": lambda y: jax.nn.softmax(y, axis=1),
    "softmax_of_two_axes": lambda y: jax.nn.softmax(y, axis=(1, 2)),
    "spread": lambda y: (y - y.mean(2, keepdims=True)) / jnp.std(y, axis=2, keepdims=True),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.fast(
    "17-all",
    "17-running",
    "17-spread",
    "20-all",
    "20-apart",
    "20-places",
    "20-running",
    "20-softmax_of_another_axis",
    "20-softmax_of_two_axes",
    "20-spread",
)
def test_reductions(name: str, opset: int, tmp_path: Path) -> None:
    same(lambda params, x: REDUCTIONS[name](jnp.tanh(0.1 * dense(x))), VECTORS, tmp_path, opset=opset)


PRODUCTS = {
    "nab,bc->nac": (5, 4), "nab,cb->nca": (4, 5), "nab,ab->n": (6, 5), "nab,abc->nc": (6, 5, 3), "nab,bcd->nacd": (5, 2, 3),
    "nab,acb->nac": (6, 3, 5), "nab,a->nb": (6,), "nab,cd->nabcd": (2, 3), "nab,ncb->nac": None, "nab,nac->nbc": None,
    "nab,nab->na": None, "nab,nab->n": None,
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.fast("nab,bc->nac", "nab,ncb->nac", "nab,nac->nbc", "nab,nab->na", "nab,nab->n")
def test_products(name: str, tmp_path: Path) -> None:
    shape = PRODUCTS[name]
    weights = None if shape is None else jax.random.normal(jax.random.key(5), shape)
    same(
        lambda params, x: jnp.einsum(name, x, jnp.tanh(x) if weights is None else weights), VECTORS, tmp_path
    )
    if weights is not None:
        left, right, result = (*name.partition("->")[0].split(","), name.partition("->")[2])
        same(
            lambda params, x: jnp.einsum(f"{right},{left}->{result}", weights, x),
            VECTORS,
            tmp_path / "weights_first",
        )


def convolved(x: jax.Array, **options: Any) -> jax.Array:
    settings: dict[str, Any] = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    return jax.lax.conv_general_dilated(x, WEIGHTS["k"], **{**settings, **options})


def pooled(
    x: jax.Array, start: float, combine: Any, window: Sequence[int], strides: Sequence[int], **options: Any
) -> jax.Array:
    return jax.lax.reduce_window(
        x, start, combine, tuple(window), tuple(strides), options.pop("padding", "VALID"), **options
    )


WINDOWS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "strides_and_dilation": lambda x: convolved(x, window_strides=(2, 1), rhs_dilation=(1, 2)),
    "uneven_padding": lambda x: convolved(x, padding=((0, 2), (3, 1))),
    "bias_and_scale": lambda x: convolved(x) * jnp.arange(1.0, 5.0)[None, None, None] - 2.0,
    "transposed": lambda x: convolved(x, lhs_dilation=(2, 3), padding=((1, 2), (2, 2))),
    "one_axis": lambda x: jax.lax.conv_general_dilated(x[:, :, 0], WEIGHTS["k"][0], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
    "groups": lambda x: jax.lax.conv_general_dilated(convolved(x), WEIGHTS["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2),
    "channels_first_between": lambda x: jax.lax.conv_general_dilated(x, WEIGHTS["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NCHW")),
    "max": lambda x: pooled(convolved(x), -jnp.inf, jax.lax.max, (1, 3, 2, 1), (1, 2, 1, 1), padding=((0, 0), (1, 1), (0, 1), (0, 0))),
    "max_dilated": lambda x: pooled(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), window_dilation=(1, 2, 1, 1)),
    "min": lambda x: pooled(convolved(x), jnp.inf, jax.lax.min, (1, 2, 2, 1), (1, 2, 2, 1)),
    "sum": lambda x: pooled(convolved(x), 0.0, jax.lax.add, (1, 2, 3, 1), (1, 2, 2, 1), padding="SAME"),
    "mean": lambda x: pooled(convolved(x), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1)) / 4.0,
    "one_way": lambda x: pooled(x, 0.0, jax.lax.add, (1, 2, 1, 1), (1, 2, 1, 1)),
    "flattened": lambda x: convolved(x).reshape(x.shape[0], -1)[:, ::3],
    "joined": lambda x: jnp.concatenate([convolved(x), x], axis=-1).mean((1, 2)),
    "gated": lambda x: (y := convolved(x)) * jax.nn.sigmoid(y.mean((1, 2)))[:, None, None, :],
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.fast(
    "uneven_padding",
    "transposed",
    "groups",
    "channels_first_between",
    "max",
    "max_dilated",
    "min",
    "sum",
    "one_way",
    "joined",
)
def test_windows(name: str, tmp_path: Path) -> None:
    same(lambda params, x: WINDOWS[name](x), PICTURES, tmp_path)


@pytest.mark.slow
def test_a_network_is_convolutions_and_little_else(tmp_path: Path) -> None:
    x = IMAGES[..., :1]
    model = RESNET
    file = export(model, tmp_path, x)
    assert operators(file) == {
        "Transpose": 1, "Conv": 7, "Relu": 7, "Slice": 2, "Pad": 2, "Add": 4, "ReduceMean": 1, "MatMul": 1,
    }  # fmt: skip
    assert sizes(file, "images") == ["batch", 8, 8, 1] and sizes(file, "logits") == ["batch", 10]
    assert distance(outputs(model, x[:1]), run(file, x[:1])) <= 1e-5
    # Weights once, under their own names; nothing of BatchNorm.
    names = [n for n in arrays(file) if "/" in n]
    assert len(names) == 16 and not any("norm" in n for n in names)
    weights = sum(a.size for a in jax.tree.leaves(sculpt.fold(model, x).params))
    assert (
        sum(a.size for a in arrays(file).values() if a.dtype == np.float32) == weights + 1
    )  # the zero that shortcuts are padded with


@pytest.mark.slow
def test_images_with_channels_first(tmp_path: Path) -> None:
    x = jax.random.normal(jax.random.key(1), (2, 8, 6, 1))
    model = RESNET
    file = export(model, tmp_path, x, layout="NCHW")
    assert "Transpose" not in operators(file)
    assert sizes(file, "images") == ["batch", 1, 8, 6]
    assert distance(outputs(model, x), run(file, np.asarray(x).transpose(0, 3, 1, 2))) <= 1e-5


@pytest.mark.slow
def test_transformers_use_the_operators_that_engines_know(tmp_path: Path) -> None:
    model = narrow("vit_tiny_patch4")
    found = operators(export(model, tmp_path, IMAGES))
    assert (found["LayerNormalization"], found["Softmax"], found["Erf"]) == (5, 2, 2)
    assert not {"Exp", "Sqrt", "ReduceMean", "ReduceSum", "ReduceMax"} & set(found)
    assert operators(export(model, tmp_path, IMAGES, opset=20))["Gelu"] == 2


def test_means_over_a_width_that_was_are_no_layer_norm(tmp_path: Path) -> None:
    """A compact network divides by the width of the dense one."""

    def narrower(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = dense(x)
        mean = (y.sum(2) / 8.0)[..., None]
        variance = (jnp.square(y - mean).sum(2) / 8.0)[..., None]
        return (y - mean) * (jax.lax.rsqrt(variance + 1e-5) * jnp.arange(4.0)[None, None]) + jnp.arange(4.0)[
            None, None
        ]

    assert "LayerNormalization" not in operators(same(narrower, VECTORS, tmp_path))


def test_an_array_read_twice_is_stored_once(tmp_path: Path) -> None:
    file = same(lambda params, x: jnp.tanh(x @ params["w"]) @ params["w"].T @ params["w"], VECTORS, tmp_path)
    assert sorted(a.shape for a in arrays(file).values()) == [(4, 5), (5, 4)]


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (export(network("separable"), tmp_path / n, IMAGES).read_bytes() for n in "ab")
    assert first == second


def test_a_model_of_one_batch_size_is_exported_with_that(tmp_path: Path) -> None:
    def fixed(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x[jnp.asarray([2, 0, 1])].reshape(3, 30) @ jnp.ones((30, 2)) + float(len(x))

    file = export(sculpt.from_function(fixed, WEIGHTS), tmp_path, VECTORS)
    assert sizes(file, "images")[0] == 3


@pytest.mark.slow
def test_the_file_needs_neither_jax_nor_this_library(tmp_path: Path) -> None:
    file = export(network("plain"), tmp_path, IMAGES)
    np.save(tmp_path / "images.npy", IMAGES)
    code = (
        "import sys, numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(file)!r})\n"
        f"logits = session.run(None, {{'images': np.load({str(tmp_path / 'images.npy')!r})}})[0]\n"
        f"np.save({str(tmp_path / 'logits.npy')!r}, logits); assert not {{'sculpt', 'jax'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert distance(outputs(network("plain"), IMAGES), np.load(tmp_path / "logits.npy")) <= 1e-5


REFUSED: dict[str, tuple[Function, Any, str]] = {
    "operation": (lambda p, x: jnp.sort(x @ p["w"], axis=1), VECTORS, r"cannot write sort at test_onnx.py:\d+ .*, at or after layer w: .*export_stablehlo"),
    "loop": (lambda p, x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y), x), VECTORS, "cannot write scan at .*, at or after the input"),
    "half": (lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32), VECTORS, "float32, but convert_element_type at .* gives bfloat16"),
    "narrow": (lambda p, x: x.astype(jnp.float32) @ p["w"], VECTORS.astype(jnp.float16), r"float32 images, .*this one takes float16\[batch, 6, 5\]"),
    "result": (lambda p, x: (x @ p["w"]).argmax(-1), VECTORS, "result is float32, this one gives int32"),
    "places": (lambda p, x: jnp.take_along_axis(x, x.argmax(1, keepdims=True), axis=1), VECTORS, "gather at .*: places that the images say"),
    "batch": (lambda p, x: (x[:, None] * x[None]).reshape(x.shape[0], x.shape[0], 30), VECTORS, "several open sizes"),
    "two": (lambda p, x: (x, x), VECTORS, "returns one array"),  # type: ignore[dict-item]
    "input": (lambda p, x: x @ p["w"], PICTURES, "does not take the example input"),
    "scalar": (lambda p, x: x, 1.0, r"\[batch, \.\.\.\]"),
    "nothing": (lambda p, x: dense(x), VECTORS[:0], r"one image or more, got float32\[0, 6, 5\]"),
    "number": (lambda p, x: dense(x).sum(), VECTORS, r"result is \[batch, ...\], this one gives one number"),
    "argmax_of_booleans": (lambda p, x: (dense(x) > 0).argmax(1).astype(jnp.float32), VECTORS, "argmax at .*test_onnx.py.*: of booleans"),
    "windows_over_integers": (lambda p, x: pooled(jnp.round(x).astype(jnp.int32), -(2**31), jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1)).astype(jnp.float32), PICTURES, "windows over int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_one_clear_error(name: str, tmp_path: Path) -> None:
    function, x, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sculpt.export_onnx(sculpt.from_function(function, WEIGHTS), tmp_path / "f.onnx", x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 16}, "opset must be from 17"),
        ({"opset": 1000}, "opset must be from 17"),
        ({"layout": "CHWN"}, "layout must be one of NHWC, NCHW"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.export_onnx(network("plain"), tmp_path / "f.onnx", IMAGES, **options)
    with pytest.raises(ValueError, match="images"):
        sculpt.export_onnx(
            sculpt.from_function(lambda p, x: dense(x), WEIGHTS), tmp_path / "f", VECTORS, layout="NCHW"
        )


def test_images_that_know_of_each_other(tmp_path: Path) -> None:
    file = same(lambda params, x: dense(x) - dense(x).mean(0, keepdims=True), VECTORS, tmp_path)
    assert sizes(file, "logits")[0] == "batch"


def test_a_file_that_differs_is_not_left_behind(tmp_path: Path) -> None:
    calls = []

    def fickle(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        calls.append(1)
        return dense(x) + jnp.tanh(x).sum(2, keepdims=True) * float(len(calls))

    with pytest.raises(ValueError, match=r"differ from the model's by .* of the largest for a batch of 3"):
        sculpt.export_onnx(sculpt.from_function(fickle, WEIGHTS), tmp_path / "f.onnx", VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_files_past_what_protobuf_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_LARGEST", 1000)
    with pytest.raises(ValueError, match=r"weights take .* GB"):
        sculpt.export_onnx(network("plain"), tmp_path / "f.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


VIEWS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "itself": lambda y: y,
    "transpose": lambda y: y.transpose(0, 3, 1, 2).transpose(0, 2, 3, 1),
    "stop_gradient": jax.lax.stop_gradient,
    "max": lambda y: jnp.maximum(y, -jnp.inf),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_convolution_that_others_read_keeps_its_own_bias(view: str, tmp_path: Path) -> None:
    def function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = convolved(x)
        biased = VIEWS[view](y) + jnp.arange(4.0)[None, None, None]
        return (biased + jnp.tanh(y) * y).sum((1, 2))

    same(function, PICTURES, tmp_path)


@pytest.mark.parametrize("name", ["images", "logits", "MatMul_1", "Relu_1", "constant"])
def test_arrays_may_be_called_what_they_like(name: str, tmp_path: Path) -> None:
    def function(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params[name]) @ params["z"] + 1.5

    params = {name: WEIGHTS["w"], "z": WEIGHTS["w"].T}
    model = sculpt.from_function(function, params)
    file = export(model, tmp_path, VECTORS)
    assert distance(outputs(model, VECTORS), run(file, VECTORS)) <= 1e-5


def test_images_of_64_bits_are_taken_as_jax_takes_them(tmp_path: Path) -> None:
    wide = np.asarray(VECTORS, np.float64)
    file = export(sculpt.from_function(lambda p, x: dense(x), WEIGHTS), tmp_path, wide)
    assert distance(np.asarray(dense(VECTORS)), run(file, VECTORS)) <= 1e-5


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    model = sculpt.from_function(lambda p, x: dense(x), WEIGHTS)
    for export_ in (sculpt.export_onnx, sculpt.export_stablehlo):
        with pytest.raises(ValueError, match="is a folder, expected the name of a file to write"):
            export_(model, tmp_path, VECTORS)
    (tmp_path / "file").touch()
    for folder in ("file", "absent"):
        for export_ in (sculpt.export_onnx, sculpt.export_stablehlo, sculpt.export_litert, sculpt.save_model):
            with pytest.raises(
                ValueError, match=rf"no folder .*/{folder} to write model.* to: make it first"
            ):
                export_(model, tmp_path / folder / "model", VECTORS)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'autosculpt\[onnx\]'"):
        sculpt.export_onnx(network("plain"), tmp_path / "f.onnx", IMAGES)

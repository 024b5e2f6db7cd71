"""One suite for every network: the ONNX file gives the logits of the model, dense and compact; or the error says what is missing."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import sculpt
from sculpt.model import Model
from tests.architectures import ARCHITECTURES
from tests.architectures.architecture import from_linen
from tests.architectures.equality import distance, drawn_policy, outputs, prune
from tests.contracts.test_architectures import WITH_GROUPS, built, inputs, pruned
from tests.export.onnx_files import operators, run, sizes
from tests.nets.test_prunable import NARROW, images, narrow
from tests.nets.test_prunable import space_of as narrow_space
from tests.networks import slow_but

CIFAR = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
REFUSED = {
    "routed_experts": "cannot write top_k at .*, at or after layer router",
    "lstm": "cannot write scan at .*, at or after layer Dense_0",
    "gru": "cannot write scan",
    "lstm_function": "cannot write scan",
    "scanned_layers": "cannot write scan",
    "scan_function": "cannot write scan at .*, at or after layer embed",
    "cond": "cannot write cond",
    "fori_loop": "cannot write scan",
    "while_loop": "cannot write while",
    "written_buffer": "cannot write scan",
    "state_space": "cannot write scan",
    "own_kernels": "cannot write conv_general_dilated at .*: groups that depend on the batch size",
}
"""Networks that have no ONNX here, and what is said of them."""
QUICK = (
    "option_a", "inception", "shufflenet", "inverted_residual", "unet", "pixel_shuffle", "autoencoder", "wavenet", "convnext",
    "group_norm", "rms_norm", "layer_norm_slow", "swin", "fused_split", "grouped_queries", "experts", "pooled_head",
    "interleaved_rotary", "grouped_gates", "custom_vjp", "siamese", "whitened", "channels_first",
)  # fmt: skip
"""Each has something that no other one of them has."""


def assert_same_logits(model: Model, x: jax.Array, file: Path) -> None:
    """Compares at batch 1 and 8."""
    sculpt.export_onnx(model, file, x)
    expected = outputs(model, x)
    assert sizes(file, "images")[0] == "batch"
    for batch in (8, 1):
        assert distance(expected[:batch], run(file, x[:batch])) <= 1e-4


@slow_but("resnet18", "mobilenet_v3_small", "efficientnet_lite0", "vit_tiny_patch4", among=NARROW)
@pytest.mark.slow
def test_named_networks_dense_and_compact(name: str, tmp_path: Path) -> None:
    x = jnp.concatenate([images(name)] * 3)[:8] * jnp.arange(1.0, 9.0).reshape(-1, 1, 1, 1) / 4.0
    space = narrow_space(name)
    small = prune(narrow(name), space, drawn_policy(space, 1)).small
    for kind, model in (("dense", narrow(name)), ("compact", small)):
        assert_same_logits(model, x, tmp_path / kind)
        # Transposes stand at the borders: before convolutions, and where images become vectors or tokens.
        if not name.startswith(("vit", "deit")):
            assert operators(tmp_path / kind)["Transpose"] <= 2
    assert (tmp_path / "compact").stat().st_size < (tmp_path / "dense").stat().st_size


@pytest.mark.parametrize("name", ["resnet8", pytest.param("resnet20", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_cifar_resnets_dense_and_compact(name: str, tmp_path: Path) -> None:
    model = from_linen(sculpt.nets.create(name, num_classes=10), CIFAR)(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, CIFAR))
    small = prune(model, space, drawn_policy(space, 1)).small
    x = jax.random.normal(jax.random.key(2), (8, 8, 8, 3))
    assert_same_logits(model, x, tmp_path / "dense")
    assert_same_logits(small, x, tmp_path / "compact")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n not in REFUSED],
)
@pytest.mark.fast("rms_norm", "layer_norm_slow", "whitened", "channels_first", "custom_vjp")
def test_the_zoo(name: str, tmp_path: Path) -> None:
    assert_same_logits(built(name), inputs(name, 8), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in WITH_GROUPS if n not in REFUSED])
def test_the_zoo_compacted(name: str, tmp_path: Path) -> None:
    assert_same_logits(pruned(name, 1).small, inputs(name, 8), tmp_path / "model.onnx")


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.fast(
    "routed_experts",
    "lstm",
    "gru",
    "lstm_function",
    "scanned_layers",
    "scan_function",
    "cond",
    "while_loop",
    "written_buffer",
    "state_space",
    "own_kernels",
)
def test_what_has_no_onnx_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        sculpt.export_onnx(built(name), tmp_path / "model.onnx", inputs(name))
    assert list(tmp_path.iterdir()) == []

"""Weights go to PyTorch's names and back unchanged, whatever the library; Keras' are read; bad files give one clear error."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import sculpt
from sculpt import nets
from sculpt.data.parquet import read_parquet
from tests.architectures.architecture import draw
from tests.conftest import optimised
from tests.nets.test_prunable import NARROW

GOLDEN = Path(__file__).with_name("golden_logits.npz")
"""What PyTorch gives for the given weights on a few of the given images: made by `benchmarks/parity.py`."""
WEIGHTS = {"efficientnet_lite0": "imagenet_efficientnet_lite0.safetensors"}
PAIRS = [
    (name, naming)
    for name in NARROW
    if name != "resnet8_mlperf"
    for naming in nets.namings(nets.create(name, 5))
]


@functools.cache
def narrow(name: str) -> tuple[nn.Module, Any]:
    """A narrow network of that kind, and drawn variables."""
    options, side = NARROW[name]
    module = nets.create(name, 5, **options)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    )
    return module, draw(shapes, jax.random.key(3))


def loading(name: str) -> dict[str, Any]:
    """The options of `nets.load` for that network."""
    options, side = NARROW[name]
    return {**options, "side": side} if nets.family(name) == "vit" else options


def same(a: Any, b: Any) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(("name", "naming"), PAIRS)
@pytest.mark.fast(
    "resnet18-torchvision",
    "resnet18-timm",
    "resnet18-huggingface",
    "resnet50-timm",
    "resnet50-huggingface",
    "vgg16_bn-torchvision",
    "vgg16_bn-timm",
    "vgg16_bn_cifar-torchvision",
    "mobilenet_v1-timm",
    "mobilenet_v2-torchvision",
    "mobilenet_v2-timm",
    "mobilenet_v3_small-timm",
    "efficientnet_lite0-efficientnet_lite",
    "vit_tiny_patch4-torchvision",
    "vit_tiny_patch4-huggingface",
    "deit_tiny_distilled_patch16-timm",
    "deit_tiny_distilled_patch16-huggingface",
)
def test_weights_come_back_as_they_went(name: str, naming: str, tmp_path: Path) -> None:
    module, variables = narrow(name)
    nets.save(module, variables, tmp_path / "w.safetensors", naming)
    _, again = nets.load(name, tmp_path / "w.safetensors", 5, **loading(name))
    assert same(again, variables)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    module, variables = narrow("resnet18")
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), variables)
    with pytest.raises(ValueError, match=r"holds NaN or infinite values.* and \d+ more"):
        nets.save(module, broken, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [(None, {}, "path must be that of a file, got None"), ("w", {"head_key": 0}, "head_key must be one key")],
)
def test_what_is_no_path_or_key_is_refused(path: Any, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nets.load("resnet20", path, 10, **options)


@pytest.mark.slow
def test_a_pruned_dense_shaped_model_returns_to_its_owner(tmp_path: Path) -> None:
    side = NARROW["resnet18"][1]
    module, variables = narrow("resnet18")
    model = sculpt.from_linen(module, variables)
    x = jnp.zeros((1, side, side, 3))
    space = sculpt.make_space(sculpt.trace(model, x))
    policy = (space.num_options - 1).astype(np.int32)
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    nets.save(module, {"params": masked.params, **masked.state}, tmp_path / "w.safetensors")
    written = load_file(tmp_path / "w.safetensors")
    zeros = sum(int((np.asarray(w) == 0).sum()) for w in jax.tree.leaves(masked.params))
    assert zeros > 0 and sum(int((a == 0).sum()) for a in written.values()) == zeros
    small = sculpt.compact(masked, space, policy)
    with pytest.raises(ValueError, match=r"the arrays are not those of the dense ResNet: .* expected"):
        nets.save(module, {"params": small.params, **small.state}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="naming must be one of torchvision, timm, huggingface, got 'keras'"):
        nets.save(module, variables, tmp_path / "small.safetensors", "keras")
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56", "efficientnet_lite0"])
def test_given_weights_give_the_logits_of_pytorch(shared_data: Path, name: str) -> None:
    with np.load(GOLDEN, allow_pickle=False) as file:
        expected = file[name]
    if name == "efficientnet_lite0":
        images = read_parquet(shared_data / "imagenet" / "sample1000_224.parquet")[0][::250]
    else:
        with np.load(shared_data / "cifar10" / "test_lossless_first1000.npz", allow_pickle=False) as file:
            images = file["images"][:8]
    weights = shared_data / "weights" / WEIGHTS.get(name, f"cifar10_{name}.safetensors")
    module, variables = nets.load(name, weights, expected.shape[1])
    found = jax.jit(module.apply)(variables, nets.preprocess(name, images))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_efficientnet_reaches_its_accuracy(shared_data: Path) -> None:
    images, labels = (part[::4] for part in read_parquet(shared_data / "imagenet" / "sample1000_224.parquet"))
    module, variables = nets.load(
        "efficientnet_lite0", shared_data / "weights" / WEIGHTS["efficientnet_lite0"], 1000
    )
    predict = jax.jit(lambda x: module.apply(variables, nets.preprocess("efficientnet_lite0", x)))
    with optimised():
        logits = np.concatenate([np.asarray(predict(images[i : i + 50])) for i in range(0, 250, 50)])
    best = np.argsort(-logits, axis=1)[:, :5]
    assert np.mean(best[:, 0] == labels) == 0.884
    assert np.mean((best == labels[:, None]).any(1)) == 0.972


def test_keras_weights_give_the_published_accuracy(shared_data: Path) -> None:
    file = shared_data / "weights" / "cifar10_resnet8_mlperf_tiny.npz"
    module, variables = nets.load("resnet8_mlperf", file, 10)
    with np.load(shared_data / "cifar10" / "test_lossless_first1000.npz", allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]
    logits: Any = jax.jit(module.apply)(variables, nets.preprocess("resnet8_mlperf", images))
    assert np.mean(np.asarray(logits).argmax(1) == labels) == pytest.approx(0.881, abs=1e-6)


def test_keras_mobilenet_is_read(shared_data: Path) -> None:
    file = shared_data / "weights" / "vww96_mobilenetv1_025_mlperf_tiny.npz"
    _, variables = nets.load("mobilenet_v1", file, 2, width_multiplier=0.25)
    with np.load(file, allow_pickle=False) as raw:
        kernel = raw["depthwise_conv2d_12|depthwise_conv2d_12|depthwise_kernel:0"]
        mean, bias = (
            raw["batch_normalization|batch_normalization|moving_mean:0"],
            raw["conv2d|conv2d|bias:0"],
        )
    ours = variables["params"]["block13_depthwise"]["conv"]["kernel"]
    np.testing.assert_array_equal(ours[:, :, 0], kernel[..., 0])
    # BatchNorm takes a constant in front of it away.
    np.testing.assert_allclose(variables["batch_stats"]["stem"]["norm"]["mean"], mean - bias, rtol=1e-6)
    with pytest.raises(
        ValueError,
        match=r"does not fit mobilenet_v1 with 2 classes: .*moving_mean:0 is \[8\], expected \[32\]",
    ):
        nets.load("mobilenet_v1", file, 2)
    with pytest.raises(
        ValueError, match="does not fit MlperfResNet: it has 14 convolution layers where 9 are expected"
    ):
        nets.load("resnet8_mlperf", file, 10)
    with pytest.raises(
        ValueError, match="Keras weights are read for MlperfResNet, MobileNetV1; those of ResNet are not"
    ):
        nets.load("resnet18", file, 10)


def test_damaged_keras_files_are_refused(shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "weights" / "cifar10_resnet8_mlperf_tiny.npz").read_bytes()
    file = tmp_path / "weights.npz"
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a readable .npz file of arrays"):
            nets.load("resnet8_mlperf", file, 10)
    np.savez(file, a=np.asarray([{}], object))
    with pytest.raises(ValueError, match=r"is not a readable .npz file of arrays"):
        nets.load("resnet8_mlperf", file, 10)
    np.savez(file, odd=np.zeros(1))
    with pytest.raises(ValueError, match="has the unknown array odd"):
        nets.load("resnet8_mlperf", file, 10)


def test_position_embeddings_are_interpolated(tmp_path: Path) -> None:
    options, side = NARROW["deit_tiny_distilled_patch16"]
    module, variables = narrow("deit_tiny_distilled_patch16")
    position = np.zeros(variables["params"]["position"].shape, np.float32)
    position[:, :2], position[:, 2:] = 7.0, np.arange(12)[None, None]  # every place alike
    flat = {**variables, "params": {**variables["params"], "position": position}}
    nets.save(module, flat, tmp_path / "w.safetensors", "timm")
    load = functools.partial(
        nets.load, "deit_tiny_distilled_patch16", tmp_path / "w.safetensors", 5, **options
    )
    grown = np.asarray(load(side=2 * side)[1]["params"]["position"])
    assert grown.shape == (1, 2 + 4 * (side // 4) ** 2, 12)
    np.testing.assert_array_equal(grown[:, :2], 7.0)
    np.testing.assert_allclose(grown[0, 2:], np.broadcast_to(np.arange(12.0), grown[0, 2:].shape), atol=1e-5)
    with pytest.raises(ValueError, match=r"head.weight is \[5, 12\], expected \[6, 12\]"):
        nets.load("deit_tiny_distilled_patch16", tmp_path / "w.safetensors", 6, side=side, **options)


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_distilled_patch16"])
@pytest.mark.slow
def test_a_new_head_is_drawn_for_other_classes(name: str, tmp_path: Path) -> None:
    module, variables = narrow(name)
    nets.save(module, variables, tmp_path / "w.safetensors")
    load = functools.partial(nets.load, name, tmp_path / "w.safetensors", **loading(name))
    key = jax.random.key(3)
    found, again, five = (load(num_classes=classes, head_key=key)[1]["params"] for classes in (7, 7, 5))
    for part, before in variables["params"].items():
        if "head" not in part:
            jax.tree.map(np.testing.assert_array_equal, found[part], before)
        else:
            assert found[part]["kernel"].shape == (before["kernel"].shape[0], 7)
            np.testing.assert_array_equal(found[part]["kernel"], again[part]["kernel"])
            assert not np.array_equal(five[part]["kernel"], before["kernel"])
    with pytest.raises(
        ValueError, match=f"does not fit {name} with 7 classes.*; all but the head fits: .*--new-head"
    ):
        load(num_classes=7)


def test_weights_of_another_network_name_it(tmp_path: Path) -> None:
    module = nets.create("resnet20", 10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    nets.save(module, draw(shapes, jax.random.key(1)), tmp_path / "w.safetensors")
    for classes in (10, 5):
        with pytest.raises(ValueError, match=r"does not fit resnet8 with .*; these are weights of resnet20"):
            nets.load("resnet8", tmp_path / "w.safetensors", classes)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floating_point_becomes_single(dtype: Any, tmp_path: Path) -> None:
    module, variables = narrow("resnet18")
    nets.save(module, variables, tmp_path / "w.safetensors")
    arrays = {key: value.astype(dtype) for key, value in load_file(tmp_path / "w.safetensors").items()}
    save_file(arrays, tmp_path / "w.safetensors")
    _, found = nets.load("resnet18", tmp_path / "w.safetensors", 5, **loading("resnet18"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(variables), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_other_dtypes_are_refused(dtype: Any, tmp_path: Path) -> None:
    module, variables = narrow("resnet18")
    nets.save(module, variables, tmp_path / "w.safetensors")
    arrays = load_file(tmp_path / "w.safetensors")
    arrays["conv1.weight"] = arrays["conv1.weight"].astype(dtype)
    save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=f"conv1.weight is {np.dtype(dtype)}, expected floating point"):
        nets.load("resnet18", tmp_path / "w.safetensors", 5, **loading("resnet18"))


def test_a_side_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"resnet18 has no position embeddings.*leave out side=32"):
        nets.load("resnet18", "w.safetensors", 5, side=32)


def test_the_hub_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"(needs the extra|could not get model.safetensors of timm/none).*path"
    ) as caught:
        nets.download("timm/none")
    assert "\n" not in str(caught.value)


def test_networks_of_others_have_no_other_names() -> None:
    with pytest.raises(ValueError, match="that PyTorch's libraries have too, got Dense"):
        nets.namings(nn.Dense(3))

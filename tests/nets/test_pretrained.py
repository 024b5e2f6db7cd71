"""Published weights give the published accuracy; anything else is refused with its reason."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sculpt
from sculpt import nets

pytestmark = pytest.mark.optimised

# Measured with PyTorch on the first 1,000 test images (the data folder's README).
ACCURACY = {"resnet20": 0.915, "resnet32": 0.928, "resnet44": 0.933, "resnet56": 0.926}


def weights(shared_data: Path, name: str) -> Path:
    return shared_data / "weights" / f"cifar10_{name}.safetensors"


@pytest.mark.parametrize("name", sorted(ACCURACY))
def test_published_weights_give_the_published_accuracy(shared_data: Path, name: str) -> None:
    with np.load(shared_data / "cifar10" / "test_lossless_first1000.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    module, variables = nets.load(name, weights(shared_data, name), num_classes=10)

    @jax.jit
    def predict(variables, batch):
        logits: Any = module.apply(variables, nets.preprocess(name, batch))
        return logits.argmax(1)

    guesses = np.concatenate(
        [predict(variables, images[start : start + 250]) for start in range(0, 1000, 250)]
    )
    assert np.mean(guesses == labels) == pytest.approx(ACCURACY[name], abs=0.002)


def test_arrays_land_where_they_belong(shared_data: Path) -> None:
    raw = load_file(weights(shared_data, "resnet20"))
    _, variables = nets.load("resnet20", weights(shared_data, "resnet20"), 10)
    params, statistics = variables["params"], variables["batch_stats"]
    np.testing.assert_array_equal(params["stem_conv"]["kernel"], raw["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["head"]["kernel"], raw["linear.weight"].T)
    np.testing.assert_array_equal(
        params["stage3_block02"]["conv2"]["kernel"], raw["layer3.1.conv2.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["stage2_block01"]["norm1"]["scale"], raw["layer2.0.bn1.weight"])
    np.testing.assert_array_equal(
        statistics["stage2_block01"]["norm2"]["var"], raw["layer2.0.bn2.running_var"]
    )
    assert len(jax.tree.leaves(variables)) == len(raw)
    assert all(
        isinstance(leaf, jax.Array) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables)
    )


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A ResNet-8's weights under PyTorch's names, and the file to write them to."""
    module = nets.create("resnet8", 10)
    template = jax.eval_shape(module.init, jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))
    rng, arrays = np.random.default_rng(0), {}
    names = {
        "kernel": "weight",
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0]:
        *owner, kind = (str(part.key) for part in path[1:])
        name = re.sub(r"stage(\d)_block(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", ".".join(owner))
        name = name.replace("stem_conv", "conv1").replace("stem_norm", "bn1").replace("norm", "bn")
        value = rng.normal(size=leaf.shape).astype(np.float32)
        value = np.abs(value) if kind == "var" else value
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        arrays[f"{name.replace('head', 'linear')}.{names[kind]}"] = np.ascontiguousarray(value)
    return tmp_path / "weights.safetensors", arrays


def refused(file: Path, match: str, num_classes: int = 10) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        nets.load("resnet8", file, num_classes)
    assert "\n" not in str(caught.value)


def test_num_batches_tracked_is_ignored(small) -> None:
    file, arrays = small
    save_file({**arrays, "bn1.num_batches_tracked": np.asarray(7, np.int64)}, file)
    _, variables = nets.load("resnet8", file, 10)
    np.testing.assert_array_equal(variables["params"]["stem_norm"]["scale"], arrays["bn1.weight"])


def test_names_and_shapes_that_do_not_fit_are_listed(small) -> None:
    file, arrays = small
    arrays["layer1.0.shortcut.weight"] = arrays.pop("layer1.0.conv1.weight")
    arrays["conv1.weight"] = arrays["conv1.weight"][:, :1]
    save_file(arrays, file)
    refused(file, r"conv1.weight is \[16, 1, 3, 3\], expected \[16, 3, 3, 3\]")
    refused(file, r"missing layer1.0.conv1.weight \[16, 16, 3, 3\]")
    refused(file, r"unexpected layer1.0.shortcut.weight \[16, 16, 3, 3\]")


@pytest.mark.slow
def test_a_long_list_is_cut_short(small) -> None:
    file, _ = small
    save_file({"odd": np.zeros(2, np.float32)}, file)
    refused(file, r"does not fit resnet8 with 10 classes: missing .*; unexpected odd \[2\] and \d+ more$")


def test_another_number_of_classes_is_refused(small) -> None:
    file, arrays = small
    save_file(arrays, file)
    refused(file, r"linear.weight is \[10, 64\], expected \[100, 64\]", num_classes=100)


def test_two_names_for_one_parameter_are_refused(small) -> None:
    file, arrays = small
    save_file({**arrays, "fc.bias": arrays["linear.bias"]}, file)
    refused(file, r"unexpected fc.bias \[10\]")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(small, bad: float) -> None:
    file, arrays = small
    arrays["linear.bias"] = np.full(10, bad, np.float32)
    save_file(arrays, file)
    refused(file, "linear.bias holds NaN or infinite values")


def test_negative_variances_are_refused(small) -> None:
    file, arrays = small
    arrays["bn1.running_var"] = -arrays["bn1.running_var"]
    save_file(arrays, file)
    refused(file, "bn1.running_var holds negative variances")


def test_a_damaged_file_is_refused(small) -> None:
    file, arrays = small
    save_file(arrays, file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 200):
        file.write_bytes(content)
        refused(file, "is not a readable safetensors file")


@pytest.mark.parametrize("content", [b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"])
def test_files_of_other_formats_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "weights.keras"
    file.write_bytes(content)
    refused(
        file, r"weights are read from .safetensors files, or Keras' .npz files, got .*weights.keras: convert"
    )


def test_a_file_of_this_library_says_how_to_bring_it(tmp_path: Path) -> None:
    file = tmp_path / "dense.safetensors"
    sculpt.save_params({"params": {"head": {"bias": np.zeros(10, np.float32)}}}, file)
    refused(file, r"under tree paths, such as params/head/bias, .* write it with sculpt.nets.save")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no weights at")
    refused(tmp_path, "no weights at")


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was loaded",))


@pytest.mark.parametrize("name", ["weights.pth", "renamed.safetensors"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_never_loaded(tmp_path: Path, name: str, protocol: int) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps(_Trap(), protocol))
    refused(file, "pickled PyTorch checkpoint, which is never loaded")

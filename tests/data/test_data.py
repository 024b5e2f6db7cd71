"""Splits: disjoint, seeded, fixed test; loaders that say what is wrong."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import sculpt
from sculpt.data.named import load_data, load_parquet
from sculpt.data.splits import Split, Splits, from_arrays


def content(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def same(one: Split, other: Split) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)


def numbered(n: int = 120, m: int = 30, classes: int = 3) -> Splits:
    """Splits of images that each carry their own index, train from 0 and test from n."""
    index = np.arange(n + m)
    images = np.stack([index // 256, index % 256], -1).astype(np.uint8).reshape(-1, 1, 1, 2)
    labels = index % classes
    return from_arrays(images[:n], labels[:n], images[n:], labels[n:])


def indices(split: Split) -> list[int]:
    return (split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 0, 1]).tolist()


# Disjoint and seeded.


def test_correctness_06_splits_are_disjoint() -> None:
    splits = load_data("digits")
    train, validation, test = (content(split) for split in (splits.train, splits.validation, splits.test))
    assert (len(train), len(validation), len(test)) == (1097, 300, 400)  # all distinct, so sets lose none
    assert not (train & validation or train & test or validation & test)


def test_correctness_06_every_index_is_in_exactly_one_split() -> None:
    splits = numbered()
    assert sorted(indices(splits.train) + indices(splits.validation)) == list(range(120))
    assert indices(splits.test) == list(range(120, 150))


def test_correctness_06_same_seed_same_split_bit_for_bit() -> None:
    one, two, other = load_data("digits", seed=3), load_data("digits", seed=3), load_data("digits", seed=4)
    assert same(one.train, two.train) and same(one.validation, two.validation)
    assert not same(one.validation, other.validation)


@pytest.mark.parametrize("seed", ["a", 0.5, None])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed must be a whole number from 0 to 4294967295, got {seed!r}"):
        load_data("digits", seed=seed)


def test_correctness_05_test_never_depends_on_the_seed_or_on_validation() -> None:
    splits = [
        load_data("digits", seed=seed, validation=count) for seed, count in ((0, None), (1, 50), (2, 1000))
    ]
    assert all(same(each.test, splits[0].test) for each in splits)
    pools = [content(each.train) | content(each.validation) for each in splits]
    assert pools[0] == pools[1] == pools[2]


def test_correctness_05_labels_of_test_leave_train_and_validation_alone() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 4, 4, 3), np.uint8), rng.integers(0, 5, 90)
    labels[:5], labels[60:65] = range(5), range(5)
    one = from_arrays(images[:60], labels[:60], images[60:], labels[60:])
    two = from_arrays(images[:60], labels[:60], images[60:], labels[60:][::-1])
    assert same(one.train, two.train) and same(one.validation, two.validation)
    assert (one.mean, one.std, one.num_classes) == (two.mean, two.std, two.num_classes)


def test_labels_stay_with_their_images() -> None:
    splits = numbered()
    for split in (splits.train, splits.validation, splits.test):
        assert split.labels.tolist() == [index % 3 for index in indices(split)]


def test_every_class_keeps_its_proportion_and_no_order_of_classes_remains() -> None:
    splits = numbered(120, 30, 3)
    assert np.bincount(splits.validation.labels).tolist() == [4, 4, 4]
    assert len(set(splits.train.labels[:12].tolist())) == 3


def test_a_loader_can_swap_in_a_counting_split() -> None:
    """What proves elsewhere that nothing reads test: a wrapper in place of the split."""
    reads = []

    class Counting(Split):
        def __getattribute__(self, name: str):
            if name in ("images", "labels"):
                reads.append(name)
            return super().__getattribute__(name)

    splits = load_data("digits")
    counted = dataclasses.replace(splits, test=Counting(splits.test.images, splits.test.labels))
    counted.normalise(counted.train.images[:2])
    assert reads == []
    assert len(counted.test.images) == 400 and reads == ["images"]


# Digits.


def test_digits_are_scikit_learns() -> None:
    original = pytest.importorskip("sklearn.datasets").load_digits()
    splits = load_data("digits")
    ours = {}
    for split in (splits.train, splits.validation, splits.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        grey = np.rint(split.images.astype(np.float64) * 16 / 255)
        ours.update({image.tobytes(): label for image, label in zip(grey, split.labels)})
    assert len(ours) == 1797
    assert all(ours[image.tobytes()] == label for image, label in zip(original.images, original.target))


def test_digits_are_balanced_and_standardised() -> None:
    splits = load_data("digits")
    assert splits.num_classes == 10 and splits.name == "digits"
    x = splits.normalise(np.concatenate([splits.train.images, splits.validation.images]))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert np.bincount(splits.test.labels, minlength=10).min() >= 30
    assert np.bincount(splits.validation.labels, minlength=10).min() >= 25


# Normalising.


def test_normalise_is_the_stated_formula_on_the_host_and_under_jit() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 2), np.uint8)
    splits = dataclasses.replace(numbered(), mean=(0.5, 0.25), std=(0.125, 0.5))
    expected = (images / 255.0 - np.array([0.5, 0.25])) / np.array([0.125, 0.5])
    host = splits.normalise(images)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    np.testing.assert_allclose(host, expected, atol=2e-6)
    for given in (images, images.astype(np.float32), images.astype(jnp.bfloat16)):
        device = jax.jit(splits.normalise)(given)
        assert isinstance(device, jax.Array) and device.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(splits.normalise)(images), expected, atol=2e-6)
    np.testing.assert_allclose(splits.normalise(images[0]), expected[0], atol=2e-6)


def test_normalise_refuses_other_channels_and_dtypes() -> None:
    splits = numbered()
    with pytest.raises(
        ValueError, match=r"expected uint8 or floating images \[..., 2\], got uint8\[1, 4, 4, 3\]"
    ):
        splits.normalise(np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"got int32\[1, 4, 4, 2\]"):
        splits.normalise(np.zeros((1, 4, 4, 2), np.int32))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mean_and_deviation_are_measured_on_train_only(dtype: type) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 200, (50, 4, 4, 3), np.uint8).astype(dtype)
    splits = from_arrays(images, np.arange(50) % 2, np.full_like(images, 255), np.arange(50) % 2)
    x = splits.normalise(splits.train.images)
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)


# What is refused.

IMAGES, LABELS = np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"train_images": IMAGES[..., 0]},
            r"train images must be uint8 or floating \[n, height.*got uint8\[20, 4, 4\]",
        ),
        ({"train_images": IMAGES.astype(np.int64)}, r"got int64\[20, 4, 4, 3\]"),
        (
            {"test_images": IMAGES[:, :3]},
            r"\[20, 4, 4, 3\], test images uint8\[20, 3, 4, 3\]: only the first axis",
        ),
        ({"test_images": IMAGES.astype(np.float32)}, "only the first axis may differ"),
        ({"train_labels": LABELS[:7]}, r"labels must be integers \[20\].*got int64\[7\]"),
        ({"train_labels": LABELS.astype(np.float32)}, r"labels must be integers \[20\].*got float32\[20\]"),
        ({"test_labels": LABELS - 1}, "test labels must be 0 or more, the lowest is -1"),
        (
            {"num_classes": 2, "test_labels": LABELS + 1},
            "labels go up to 2, which does not fit num_classes=2",
        ),
        ({"train_labels": LABELS + 2**32 + 1}, "train labels: 4294967297 at index 0 is no number of 32 bits"),
        (
            {"test_labels": LABELS + 10**6},
            "labels go up to 1000001 with 20 training images: correct the label, or give num_classes",
        ),
        ({"train_labels": LABELS * 0, "test_labels": LABELS * 0}, "does not fit num_classes=1"),
        ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, r"test images are empty: \[0, 4, 4, 3\]"),
        ({"validation": 20}, "between 1 and 19, got 20"),
        ({"validation": 0}, "between 1 and 19, got 0"),
        ({"validation": 2.5}, "between 1 and 19, got 2.5"),
        ({"validation": True}, "between 1 and 19, got True"),
        ({"mean": (0.5,)}, "a mean and a positive std for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "a mean and a positive std for 3 channels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict, match: str) -> None:
    arguments = {
        "train_images": IMAGES,
        "train_labels": LABELS,
        "test_images": IMAGES,
        "test_labels": LABELS,
        **changes,
    }
    with pytest.raises(ValueError, match=match):
        from_arrays(**arguments)


def test_images_that_are_not_finite_are_refused() -> None:
    images = np.full((20, 4, 4, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="train images hold NaN"):
        from_arrays(images, LABELS, images, LABELS)


def test_an_unknown_name_gets_the_list_and_a_suggestion() -> None:
    with pytest.raises(
        ValueError, match=r"unknown data set 'digit', expected one of digits,.*did you mean 'digits'"
    ):
        load_data("digit")
    with pytest.raises(ValueError, match=r"unknown data set 'imagnet2012'.*did you mean 'imagenet2012'"):
        load_data("imagnet2012")
    for name in ("", "../digits", "no_such_data_set"):
        with pytest.raises(ValueError, match="unknown data set"):
            load_data(name)


def test_data_that_are_not_prepared_name_the_folder_and_the_command(tmp_path: Path, monkeypatch) -> None:
    command = f"python -m sculpt.data.cifar cifar100 --data-dir {tmp_path}"
    with pytest.raises(
        ValueError, match=f"cifar100 is not prepared in {tmp_path}; prepare it with: {command}"
    ):
        load_data("cifar100", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=f"in {tmp_path / 'elsewhere'}; .* tfds build mnist --data_dir"):
        load_data("mnist")


def test_another_file_format_is_refused_before_tensorflow_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"name": "mnist", "fileFormat": "tfrecord"}')
    with pytest.raises(ValueError, match="is tfrecord, which needs TensorFlow; expected array_record"):
        load_data("mnist", tmp_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"mnist in .* cannot be read"):
        load_data("mnist", tmp_path)


def test_digits_ignore_no_setting() -> None:
    assert len(sculpt.load_data("digits", validation=17).validation.labels) == 17


# Parquet.


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def write(file: Path, images: Iterable, labels: Iterable, **columns: Iterable) -> Path:
    pyarrow.parquet.write_table(
        pyarrow.table({"image": list(images), "label": list(labels), **columns}), file
    )
    return file


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    images = np.random.default_rng(2).integers(0, 256, (24, 5, 6, 3), np.uint8)
    encoded, labels = [encode(image) for image in images], [i % 3 for i in range(24)]
    train = write(tmp_path / "train.parquet", encoded[:18], labels[:18], extra=range(18))
    return train, write(tmp_path / "test.parquet", encoded[18:], labels[18:]), images


def test_parquet_gives_the_pixels_back(files) -> None:
    train, test, images = files
    splits = load_parquet("mine", train, test, validation=6)
    assert splits.num_classes == 3 and splits.name == "mine"
    np.testing.assert_array_equal(splits.test.images, images[18:])
    assert content(splits.train) | content(splits.validation) == {image.tobytes() for image in images[:18]}


def test_grey_images_become_rgb(tmp_path: Path, files) -> None:
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    test = write(tmp_path / "grey.parquet", [encode(grey)] * 2, [0, 1])
    splits = load_parquet("mine", files[0], test)
    np.testing.assert_array_equal(splits.test.images[0], np.repeat(grey[..., None], 3, -1))


def test_decoded_images_are_kept_only_where_asked_and_follow_the_file(tmp_path: Path, files) -> None:
    train, test, _ = files
    load_parquet("mine", train, test)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["test.parquet", "train.parquet"]
    first = load_parquet("mine", train, test, cache_dir=tmp_path / "cache")
    again = load_parquet("mine", train, test, cache_dir=tmp_path / "cache")
    assert same(first.test, again.test) and same(first.train, again.train)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 2 and all(file.suffix == ".npz" for file in kept)
    write(test, [encode(np.zeros((5, 6, 3), np.uint8))], [2])
    assert not np.any(load_parquet("mine", train, test, cache_dir=tmp_path / "cache").test.images[:])
    for file in kept:
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged .* delete it"):
        load_parquet("mine", train, test, cache_dir=tmp_path / "cache")


def test_parquet_that_does_not_fit_is_refused(tmp_path: Path, files) -> None:
    train, test, images = files
    png = encode(images[0])
    odd = tmp_path / "odd.parquet"
    cases = {
        r"odd.parquet, row 1: the image is uint8\[4, 6, 3\], others are uint8\[5, 6, 3\]: bring all to one": lambda: (
            write(odd, [png, encode(images[0, :4])], [0, 1])
        ),
        "odd.parquet, row 1: no readable image": lambda: write(odd, [png, b"no image"], [0, 1]),
        "row 0: image must be encoded bytes, got str": lambda: write(odd, ["text"], [0]),
        "label must be integers, got double": lambda: write(odd, [png], [0.5]),
        "has no rows": lambda: pyarrow.parquet.write_table(pyarrow.parquet.read_table(test).slice(0, 0), odd),
        r"has the columns \['a'\], expected image and label": lambda: pyarrow.parquet.write_table(
            pyarrow.table({"a": [1]}), odd
        ),
        "is not readable parquet": lambda: odd.write_bytes(train.read_bytes()[:99]),
    }
    for match, make in cases.items():
        make()
        with pytest.raises(ValueError, match=match):
            load_parquet("mine", train, odd)
    with pytest.raises(ValueError, match=r"no file .*none.parquet"):
        load_parquet("mine", tmp_path / "none.parquet", test)


def test_cifar10_jpeg_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cifar10-jpeg needs data_dir, the folder that holds train_jpeg"):
        load_data("cifar10-jpeg")
    with pytest.raises(ValueError, match=r"no file .*train_jpeg.parquet"):
        load_data("cifar10-jpeg", tmp_path)


def test_cifar10_jpeg_reads_the_real_images(shared_data: Path) -> None:
    splits = load_data("cifar10-jpeg", shared_data / "cifar10")
    shapes = [split.images.shape for split in (splits.train, splits.validation, splits.test)]
    assert shapes == [(45000, 32, 32, 3), (5000, 32, 32, 3), (10000, 32, 32, 3)]
    assert splits.num_classes == 10 and splits.mean == (0.485, 0.456, 0.406)
    assert np.bincount(splits.validation.labels).tolist() == [500] * 10
    train, validation, test = (content(split) for split in (splits.train, splits.validation, splits.test))
    assert not (train & validation or train & test or validation & test)
    with np.load(shared_data / "cifar10" / "test_lossless_first1000.npz", allow_pickle=False) as exact:
        np.testing.assert_array_equal(splits.test.labels[:1000], exact["labels"])
        difference = np.abs(splits.test.images[:1000].astype(int) - exact["images"].astype(int)).mean()
    assert difference < 8  # JPEG's loss; another order of the rows would give about 60


def test_splits_are_shown_by_their_shapes() -> None:
    shown = repr(load_data("digits"))
    assert "train=Split(uint8[1097, 8, 8, 1])" in shown
    assert len(shown) < 300

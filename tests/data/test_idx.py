"""Fashion-MNIST from idx files: the layout, what is wrong with a file, and the real one where it is installed."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

import sculpt
from sculpt.data import idx

IMAGES = np.random.default_rng(4).integers(0, 256, (50, 28, 28), np.uint8)
LABELS = (np.arange(50) % 10).astype(np.uint8)
NAMES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def encode(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, array in zip(NAMES, (IMAGES[:40], LABELS[:40], IMAGES[40:], LABELS[40:])):
        (tmp_path / name).write_bytes(gzip.compress(encode(array)))
    return tmp_path


def test_the_four_files_give_the_images_back(folder: Path) -> None:
    splits = sculpt.load_data("fashion_mnist", folder)
    assert (splits.name, splits.num_classes) == ("fashion_mnist", 10)
    np.testing.assert_array_equal(splits.test.images, IMAGES[40:, :, :, None])
    np.testing.assert_array_equal(splits.test.labels, LABELS[40:])
    assert (len(splits.train.labels), len(splits.validation.labels)) == (36, 4)
    given = {image.tobytes(): label for image, label in zip(IMAGES, LABELS)}
    for split in (splits.train, splits.validation):
        assert [given[image.tobytes()] for image in np.asarray(split.images)] == split.labels.tolist()


def test_files_that_are_unpacked_do_as_well(folder: Path) -> None:
    packed = sculpt.load_data("fashion_mnist", folder, validation=5)
    for name in NAMES[:3]:
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress((folder / name).read_bytes()))
        (folder / name).unlink()
    np.testing.assert_array_equal(
        sculpt.load_data("fashion_mnist", folder, validation=5).train.images, packed.train.images
    )


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (NAMES[0], gzip.compress(encode(IMAGES[:40]))[:-900], "images-idx3-ubyte.gz cannot be read: .*ended"),
        (NAMES[0], b"nothing", "images-idx3-ubyte.gz cannot be read: Not a gzipped file"),
        (
            NAMES[0],
            gzip.compress(encode(IMAGES[:40])[:-1]),
            r"should hold \[40, 28, 28\] values, it holds 31359 bytes of them",
        ),
        (NAMES[1], gzip.compress(encode(LABELS[:40]) + b"\0"), r"should hold \[40\] values, it holds 41 byt"),
        (
            NAMES[0],
            gzip.compress(encode(LABELS)),
            "is no idx file of uint8 of rank 3: it begins with 00 00 08 01",
        ),
        (NAMES[1], gzip.compress(b""), "is no idx file of uint8 of rank 1: it begins with nothing"),
        (
            NAMES[3],
            gzip.compress(encode(LABELS[:9])),
            r"holds 10 images, .*t10k-labels-idx1-ubyte.gz 9 labels",
        ),
    ],
    ids=["cut short", "no gzip", "a byte short", "a byte long", "other rank", "empty", "fewer labels"],
)
def test_a_damaged_file_is_one_clear_error(folder: Path, name: str, data: bytes, message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        sculpt.load_data("fashion_mnist", folder)


def test_files_that_are_missing_are_named(folder: Path) -> None:
    (folder / NAMES[2]).unlink()
    with pytest.raises(ValueError, match=f"{folder} lacks t10k-images-idx3-ubyte.gz$"):
        sculpt.load_data("fashion_mnist", folder)


def test_both_ways_to_have_it_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=f"no fashion_mnist in {tmp_path}: .*apt-get install dataset-fashion"
    ):
        sculpt.load_data("fashion_mnist", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "debian")
    message = f"no fashion_mnist in {tmp_path / 'debian'}: .* in {tmp_path / 'prepared'} with: tfds build fashion_mnist"
    with pytest.raises(ValueError, match=message):
        sculpt.load_data("fashion_mnist")


def test_where_debian_puts_it_is_where_it_is_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idx, "DEBIAN", folder)
    assert len(sculpt.load_data("fashion_mnist").test.labels) == 10


def test_neither_size_nor_stream_is_for_small_data(folder: Path) -> None:
    with pytest.raises(ValueError, match="fashion_mnist is small and of one size: leave out size"):
        sculpt.load_data("fashion_mnist", folder, size=32)
    with pytest.raises(ValueError, match="digits is small and of one size: leave out stream"):
        sculpt.load_data("digits", stream=True)


@pytest.mark.skipif(not idx.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_data_set() -> None:
    splits = sculpt.load_data("fashion_mnist")
    shapes = [split.images.shape for split in (splits.train, splits.validation, splits.test)]
    assert shapes == [(55_000, 28, 28, 1), (5_000, 28, 28, 1), (10_000, 28, 28, 1)]
    assert np.bincount(splits.validation.labels).tolist() == [500] * 10
    assert np.bincount(splits.test.labels).tolist() == [1_000] * 10
    levels = np.arange(256) / 255.0
    counts = sum(
        np.bincount(split.images[:].reshape(-1), minlength=256) for split in (splits.train, splits.validation)
    )
    mean = np.average(levels, weights=counts)
    deviation = np.sqrt(np.average((levels - mean) ** 2, weights=counts))
    assert abs(mean - splits.mean[0]) < 1e-4 and abs(deviation - splits.std[0]) < 1e-4

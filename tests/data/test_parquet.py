"""Parquet by name: sizes, Hugging Face's layout, and streams through an Arrow file."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import sculpt
from tests.training.tiny import KEY, Tiny

LABELS = [number % 3 for number in range(30)]


def photograph(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12 + number, 20, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


IMAGES = [photograph(number) for number in range(30)]


def write(file: Path, images: list[Any], labels: Any, **options: Any) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [0] * len(labels), "image": images, "label": labels}), file, **options
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.parquet", IMAGES[:24], LABELS[:24], row_group_size=7)
    write(tmp_path / "test.parquet", IMAGES[24:], LABELS[24:])
    return tmp_path


def same(one: sculpt.Splits, other: sculpt.Splits) -> None:
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(one, name).images[:], getattr(other, name).images[:])
        np.testing.assert_array_equal(getattr(one, name).labels, getattr(other, name).labels)
    assert (one.mean, one.std, one.num_classes) == (other.mean, other.std, other.num_classes)


def test_it_is_read_by_name_at_a_size(folder: Path) -> None:
    splits = sculpt.load_data("parquet", folder, size=8)
    assert splits.name == "parquet" and splits.train.images.shape == (22, 8, 8, 3)
    assert splits.test.labels.tolist() == LABELS[24:]
    with pytest.raises(
        ValueError, match=r"train.parquet, row 1: the image is uint8\[13, 20, 3\], others are"
    ):
        sculpt.load_data("parquet", folder)
    with pytest.raises(ValueError, match=r"parquet needs data_dir, the folder that holds train.parquet and"):
        sculpt.load_data("parquet")


def test_hugging_faces_layout_is_the_same(folder: Path) -> None:
    expected = sculpt.load_data("parquet", folder, size=8)
    for part, rows in (("train", slice(24)), ("test", slice(24, None))):
        images = [{"bytes": image, "path": None} for image in IMAGES[rows]]
        write(folder / f"{part}.parquet", images, LABELS[rows])
    same(sculpt.load_data("parquet", folder, size=8), expected)
    same(sculpt.load_data("parquet", folder, size=8, stream=True), expected)


def test_decoded_images_are_kept_for_each_size(folder: Path) -> None:
    files = "mine", folder / "train.parquet", folder / "test.parquet"
    for size in (6, 8, 6):
        splits = sculpt.load_parquet(*files, size=size, cache_dir=folder / "cache")
        assert splits.train.images.shape[1:] == (size, size, 3)
    cached = sorted((folder / "cache").iterdir())
    assert len(cached) == 4
    for file in cached:
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"npz is damaged .*: delete it and it is made again"):
        sculpt.load_parquet(*files, size=6, cache_dir=folder / "cache")


def test_a_stream_of_it_holds_the_same_and_copies_once(folder: Path) -> None:
    expected = sculpt.load_data("parquet", folder, size=8)
    assert sorted(file.suffix for file in folder.iterdir()) == [".parquet", ".parquet"]
    same(sculpt.load_data("parquet", folder, size=8, stream=True), expected)
    (copy,) = folder.glob("train-*.arrow")
    assert len(list(folder.iterdir())) == 3
    stamp = copy.stat().st_mtime_ns
    same(sculpt.load_data("parquet", folder, size=8, stream=True), expected)
    assert copy.stat().st_mtime_ns == stamp
    write(folder / "train.parquet", IMAGES[:23], LABELS[:23])  # another file, another copy
    splits = sculpt.load_data("parquet", folder, size=8, stream=True)
    assert len(splits.train.labels) + len(splits.validation.labels) == 23


def test_the_copy_of_a_folder_that_cannot_be_written_is_the_users(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sculpt.load_data("parquet", folder, size=8)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SCULPT_CACHE_DIR", str(cache))
    # Root may write anywhere, whatever the folder's mode.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    same(sculpt.load_data("parquet", folder, size=8, stream=True), expected)
    assert not list(folder.glob("*.arrow"))
    (copy,) = cache.rglob("train-*.arrow")
    copy.rename(
        folder / re.sub(r"-\w{12}-", "-", copy.name, count=1)
    )  # one that somebody else made is used where it is
    same(sculpt.load_data("parquet", folder, size=8, stream=True), expected)
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize(("rows", "validation"), [(30, 3), (12_000, 5_000)])
@pytest.mark.fast("30-3")
def test_cifar10_jpeg_sets_the_usual_aside_of_many_only(tmp_path: Path, rows: int, validation: int) -> None:
    for part in ("train", "test"):
        images = [IMAGES[0]] * (rows if part == "train" else 10)
        write(tmp_path / f"{part}_jpeg.parquet", images, [i % 10 for i in range(len(images))])
    splits = sculpt.load_data("cifar10-jpeg", tmp_path, size=1, stream=True)
    assert len(splits.validation.labels) == validation
    assert (splits.name, splits.num_classes) == ("cifar10-jpeg", 10)
    assert splits.mean == (0.485, 0.456, 0.406)


def test_what_is_wrong_with_it_is_named(folder: Path) -> None:
    train, test = folder / "train.parquet", folder / "test.parquet"
    sculpt.load_parquet("mine", train, test, size=8, stream=True, cache_dir=folder / "cache")
    (copy,) = (folder / "cache").iterdir()
    copy.write_bytes(copy.read_bytes()[:99])
    with pytest.raises(ValueError, match=r"train-.*.arrow is damaged .*: delete it and it is made again"):
        sculpt.load_parquet("mine", train, test, size=8, stream=True, cache_dir=folder / "cache")
    (folder / "file").touch()
    with pytest.raises(
        ValueError, match=r"cannot write .*file/.*: make room there, or name another folder as cache_dir of"
    ):
        sculpt.load_parquet("mine", train, test, size=8, stream=True, cache_dir=folder / "file")
    data = bytearray(train.read_bytes())
    data[50 : len(data) // 2] = bytes(len(data) // 2 - 50)
    train.write_bytes(data)
    with pytest.raises(ValueError, match=r"train.parquet"):
        sculpt.load_data("parquet", folder, size=8, stream=True)
    assert not list(folder.glob(".*tmp")) and not list(folder.glob("*.arrow"))


@pytest.mark.slow
def test_a_row_that_is_no_image_is_named_when_training_comes_to_it(folder: Path) -> None:
    write(folder / "train.parquet", [*IMAGES[:5], b"no image", *IMAGES[6:24]], LABELS[:24])
    files = "mine", folder / "train.parquet", folder / "test.parquet"
    grey: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    splits = sculpt.load_parquet(*files, size=8, stream=True, validation=1, **grey)
    module = Tiny()
    model = sculpt.from_linen(module, module.init(KEY, jnp.zeros((1, 8, 8, 3))))
    with pytest.raises(ValueError, match=r"train.parquet, row 5: no readable image \(none of JPEG, PNG, "):
        sculpt.train(model, splits, sculpt.FinetuneConfig(batch_size=4), KEY)


@pytest.mark.parametrize("label", [2**32 + 1, 2**31, -(2**31) - 1, 2**63])
def test_labels_that_int32_does_not_hold_are_refused(folder: Path, label: int) -> None:
    kind = pyarrow.uint64() if label == 2**63 else pyarrow.int64()
    write(folder / "test.parquet", IMAGES[:3], pyarrow.array([0, label, 1], kind))
    message = rf"test.parquet: label {label} at index 1 is no number of 32 bits"
    for stream in (False, True):
        with pytest.raises(ValueError, match=message):
            sculpt.load_data("parquet", folder, size=8, stream=stream)


def test_a_stray_label_does_not_make_classes(folder: Path) -> None:
    write(folder / "train.parquet", IMAGES[:24], [*LABELS[:23], 10**9])
    with pytest.raises(
        ValueError, match="parquet: labels go up to 1000000000 with 24 training images: correct"
    ):
        sculpt.load_data("parquet", folder, size=8)


@pytest.mark.parametrize("stream", [False, True])
def test_files_of_one_name_size_and_time_in_two_folders_are_told_apart(folder: Path, stream: bool) -> None:
    found = []
    for name, images in (("a", IMAGES), ("b", IMAGES[::-1])):
        (folder / name).mkdir()
        for part in ("train", "test"):
            file = folder / name / f"{part}.parquet"
            write(file, [image.ljust(5000, b"\0") for image in images], LABELS, compression="none")
            os.utime(file, ns=(10**18, 10**18))
        files = folder / name / "train.parquet", folder / name / "test.parquet"
        cached = sculpt.load_parquet("mine", *files, size=8, stream=stream, cache_dir=folder / "cache")
        same(cached, sculpt.load_parquet("mine", *files, size=8))
        found.append(files[0].stat().st_size)
    assert found[0] == found[1], "else the test shows nothing"

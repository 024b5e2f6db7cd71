"""Folders of images: classes by name, one size, and what is wrong with them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sculpt
from sculpt.data.decode import decode_image
from sculpt.data.stream import StreamedImages


def picture(file: Path, colour: int, size: tuple[int, int] = (10, 8)) -> None:
    """A plain picture, `size` wide and high."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, number in (("train", 6), ("val", 2)):
        for label, name in enumerate(("bee", "ant")):
            for i in range(number):
                picture(tmp_path / part / name / f"{i}.png", 100 * label + i)
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no picture")
    return tmp_path


def test_classes_are_numbered_by_name(folder: Path) -> None:
    splits = sculpt.load_data("folder", folder, validation=4)
    assert (splits.name, splits.num_classes) == ("folder", 2)
    assert splits.test.images.shape == (4, 8, 10, 3) and splits.test.images.dtype == np.uint8
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert splits.test.images[:, 0, 0, 0].tolist() == [100, 101, 0, 1]
    assert len(splits.train.labels) == 8 and len(splits.validation.labels) == 4


def test_pictures_are_brought_to_one_size(folder: Path) -> None:
    picture(folder / "train" / "ant" / "wide.jpg", 50, (40, 9))
    with pytest.raises(
        ValueError,
        match=r"wide.jpg: the image is uint8\[9, 40, 3\], others are uint8\[8, 10, 3\]: bring all to one",
    ):
        sculpt.load_data("folder", folder)
    splits = sculpt.load_folder(folder / "train", folder / "val", size=6)
    assert splits.train.images.shape[1:] == (6, 6, 3)


def test_what_is_missing_or_broken_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder needs data_dir"):
        sculpt.load_data("folder")
    with pytest.raises(ValueError, match="expected the folders train and test or val or validation"):
        sculpt.load_data("folder", folder / "train")
    with pytest.raises(
        ValueError, match=r"expected folders of images, one for each class, in .*: there are none"
    ):
        sculpt.load_folder(folder / "train" / "bee", folder / "val")
    with pytest.raises(
        ValueError, match="size must be a whole number of pixels of at least 1, or None, got 0"
    ):
        sculpt.load_folder(folder / "train", folder / "val", size=0)
    picture(folder / "val" / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match=r"differ in their classes: \['cat'\] are in one of them only"):
        sculpt.load_data("folder", folder)
    shutil.rmtree(folder / "val" / "cat")
    (folder / "train" / "ant" / "0.png").write_bytes(b"no png")
    with pytest.raises(ValueError, match=r"ant/0.png: no readable image"):
        sculpt.load_data("folder", folder)


def test_hidden_names_are_passed_over(folder: Path) -> None:
    expected = sculpt.load_data("folder", folder)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    picture(folder / "val" / ".cache" / "0.png", 9)
    (folder / "train" / "ant" / "._0.png").write_bytes(b"of another system")
    splits = sculpt.load_data("folder", folder)
    assert splits.num_classes == 2
    np.testing.assert_array_equal(splits.train.images, expected.train.images)
    np.testing.assert_array_equal(splits.train.labels, expected.train.labels)


def test_classes_without_images_are_named(folder: Path) -> None:
    (folder / "train" / "cat").mkdir()
    (folder / "val" / "cat").mkdir()
    (folder / "train" / "cat" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"train holds no images of the classes \['cat'\]"):
        sculpt.load_data("folder", folder)
    picture(folder / "train" / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match=r"val holds no images of the classes \['cat'\]"):
        sculpt.load_data("folder", folder)


def test_a_stream_of_it_holds_the_same(folder: Path) -> None:
    picture(folder / "train" / "ant" / "wide.jpg", 50, (40, 9))
    one, other = (sculpt.load_data("folder", folder, size=6, stream=stream) for stream in (False, True))
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(other, name).images[:], getattr(one, name).images)
        np.testing.assert_array_equal(getattr(other, name).labels, getattr(one, name).labels)
    assert (one.mean, one.std) == (other.mean, other.std)
    assert isinstance(other.train.images, StreamedImages)
    (folder / "train" / "ant" / "wide.jpg").unlink()
    with pytest.raises(ValueError, match=r"wide.jpg: no readable image .*No such file"):
        other.train.images[:]


def encoded(kind: str, size: tuple[int, int] = (10, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (9, 0, 0)).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_the_usual_formats_are_decoded(kind: str) -> None:
    assert decode_image(encoded(kind)).shape == (8, 10, 3)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "ICNS", "PDF"])
def test_no_other_decoder_runs(kind: str) -> None:
    with pytest.raises(
        ValueError, match=r"no readable image \(none of JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM\)"
    ):
        decode_image(encoded(kind))


@pytest.mark.parametrize("side", [9_000, 12_000, 100_000])
def test_large_images_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(ValueError, match=r"no readable image .*(limit|Image size)"):
        decode_image(f"P6 {side} {side} 255\n".encode() + bytes(99))


@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_images_are_counted_or_left_out(folder: Path, stream: bool) -> None:
    expected = sculpt.load_data("folder", folder, validation=1)
    for name in ("ant/zz.png", "bee/0a.png", "bee/zz.jpg"):
        (folder / "train" / name).write_bytes(b"no image")
    (folder / "val" / "bee" / "9.png").write_bytes(encoded("PNG")[:50])
    splits = sculpt.load_data("folder", folder, validation=1, skip_unreadable=True, stream=stream)
    assert len(splits.unreadable) == 4 and "ant/zz.png: no readable image" in splits.unreadable[0]
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(splits, name).images[:], getattr(expected, name).images)
        np.testing.assert_array_equal(getattr(splits, name).labels, getattr(expected, name).labels)
    count = "1 of 5" if stream else "3 of 15"
    with pytest.raises(ValueError, match=f"{count} images cannot be decoded, such as .*skip_unreadable"):
        sculpt.load_data("folder", folder, validation=1, stream=stream)


def test_a_folder_without_a_readable_image_is_refused(folder: Path) -> None:
    for file in (folder / "val").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 4 images can be decoded: .*no readable image"):
        sculpt.load_data("folder", folder, skip_unreadable=True)

"""ImageNet and its like as TensorFlow Datasets prepares them: several sizes, an unlabelled test, in memory or streamed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sculpt
from sculpt.data.stream import StreamedImages

TRAIN, VALIDATION = 24, 6


def clothes(number: int) -> io.BytesIO:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (28, 28), np.uint8)).save(out, "PNG")
    out.seek(0)
    return out


def photograph(number: int, kind: str) -> io.BytesIO:
    """Noise of a size of its own; one in five is wide, one is a PNG with transparency, as ImageNet has them."""
    height, width = (20 + number, 60 if number % 5 == 0 else 33)
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    image, out = Image.fromarray(pixels), io.BytesIO()
    image.convert("RGBA" if kind == "PNG" else "RGB").save(out, kind)
    out.seek(0)
    return out


def prepare(name: str, folder: Path) -> Path:
    """The official builder, writing a few images of ours."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official: Any = tfds.builder_cls(name)

    def examples(start: int, stop: int, names: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in range(start, stop):
            label = -1 if names is None else names[number % 3]
            image = photograph(number, "PNG" if number == 3 else "JPEG")
            example = {"image": clothes(number) if name == "fashion_mnist" else image, "label": label}
            yield number, example | ({"file_name": str(number)} if name == "imagenet2012" else {})

    def split_generators(builder: Any, manager: Any) -> dict[str, Any]:
        names = builder.info.features["label"].names
        held = examples(TRAIN, TRAIN + VALIDATION, names)
        found = {
            "train": examples(0, TRAIN, names),
            "test" if name == "fashion_mnist" else "validation": held,
        }
        return found | ({"test": examples(40, 44, None)} if name == "imagenet2012" else {})

    fields = {"_split_generators": split_generators, "__module__": official.__module__, "name": name}
    with registered.skip_registration():
        builder: Any = type(official.__name__, (official,), fields)(
            data_dir=folder, file_format="array_record"
        )
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_dir=folder / "downloads", download_config=config)
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("imagenette", "imagenet2012"):
        prepare(name, folder)
    return folder


@pytest.mark.parametrize("name", ["imagenette", "imagenette/full-size-v2:1.0.0", "imagenet2012"])
def test_images_of_several_sizes_are_brought_to_one(data_dir: Path, name: str) -> None:
    splits = sculpt.load_data(name, data_dir, size=16)
    assert splits.num_classes == (1000 if name == "imagenet2012" else 10)
    assert splits.train.images.shape == (22, 16, 16, 3) and splits.validation.images.shape == (2, 16, 16, 3)
    # The official validation, also where there is a test, since nobody has its labels.
    assert sorted(splits.test.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert splits.mean == (0.485, 0.456, 0.406)


def test_the_middle_square_is_what_remains(data_dir: Path) -> None:
    splits = sculpt.load_data("imagenette", data_dir, size=20)
    with Image.open(photograph(0, "JPEG")) as image:
        middle = np.asarray(image)[:, 20:40]  # it is 20 high and 60 wide
    seen = [np.asarray(split.images) for split in (splits.train, splits.validation)]
    assert sum(np.array_equal(image, middle) for image in np.concatenate(seen)) == 1


def test_without_a_size_they_are_refused(data_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"imagenette in .* row \d+ of train: the image is uint8.*bring all to one"
    ):
        sculpt.load_data("imagenette", data_dir)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="size must be a whole number of pixels of at least 1, or None"):
            sculpt.load_data("imagenette", data_dir, size=size)  # type: ignore[arg-type]


def test_a_stream_of_it_holds_the_same(data_dir: Path) -> None:
    one = sculpt.load_data("imagenette", data_dir, size=16)
    other = sculpt.load_data("imagenette", data_dir, size=16, stream=True)
    assert isinstance(other.train.images, StreamedImages)
    for split, streamed in (
        (one.train, other.train),
        (one.validation, other.validation),
        (one.test, other.test),
    ):
        np.testing.assert_array_equal(streamed.images[:], split.images)
        np.testing.assert_array_equal(streamed.labels, split.labels)


def test_a_shard_that_is_lost_is_one_clear_error(tmp_path: Path) -> None:
    written = prepare("imagenette", tmp_path)
    (shard,) = written.glob("*train.array_record*")
    shard.unlink()
    for stream in (False, True):
        with pytest.raises(ValueError, match=f"imagenette in {tmp_path} cannot be read"):
            sculpt.load_data("imagenette", tmp_path, size=16, stream=stream)


def test_fashion_mnist_may_be_prepared_as_well(tmp_path: Path) -> None:
    prepare("fashion_mnist", tmp_path)
    splits = sculpt.load_data("fashion_mnist", tmp_path)
    assert (splits.name, splits.num_classes, splits.mean) == ("fashion_mnist", 10, (0.286,))
    assert splits.test.images.shape == (VALIDATION, 28, 28, 1)

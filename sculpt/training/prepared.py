"""TensorFlow Datasets that are already on disk as array_record, read without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_OWN_PREPARER = ("cifar10", "cifar100")
_NAME = re.compile(r"\w+(/[\w.-]+)?(:[\w.*]+)?")


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The labelled images of a data set, in the order of its files."""

    train_images: np.ndarray
    """uint8 `[n, height, width, channels]`."""
    train_labels: np.ndarray
    """int32 `[n]`."""
    test_images: np.ndarray
    """uint8 `[m, height, width, channels]`."""
    test_labels: np.ndarray
    """int32 `[m]`."""
    num_classes: int


def data_directory(data_dir: str | Path | None) -> Path:
    """Where TensorFlow Datasets looks: `data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_known(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether a data set of that name is prepared, or is one that TensorFlow Datasets has."""
    if not _NAME.fullmatch(name):
        return False
    if _find(name, data_directory(data_dir)):
        return True
    import tensorflow_datasets as tfds

    return name.split(":")[0].split("/")[0] in tfds.list_builders(with_community_datasets=False)


def read_prepared(name: str, data_dir: str | Path | None = None) -> Prepared:
    """Reads and decodes a prepared data set with `tfds.data_source`; never downloads.

    Args:
      name: a TensorFlow Datasets name, perhaps with config and version (`name/config:1.0.0`).
      data_dir: see `data_directory`.

    Raises:
      ValueError: if it is not prepared there as array_record, has no `image` and `label`, no train and test (or
        validation) split, images of several sizes, or files that cannot be read.
    """
    directory = data_directory(data_dir)
    # Looked for first: without it TensorFlow Datasets starts a download, which hangs for minutes where there is no network.
    found = _find(name, directory)
    if not found:
        raise ValueError(
            f"{name} is not prepared in {directory}; prepare it with: {_command(name, directory)}"
        )
    with _named_errors(name, directory):
        formats = {json.loads(file.read_text()).get("fileFormat", "tfrecord") for file in found}
    if "array_record" not in formats:
        raise ValueError(
            f"{name} in {directory} is {'/'.join(sorted(formats))}, which needs TensorFlow; expected array_record, "
            f"prepared with: {_command(name, directory)}"
        )
    import tensorflow_datasets as tfds

    with _named_errors(name, directory):
        info = tfds.builder(name, data_dir=directory).info
        features: Any = info.features
        splits = list(info.splits)
    if not {"image", "label"} <= set(features):
        raise ValueError(f"{name} has the features {sorted(features)}, expected image and label")
    test = "test" if "test" in splits else "validation"
    if not {"train", test} <= set(splits):
        raise ValueError(f"{name} has the splits {splits}, expected train and test")
    mode = "L" if features["image"].shape[-1] == 1 else "RGB"
    with _named_errors(name, directory):
        # Pillow decodes as fast here, and does not warn that OpenCV is missing.
        decoders: Any = {"image": tfds.decode.SkipDecoding()}
        sources: Any = tfds.data_source(
            name, split=["train", test], data_dir=directory, download=False, decoders=decoders
        )
        train, held = (_arrays(source, mode) for source in sources)
    return Prepared(*train, *held, num_classes=features["label"].num_classes)


@contextlib.contextmanager
def _named_errors(name: str, directory: Path) -> Iterator[None]:
    """Whatever the layers below raise on a damaged directory, as one line that says which."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name} in {directory} cannot be read: {reason}") from error


def _find(name: str, directory: Path) -> list[Path]:
    folder = directory / name.split(":")[0]
    found = [*folder.glob("*/dataset_info.json"), *folder.glob("*/*/dataset_info.json")]
    return sorted(file for file in found if not file.parent.name.startswith("incomplete"))


def _command(name: str, directory: Path) -> str:
    if name in _OWN_PREPARER:
        return f"python -m sculpt.training.cifar {name} --data-dir {directory}"
    command = f"tfds build {name} --data_dir {directory} --file_format array_record"
    return f"{command} (needs: pip install 'autosculpt[tfds-prepare]')"


def _arrays(source: Any, mode: str) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    images, labels = [], []
    for example in source:
        with Image.open(io.BytesIO(example["image"])) as image:
            images.append(np.asarray(image.convert(mode)).reshape(image.height, image.width, -1))
        labels.append(int(example["label"]))
        if images[-1].shape != images[0].shape:
            sizes = f"{list(images[0].shape)}, {list(images[-1].shape)}"
            raise ValueError(f"its images have several sizes ({sizes}): resize them and use from_arrays")
    return np.stack(images), np.asarray(labels, np.int32)

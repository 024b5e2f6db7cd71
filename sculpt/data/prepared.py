"""Reads prepared TensorFlow Datasets (array_record) without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.data.decode import check_size, decode_image
from sculpt.data.stream import gather_labels

_OWN_PREPARER = ("cifar10", "cifar100")
_NAME = re.compile(r"\w+(/[\w.-]+)?(:[\w.*]+)?")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSource:
    """One split, decoded row by row in the order of its files; a `sculpt.data.stream.Source`."""

    encoded: Any
    """The `tfds.data_source`, which leaves images encoded."""
    mode: str
    size: int | None
    """As in `decode_image`."""
    where: str
    """Data set and folder, in messages."""
    split: str

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = self.encoded[row]
        image = decode_image(example["image"], self.mode, self.size)
        return {"image": image, "label": example["label"]}

    def place(self, row: int) -> str:
        """Data set, folder, row and split."""
        return f"{self.where} cannot be read: row {row} of {self.split}"

    def labels(self) -> np.ndarray:
        """int32 `[n]`; reads every record, decodes no image."""
        return gather_labels(lambda row: int(self.encoded[row]["label"]), np.arange(len(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The labelled splits of a data set."""

    train: PreparedSource
    test: PreparedSource
    num_classes: int
    where: str
    """Data set and folder, in messages."""


def data_directory(data_dir: str | Path | None) -> Path:
    """Where TensorFlow Datasets looks: `data_dir`, else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_known(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether a data set of that name is prepared, or is one that TensorFlow Datasets has."""
    if not _NAME.fullmatch(name):
        return False
    if _find(name, data_directory(data_dir)):
        return True
    return name.split(":")[0].split("/")[0] in official_names()


def official_names() -> list[str]:
    """Names that TensorFlow Datasets has."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def is_prepared(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether there is such a data set in the directory."""
    return bool(_find(name, data_directory(data_dir)))


def open_prepared(name: str, data_dir: str | Path | None = None, size: int | None = None) -> Prepared:
    """Opens a prepared data set with `tfds.data_source`; never downloads, decodes nothing yet.

    Its official validation is the test where there is no "test", or (ImageNet) one without labels.

    Args:
      name: a TensorFlow Datasets name, perhaps with config and version (`name/config:1.0.0`).
      data_dir: see `data_directory`.
      size: as in `decode_image`.

    Raises:
      ValueError: if it is not prepared there as array_record, has no `image` and `label`, no train and test (or
        validation) split, or files that cannot be read.
    """
    check_size(size)
    directory = data_directory(data_dir)
    # Looked for first: without it TensorFlow Datasets starts a download, which hangs for minutes where there is no network.
    found = _find(name, directory)
    if not found:
        raise ValueError(
            f"{name} is not prepared in {directory}; prepare it with: {preparing_command(name, directory)}"
        )
    with named_errors(f"{name} in {directory}"):
        formats = {json.loads(file.read_text()).get("fileFormat", "tfrecord") for file in found}
    if "array_record" not in formats:
        raise ValueError(
            f"{name} in {directory} is {'/'.join(sorted(formats))}, which needs TensorFlow; expected array_record, "
            f"prepared with: {preparing_command(name, directory)}"
        )
    import tensorflow_datasets as tfds

    with named_errors(f"{name} in {directory}"):
        info = tfds.builder(name, data_dir=directory).info
        features: Any = info.features
        splits = list(info.splits)
    if not {"image", "label"} <= set(features):
        raise ValueError(f"{name} has the features {sorted(features)}, expected image and label")
    tests = [split for split in ("test", "validation") if split in splits]
    if "train" not in splits or not tests:
        raise ValueError(f"{name} has the splits {splits}, expected train and test")
    mode, where = "L" if features["image"].shape[-1] == 1 else "RGB", f"{name} in {directory}"
    with named_errors(where):
        # Pillow decodes as fast here, and does not warn that OpenCV is missing.
        decoders: Any = {"image": tfds.decode.SkipDecoding()}
        sources: Any = tfds.data_source(
            name, split=["train", *tests], data_dir=directory, download=False, decoders=decoders
        )
        train, *held = (
            PreparedSource(source, mode, size, where, split)
            for source, split in zip(sources, ["train", *tests])
        )
        test = held[0] if len(held) == 1 or held[0].encoded[0]["label"] >= 0 else held[1]
    return Prepared(train, test, features["label"].num_classes, where)


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Whatever the layers below raise on a damaged directory, as one line that says which."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{where} cannot be read: {reason}") from error


def _find(name: str, directory: Path) -> list[Path]:
    folder = directory / name.split(":")[0]
    found = [*folder.glob("*/dataset_info.json"), *folder.glob("*/*/dataset_info.json")]
    return sorted(file for file in found if not file.parent.name.startswith("incomplete"))


def preparing_command(name: str, directory: Path) -> str:
    """What to type to have a data set there."""
    if name in _OWN_PREPARER:
        return f"python -m sculpt.data.cifar {name} --data-dir {directory}"
    command = f"tfds build {name} --data_dir {directory} --file_format array_record"
    return f"{command} (needs: pip install 'autosculpt[tfds-prepare]')"

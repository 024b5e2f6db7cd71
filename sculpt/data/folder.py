"""Reads images from folders, one folder per class."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.data.decode import check_size, decode_image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
_TESTS = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """`folder/<class>/<image>` as RGB, decoded row by row; a `sculpt.data.stream.Source`."""

    files: tuple[Path, ...]
    """By class and name."""
    labels: np.ndarray
    """int32 `[n]`."""
    classes: tuple[str, ...]
    size: int | None
    """As in `decode_image`."""

    @staticmethod
    def open(folder: Path, size: int | None = None) -> FolderSource:
        """The images of a folder, none of them read yet; classes are its folders, numbered in the order of their names.

        Names that begin with a dot are passed over.

        Raises:
          ValueError: if there are no classes, or some without images.
        """
        check_size(size)
        classes = [entry for entry in _visible(folder) if entry.is_dir()] if folder.is_dir() else []
        if not classes:
            raise ValueError(f"expected folders of images, one for each class, in {folder}: there are none")
        images = [[file for file in _visible(entry) if file.suffix.lower() in _SUFFIXES] for entry in classes]
        if empty := [entry.name for entry, found in zip(classes, images) if not found]:
            raise ValueError(
                f"{folder} holds no images of the classes {empty[:5]}: delete these folders, or put {'/'.join(_SUFFIXES)} there"
            )
        labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found) for found in images])
        names = tuple(entry.name for entry in classes)
        return FolderSource(tuple(itertools.chain.from_iterable(images)), labels, names, size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": decode_image(self.files[row], "RGB", self.size), "label": self.labels[row]}

    def place(self, row: int) -> str:
        """The file."""
        return str(self.files[row])


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def find_parts(folder: Path) -> tuple[Path, Path]:
    """`folder/train` and `folder/test` (or `val`).

    Raises:
      ValueError: if either is missing.
    """
    test = next((folder / name for name in _TESTS if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise ValueError(f"expected the folders train and {' or '.join(_TESTS)} in {folder}")
    return folder / "train", test

"""Images in folders: one folder for each class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.training.decode import check_size, decode_image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
_TESTS = ("test", "val", "validation")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """`folder/<class>/<image>` as RGB, decoded row by row; a `sculpt.training.stream.Source`."""

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

        Raises:
          ValueError: if there are no classes or images.
        """
        check_size(size)
        classes = (
            tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
            if folder.is_dir()
            else ()
        )
        found = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / name).iterdir())
            if file.suffix.lower() in _SUFFIXES
        ]
        if not found:
            raise ValueError(f"expected folders of images, one for each class, in {folder}: there are none")
        labels = np.asarray([label for _, label in found], np.int32)
        return FolderSource(tuple(file for file, _ in found), labels, classes, size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"image": decode_image(self.files[row], "RGB", self.size), "label": self.labels[row]}

    def place(self, row: int) -> str:
        """The file."""
        return str(self.files[row])


def find_parts(folder: Path) -> tuple[Path, Path]:
    """`folder/train` and `folder/test` (or `val`).

    Raises:
      ValueError: if either is missing.
    """
    test = next((folder / name for name in _TESTS if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise ValueError(f"expected the folders train and {' or '.join(_TESTS)} in {folder}")
    return folder / "train", test

"""Images that cannot be decoded: counts them, or leaves them out of a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sculpt.data.decode import UnreadableImage
from sculpt.data.stream import Source, StreamedImages, gather_labels

_NAMED = 3
"""Unreadable images that a message names."""


@dataclasses.dataclass(frozen=True, eq=False)
class ReadableRows:
    """The rows of a source whose images can be decoded; a `sculpt.data.stream.Source`."""

    source: Source
    rows: np.ndarray
    """int64 `[n]`: rows of the source, in its order."""
    unreadable: tuple[str, ...]
    """What is wrong with each of the others, with its place."""

    @staticmethod
    def of(source: Source, name: str) -> ReadableRows:
        """Decodes every image of a source once.

        Raises:
          ValueError: if no image can be decoded; for what else is wrong with a row, as `StreamedImages.read`.
        """
        wrong = find_unreadable(source, name)
        if len(wrong) == len(source):
            raise ValueError(
                f"{name}: none of {len(source)} images can be decoded: {next(iter(wrong.values()))}"
            )
        rows = np.asarray([row for row in range(len(source)) if row not in wrong], np.int64)
        return ReadableRows(source, rows, tuple(wrong.values()))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return self.source[int(self.rows[row])]

    def place(self, row: int) -> str:
        """As the source names it."""
        row = int(self.rows[row])
        place = getattr(self.source, "place", None)
        return f"row {row}" if place is None else place(row)


def find_unreadable(source: Source, name: str) -> dict[int, str]:
    """Row -> what is wrong, for the images of a source that cannot be decoded. Every row is read."""
    images = StreamedImages(source, name, np.arange(len(source)), (), np.dtype(np.uint8), 1, 1)
    wrong: dict[int, str] = {}

    def read(row: int) -> int:
        try:
            images.read(row)
        except UnreadableImage as error:
            wrong[row] = str(error)
        return 0

    gather_labels(read, images.rows)
    return dict(sorted(wrong.items()))


def read_whole(source: Source, name: str, workers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All images `[n, height, width, channels]` and labels int32 `[n]` of a source.

    Raises:
      ValueError: with the number of images that cannot be decoded, if there are any; see also `StreamedImages.read`.
    """
    try:
        return StreamedImages.of(source, name, workers).read_all()
    except UnreadableImage as error:
        wrong = list(find_unreadable(source, name).values()) or [str(error)]
        raise ValueError(
            f"{name}: {len(wrong)} of {len(source)} images cannot be decoded, such as {'; '.join(wrong[:_NAMED])}: "
            "replace them, or leave them out with skip_unreadable"
        ) from error

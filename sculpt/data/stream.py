"""Streams images from disk during training, for data sets larger than memory."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from sculpt.arguments import as_int32
from sculpt.data.decode import UnreadableImage
from sculpt.interrupts import check_interrupt

_SOME = 1024
"""Rows, at the most, that a thread reads labels of before the next asks for some."""
_SAMPLE = 16
"""Images that stand for all of a stream where one is told from another."""
_TAKEN_AS: dict[str, Callable[[Any], Any]] = {
    "image": np.asarray,
    "label": lambda label: np.int32(operator.index(label)),
}


class Source(Protocol):
    """Random access to labelled images, as `tfds.data_source`, array_record and grain give it. Many threads read it at once.

    A row is a mapping: "image", uint8 or floating `[height, width, channels]`, of one shape and dtype for all rows, and
    "label", a whole number, where labels are not given besides. A method `place(row)`, where there is one, names a row in messages.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedImages:
    """Images of a source. Indexed like an array `[n, height, width, channels]`, they are read and decoded then; nothing is kept.

    `images[3]`, `images[:100]` and `images[rows]` are arrays; only `images[:]` brings everything into memory.
    """

    source: Source
    name: str
    """Of the source, in messages."""
    rows: np.ndarray
    """int64 `[n]`: the source's row of every image."""
    image_shape: tuple[int, ...]
    """(height, width, channels)."""
    dtype: np.dtype
    """uint8 or float32."""
    workers: int
    """Threads that read and decode."""
    ahead: int
    """Batches that they read ahead of the one in use."""

    @staticmethod
    def of(source: Source, name: str, workers: int | None = None, ahead: int = 2) -> StreamedImages:
        """All images of a source; the first one is read, for the shape. By default there is a worker for each core.

        Raises:
          ValueError: for numbers that are not whole or below 1, a source without rows, or a first row without an image.
        """
        workers = _cores() if workers is None else workers
        for what, value in (("workers", workers), ("ahead", ahead)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")
        if len(source) == 0:
            raise ValueError(f"{name} has no rows")
        images = StreamedImages(source, name, np.arange(len(source)), (), np.dtype(np.uint8), workers, ahead)
        first = images.read(0)
        return dataclasses.replace(images, image_shape=first.shape, dtype=first.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, height, width, channels)."""
        return (len(self.rows), *self.image_shape)

    @property
    def ndim(self) -> int:
        """4."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> np.ndarray:
        if np.ndim(self.rows[which]) == 0:
            return self.read(int(self.rows[which]))
        with contextlib.closing(self.batches(iter([np.arange(len(self))[which]]))) as batches:
            return next(batches)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"the images of {self.name} are streamed, not in memory: take the rows that are needed, such as images[:256], "
            "or load them without stream"
        )

    def astype(self, _: Any) -> NoReturn:
        """Streamed images are no array: raises the ValueError that says so."""
        self.__array__()

    def subset(self, which: Any) -> StreamedImages:
        """Some of the images, in the order given; none is read."""
        return dataclasses.replace(self, rows=self.rows[which])

    def read_labels(self) -> np.ndarray:
        """Labels of the source, int32 `[n]`. Reads every row and discards its image.

        Raises:
          ValueError: see `read`.
        """
        return gather_labels(lambda row: self._take(row, "label")[0], self.rows, self.workers)

    def read_all(self) -> tuple[np.ndarray, np.ndarray]:
        """All images `[n, height, width, channels]` and the source's labels, int32 `[n]`; every row is read once.

        Raises:
          ValueError: see `read`.
        """
        images = np.empty(self.shape, self.dtype)

        def read(place: int) -> int:
            row = int(self.rows[place])
            image, label = self._take(row, "image", "label")
            images[place] = self._checked(row, image)
            return label

        labels = gather_labels(read, np.arange(len(self)), self.workers)
        return images, labels

    def content(self) -> np.ndarray:
        """Some images, spread evenly, to tell a stream from another; the same ones each time."""
        return self[np.unique(np.linspace(0, len(self) - 1, _SAMPLE).astype(np.int64))]

    def read(self, row: int) -> np.ndarray:
        """The image of one row of the source.

        Raises:
          ValueError: that names the row, for whatever the source raises on it, or an image of another shape or dtype.
        """
        return self._checked(row, *self._take(row, "image"))

    def _take(self, row: int, *names: str) -> list[Any]:
        """The image of a row, an array, or its label, a number, or both."""
        check_interrupt()
        try:
            example = self.source[row]
            return [_TAKEN_AS[name](example[name]) for name in names]
        except Exception as error:  # each kind of source has its own
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if isinstance(error, KeyError):
                reason = f"expected {' and '.join(names)}, there is no {reason}"
            kind = UnreadableImage if isinstance(error, UnreadableImage) else ValueError
            raise kind(f"{self._place(row)}: {reason}") from error

    def _checked(self, row: int, image: np.ndarray) -> np.ndarray:
        """An image as uint8 or float32, if it is like the others."""
        floating = np.issubdtype(image.dtype, np.floating)
        if image.ndim != 3 or image.size == 0 or not (floating or image.dtype == np.uint8):
            raise ValueError(
                f"{self._place(row)}: expected an image uint8 or floating [height, width, channels], "
                f"got {image.dtype}{list(image.shape)}"
            )
        image = image.astype(np.float32) if floating else image
        if floating and not np.isfinite(image).all():
            raise ValueError(f"{self._place(row)}: the image holds NaN or infinite values")
        if self.image_shape and (image.shape, image.dtype) != (self.image_shape, self.dtype):
            raise ValueError(
                f"{self._place(row)}: the image is {image.dtype}{list(image.shape)}, others are "
                f"{self.dtype}{list(self.image_shape)}: bring all to one (size= or --image-size, where data are read by name)"
            )
        return image

    def batches(self, chosen: Iterator[np.ndarray]) -> Generator[np.ndarray, None, None]:
        """Images of one batch after another, with the next `ahead` ones being read meanwhile.

        At most `ahead + 1` batches are in memory: those being read, and the one in use. Close it when done (`contextlib.closing`):
        then, as after an error, no thread of it is left.

        Args:
          chosen: int `[batch]` for each batch: which images.

        Raises:
          ValueError: see `read`.
        """
        with _readers(self.workers) as (pool, stop):
            begun: deque[_Batch] = deque()
            for _ in range(self.ahead):
                begun.extend(self._begin(pool, stop, chosen))
            while begun:
                batch = begun.popleft()
                for part in batch.parts:
                    part.result()
                begun.extend(self._begin(pool, stop, chosen))
                yield batch.images
                del batch  # not in use any more

    def _begin(
        self, pool: ThreadPoolExecutor, stop: threading.Event, chosen: Iterator[np.ndarray]
    ) -> Iterable[_Batch]:
        """Has the next batch read, if there is one."""
        if (which := next(chosen, None)) is None:
            return []
        rows = self.rows[which]
        images = np.empty((len(rows), *self.image_shape), self.dtype)

        def fill(places: np.ndarray) -> None:
            for place in places:
                if stop.is_set():
                    return
                images[place] = self.read(int(rows[place]))

        # Small parts, so that a slow image holds up few others.
        parts = np.array_split(np.arange(len(rows)), max(1, min(len(rows), 4 * self.workers)))
        return [_Batch(images, [pool.submit(fill, part) for part in parts])]

    def _place(self, row: int) -> str:
        place: Callable[[int], str] | None = getattr(self.source, "place", None)
        return f"{self.name}, row {row}" if place is None else place(row)


def gather_labels(read: Callable[[int], int], rows: np.ndarray, workers: int | None = None) -> np.ndarray:
    """int32 `[n]`: what `read` gives for each row. Threads read, by default one for each core."""
    workers = _cores() if workers is None else workers
    count = max(1, -(-len(rows) // _SOME), min(len(rows), 4 * workers))
    with _readers(workers) as (pool, stop):

        def some(part: np.ndarray) -> list[int]:
            return [read(int(row)) for row in part if not stop.is_set()]

        futures = [pool.submit(some, part) for part in np.array_split(rows, count)]
        return as_int32(np.concatenate([future.result() for future in futures]), "the label")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _readers(workers: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads, and what tells them to stop; none is left afterwards."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sculpt-reader")
    try:
        yield pool, stop
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """A batch that is being read."""

    images: np.ndarray
    parts: list[Future[None]]


def sent_ahead(
    batches: Generator[np.ndarray, None, None], send: Callable[[np.ndarray], jax.Array]
) -> Generator[jax.Array, None, None]:
    """Batches on the device, each sent there while the one before is in use. Closes `batches` when closed."""
    with contextlib.closing(batches):
        sent = None
        for batch in batches:
            ready, sent = sent, send(batch)
            del batch
            if ready is not None:
                yield ready
        if sent is not None:
            yield sent

"""Reads images and labels from parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.arguments import as_int32
from sculpt.cache import cache_folder
from sculpt.data.decode import check_size, decode_image
from sculpt.data.unreadable import read_whole
from sculpt.files import remove_leftovers, settle, temporary_name

_ROWS = 256
"""Rows that are copied at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetSource:
    """Columns `image` and `label` as RGB images, decoded row by row; a `sculpt.data.stream.Source`."""

    file: Path
    images: Any
    """pyarrow.ChunkedArray of encoded images, in memory or mapped into it."""
    labels: np.ndarray
    """int32 `[n]`."""
    size: int | None
    """As in `decode_image`."""

    @staticmethod
    def open(
        file: Path, size: int | None = None, mapped: bool = False, cache_dir: Path | None = None
    ) -> ParquetSource:
        """The rows of a file, none of them decoded yet.

        Args:
          file: parquet with columns `image` (encoded bytes: JPEG, PNG, ...; or, as Hugging Face's, a struct with `bytes`) and `label`
            (integers).
          size: as in `decode_image`.
          mapped: whether the encoded images are copied to an Arrow file, which is mapped into memory (parquet itself cannot be read
            at random), instead of being read into memory.
          cache_dir: the folder of that copy; None: that of `file`, or where it cannot be written to that of `cache_folder`.

        Raises:
          ValueError: if the file is missing or unreadable, empty, or lacks a column or a label.
        """
        check_size(size)
        import pyarrow.parquet

        with _readable(file):
            columns = pyarrow.parquet.read_schema(file).names
            if not {"image", "label"} <= set(columns):
                raise ValueError(f"{file} has the columns {columns}, expected image and label")
            if mapped:
                table = _map(_arrow_copy(file, cache_dir))
            else:
                table = pyarrow.parquet.read_table(file, columns=["image", "label"])
            images, labels = table.column("image"), table.column("label")
            if pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
                # Not `flatten`, which copies where a struct is null.
                images = pyarrow.chunked_array(
                    [chunk.field("bytes") for chunk in images.chunks], images.type.field("bytes").type
                )
            if not pyarrow.types.is_integer(labels.type):
                raise ValueError(f"{file}: label must be integers, got {labels.type}")
            if labels.null_count:
                raise ValueError(f"{file} has {labels.null_count} rows without a label: leave them out")
            if not len(images):
                raise ValueError(f"{file} has no rows")
            return ParquetSource(file, images, as_int32(labels.to_numpy(), f"{file}: label"), size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        encoded = self.images[row].as_py()
        return {"image": decode_image(encoded, "RGB", self.size), "label": self.labels[row]}

    def place(self, row: int) -> str:
        """File and row."""
        return f"{self.file}, row {row}"


def count_rows(file: Path) -> int:
    """Rows of a parquet file, none of which is read.

    Raises:
      ValueError: if the file is missing or unreadable.
    """
    import pyarrow.parquet

    with _readable(file):
        return pyarrow.parquet.read_metadata(file).num_rows


def read_parquet(
    file: Path, cache_dir: Path | None = None, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every image of a file as RGB.

    Args:
      file: see `ParquetSource.open`.
      cache_dir: folder that keeps the decoded arrays under a name made of the file's name, size and time.
      size: as in `decode_image`.

    Returns:
      images uint8 `[n, height, width, 3]` and labels int32 `[n]`, in the file's order.

    Raises:
      ValueError: if the file does not fit, or its images cannot be decoded or differ in size.
    """

    def read() -> tuple[np.ndarray, np.ndarray]:
        return read_whole(ParquetSource.open(file, size), str(file))

    if cache_dir is None or not file.is_file():
        return read()
    cached = cache_dir / f"{_version(file, apart=True)}{'' if size is None else f'-{size}px'}.npz"
    if not cached.exists():
        images, labels = read()
        with _written(cached) as temporary, temporary.open("wb") as out:
            np.savez(out, images=images, labels=labels)
        return images, labels
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"]
    except Exception as error:  # zipfile, zlib and NumPy each raise their own on damaged files
        raise ValueError(f"{cached} is damaged ({error}): delete it and it is made again") from error


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Whatever pyarrow raises on a file that is no parquet, as one line that names it."""
    if not file.is_file():
        raise ValueError(f"no file {file}: expected parquet with the columns image and label")
    try:
        yield
    except Exception as error:  # pyarrow raises many kinds on damaged files
        if type(error) is ValueError:  # this module's own; libraries raise subclasses
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not readable parquet: {reason}") from error


def _map(file: Path) -> Any:
    import pyarrow

    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()
        table.validate(full=True)
        return table
    except Exception as error:  # pyarrow raises many kinds on damaged files
        raise ValueError(f"{file} is damaged ({error}): delete it and it is made again") from error


def _arrow_copy(file: Path, folder: Path | None) -> Path:
    """The two columns as an uncompressed Arrow file, written in constant memory where it is not there yet."""
    import pyarrow
    import pyarrow.parquet

    copy = (folder or file.parent) / f"{_version(file, apart=folder is not None)}.arrow"
    if copy.exists():
        return copy
    if folder is None and not os.access(file.parent, os.W_OK):
        return _arrow_copy(file, cache_folder() / "parquet")
    with _written(copy) as temporary, pyarrow.parquet.ParquetFile(file) as source:
        columns = ["image", "label"]
        schema = pyarrow.schema([source.schema_arrow.field(name) for name in columns])
        with pyarrow.ipc.new_file(str(temporary), schema) as out:
            for batch in _batches(source, file, columns):
                out.write_batch(pyarrow.record_batch([batch.column(name) for name in columns], schema=schema))
    return copy


def _batches(source: Any, file: Path, columns: list[str]) -> Iterator[Any]:
    with _readable(file):  # so that its errors are not taken for those of writing
        yield from source.iter_batches(_ROWS, columns=columns)


def _version(file: Path, apart: bool) -> str:
    """Tells a version of a file from others; `apart`: also from files of that name in other folders."""
    about = file.stat()
    folder = hashlib.sha256(os.fsencode(file.resolve().parent)).hexdigest()[:12]
    return f"{file.stem}-{f'{folder}-' if apart else ''}{about.st_size:x}-{about.st_mtime_ns:x}"


@contextlib.contextmanager
def _written(file: Path) -> Iterator[Path]:
    """A temporary name, which becomes the file's when all is written and goes where something fails."""
    temporary = temporary_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(file.parent, file.name)
        yield temporary
        settle(temporary, file)
    except OSError as error:
        raise ValueError(
            f"cannot write {file} ({error.strerror or error}): make room there, or name another folder as cache_dir of load_parquet"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

"""Images and labels out of a parquet file."""

from __future__ import annotations

import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def read_parquet(file: Path, cache_dir: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every image of a file as RGB.

    Args:
      file: parquet with columns `image` (encoded bytes: JPEG, PNG, ...) and `label` (integers).
      cache_dir: folder that keeps the decoded arrays under a name made of the file's name, size and time.

    Returns:
      images uint8 `[n, height, width, 3]` and labels int32 `[n]`, in the file's order.

    Raises:
      ValueError: if the file is missing or unreadable, lacks a column, or its images cannot be decoded or differ in size.
    """
    if not file.is_file():
        raise ValueError(f"no file {file}: expected parquet with the columns image and label")
    if cache_dir is None:
        return _decode(file)
    about = file.stat()
    cached = cache_dir / f"{file.stem}-{about.st_size:x}-{about.st_mtime_ns:x}.npz"
    if not cached.exists():
        images, labels = _decode(file)
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_name(f".{cached.name}.{os.getpid()}.partial")
        with temporary.open("wb") as out:
            np.savez(out, images=images, labels=labels)
        os.replace(temporary, cached)
        return images, labels
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{cached} is damaged ({error}): delete it and it is made again") from error


def _decode(file: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(file).names
        if not {"image", "label"} <= set(columns):
            raise ValueError(f"{file} has the columns {columns}, expected image and label")
        table = pyarrow.parquet.read_table(file, columns=["image", "label"])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not readable parquet: {str(error).splitlines()[0]}") from error
    if not pyarrow.types.is_integer(table.schema.field("label").type):
        raise ValueError(f"{file}: label must be integers, got {table.schema.field('label').type}")
    if table.column("label").null_count:
        raise ValueError(
            f"{file} has {table.column('label').null_count} rows without a label: leave them out"
        )
    encoded = table.column("image").to_pylist()
    if not encoded:
        raise ValueError(f"{file} has no rows")
    with ThreadPoolExecutor() as pool:
        images = list(
            pool.map(lambda row: _image(file, row, encoded[row]), range(len(encoded)), chunksize=256)
        )
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        some = ", ".join(str(list(shape)) for shape in sorted(shapes)[:4])
        raise ValueError(f"{file} holds images of {len(shapes)} sizes ({some}): resize them to one first")
    return np.stack(images), table.column("label").to_numpy().astype(np.int32)


def _image(file: Path, row: int, encoded: object) -> np.ndarray:
    from PIL import Image

    if not isinstance(encoded, bytes):
        raise ValueError(f"{file}, row {row}: image must be encoded bytes, got {type(encoded).__name__}")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file}, row {row}: no readable image ({error})") from error

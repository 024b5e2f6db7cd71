"""Reads Fashion-MNIST: four files in the idx format."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the files."""
_PARTS = ("train", "t10k")
_UINT8 = 0x08


def find_files(folder: Path) -> tuple[Path, ...]:
    """Images and labels of train, images and labels of test, compressed or not; empty where none of them is there.

    Raises:
      ValueError: if some are there and others are missing.
    """
    names = [f"{part}-{kind}" for part in _PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    found = [
        next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)
        for name in names
    ]
    missing = [f"{name}.gz" for name, file in zip(names, found) if file is None]
    if len(missing) == len(names):
        return ()
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    return tuple(file for file in found if file is not None)


def read_idx(file: Path, rank: int) -> np.ndarray:
    """An array of uint8 out of an idx file: two zero bytes, type, rank, big-endian int32 sizes, then the values.

    Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998, describes the format.

    Raises:
      ValueError: if it cannot be read, is no idx file of uint8 of that rank, or has fewer or more values than it says.
    """
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    start = 4 + 4 * rank
    if data[:4] != bytes([0, 0, _UINT8, rank]) or len(data) < start:
        raise ValueError(
            f"{file} is no idx file of uint8 of rank {rank}: it begins with {data[:4].hex(' ') or 'nothing'}"
        )
    shape = struct.unpack(f">{rank}i", data[4:start])
    if min(shape) < 0 or len(data) - start != math.prod(shape):
        raise ValueError(
            f"{file} should hold {list(shape)} values, it holds {len(data) - start} bytes of them"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_images(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[n, height, width, 1]` and int32 `[n]`.

    Raises:
      ValueError: see `read_idx`; or if there are not as many labels as images.
    """
    pixels, classes = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(classes):
        raise ValueError(f"{images} holds {len(pixels)} images, {labels} {len(classes)} labels")
    return pixels[..., None], classes.astype(np.int32)

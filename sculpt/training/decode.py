"""Encoded images to pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np


def decode_image(encoded: bytes | Path, mode: str = "RGB", size: int | None = None) -> np.ndarray:
    """One image as uint8 `[height, width, channels]`.

    Args:
      encoded: a file, or what is in one: JPEG, PNG, ...
      mode: "RGB", or "L" for one channel of grey levels.
      size: the shorter side is scaled to as many pixels and the middle square cut out; None: as it is.

    Raises:
      ValueError: if it cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(encoded, bytes | Path):
        raise ValueError(f"image must be encoded bytes, got {type(encoded).__name__}")
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            picture = image.convert(mode)
    except UnidentifiedImageError as error:
        raise ValueError("no readable image (of no known format)") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"no readable image ({error})") from error
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def check_size(size: int | None) -> None:
    """Raises ValueError unless images can be brought to such a size."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"size must be a whole number of pixels of at least 1, or None, got {size!r}")

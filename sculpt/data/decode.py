"""Decodes image files to pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that are decoded. No other decoder of Pillow runs; that of EPS would start Ghostscript."""
MOST_PIXELS = 1 << 26
"""Pixels of the largest image that is decoded; 200 MB as RGB."""


class UnreadableImage(ValueError):
    """An image that cannot be decoded."""


def decode_image(encoded: bytes | Path, mode: str = "RGB", size: int | None = None) -> np.ndarray:
    """One image as uint8 `[height, width, channels]`.

    Args:
      encoded: a file, or the bytes of one, of a format in `FORMATS`.
      mode: "RGB", or "L" for one channel of grey levels.
      size: the shorter side is scaled to as many pixels and the middle square cut out; None: as it is.

    Raises:
      UnreadableImage: if it cannot be decoded, or has more than `MOST_PIXELS` pixels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not isinstance(encoded, bytes | Path):
        raise UnreadableImage(f"image must be encoded bytes, got {type(encoded).__name__}")
    try:
        with Image.open(
            io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=FORMATS
        ) as image:
            # Only the header is read so far.
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MOST_PIXELS:,}")
            picture = image.convert(mode)
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture).reshape(picture.height, picture.width, -1)
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"no readable image (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # each decoder raises its own kinds on damaged files
        raise UnreadableImage(f"no readable image ({str(error) or type(error).__name__})") from error


def check_size(size: int | None) -> None:
    """Raises ValueError unless images can be brought to such a size."""
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"size must be a whole number of pixels of at least 1, or None, got {size!r}")

"""Images in folders: one folder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
_TESTS = ("test", "val", "validation")


def read_folder(folder: Path, size: int | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Decodes `folder/<class>/<image>` as RGB.

    Args:
      folder: classes are its folders, numbered in the order of their names; other files are passed over.
      size: images are scaled so that their shorter side has as many pixels, and cut to the middle square; None: as they are.

    Returns:
      images uint8 `[n, height, width, 3]`, labels int32 `[n]`, by class and name; and the names of the classes.

    Raises:
      ValueError: if there are no classes or images, one cannot be decoded, or they differ in size.
    """
    from PIL import Image, ImageOps

    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    classes = (
        tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
    )
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise ValueError(f"expected folders of images, one for each class, in {folder}: there are none")
    images, first = [], files[0][0]
    for file, _ in files:
        try:
            with Image.open(file) as image:
                picture = image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"cannot decode {file}: {error}") from error
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        images.append(np.asarray(picture))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file} is {images[-1].shape[1]}x{images[-1].shape[0]}, {first} is {images[0].shape[1]}x{images[0].shape[0]}: "
                "name a size to bring all to"
            )
    return np.stack(images), np.asarray([label for _, label in files], np.int32), classes


def find_parts(folder: Path) -> tuple[Path, Path]:
    """`folder/train` and `folder/test` (or `val`).

    Raises:
      ValueError: if either is missing.
    """
    test = next((folder / name for name in _TESTS if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise ValueError(f"expected the folders train and {' or '.join(_TESTS)} in {folder}")
    return folder / "train", test

"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A name to write under, beside `path`: at the end the file gets its own name, and where anything is raised it is removed.

    The folder is made if need be.

    Raises:
      ValueError: if `path` is a folder, or its folder cannot be made.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder of {path} cannot be made: {error.strerror}") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

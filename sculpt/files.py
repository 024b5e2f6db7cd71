"""Atomic file writes: a file is complete under its name, or absent."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_REMOVED = ".removed-"
"""How the name of a folder begins that is being removed."""


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A name to write under, beside `path`. At the end the content is on disk and gets its own name; after an error it is removed.

    The folder is made if need be. A process that is killed leaves `.NAME.PID.tmp`, see `remove_leftovers`.

    Raises:
      ValueError: if `path` is a folder, its folder cannot be made, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder of {path} cannot be made: {error.strerror}") from error
    temporary = temporary_name(path)
    try:
        with named_disk_full(path):
            yield temporary
            settle(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """The name that this process writes a file under until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def settle(temporary: Path, path: Path) -> None:
    """Gives a finished file its name, once its content is on disk."""
    with temporary.open("rb+") as content:
        os.fsync(content.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextlib.contextmanager
def named_disk_full(path: Path) -> Iterator[None]:
    """Turns the error of a full disk into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # libraries raise their own kinds
        if not is_disk_full(error):
            raise
        raise ValueError(
            f"{path} cannot be written, the disk is full: free some space, then run the same again"
        ) from error


def require_folder(path: str | Path) -> None:
    """Raises ValueError unless the folder of a file to write is there."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder} to write {Path(path).name} to: make it first, or name another file"
        )


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it is there. It is renamed first, so that a kill leaves no part of it under its name."""
    if folder.is_dir():
        aside = folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what killed processes left in a folder, and below it: temporary files of `written_whole`, parts of `remove_folder`.

    `name` limits it to temporary files of that name, in the folder itself, whose process is no longer there; without it no other
    process may write in the folder meanwhile.
    """
    everywhere = name == "*"
    found = folder.rglob(".*.*.tmp") if everywhere else folder.glob(f".{glob.escape(name)}.*.tmp")
    aside = folder.rglob(f"{_REMOVED}*") if everywhere else ()
    for path in (*found, *aside):
        process = path.name.removesuffix(".tmp").rpartition(".")[2]
        if path.is_dir() and not (process.isdigit() and _is_alive(int(process))):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and process.isdigit() and (everywhere or not _is_alive(int(process))):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()

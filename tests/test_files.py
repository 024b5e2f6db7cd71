"""Files are there whole or not at all; a full disk is named; folders are renamed before they are removed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sculpt.files import is_disk_full, named_disk_full, remove_folder, remove_leftovers, written_whole


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"/file cannot be written, the disk is full: free some space"):  # noqa: SIM117
        with written_whole(tmp_path / "file") as temporary:
            temporary.write_text("content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_full_disk_is_seen_behind_other_errors(tmp_path: Path) -> None:
    behind = RuntimeError("a library's own")
    behind.__cause__ = OSError(errno.ENOSPC, "full")
    with (
        pytest.raises(ValueError, match="steps/3 cannot be written, the disk is full"),
        named_disk_full(tmp_path / "steps" / "3"),
    ):
        raise behind
    assert is_disk_full(ValueError("RESOURCE_EXHAUSTED: write: No space left on device"))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    with pytest.raises(PermissionError), named_disk_full(tmp_path):
        raise PermissionError


def test_a_kill_while_a_folder_is_removed_leaves_no_part_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "steps").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        remove_folder(folder)
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
    remove_folder(folder)  # which is not there


def test_temporary_files_that_a_living_process_writes_stay(tmp_path: Path) -> None:
    living, dead = tmp_path / f".a.{os.getppid()}.tmp", tmp_path / ".a.99999999.tmp"
    for file in (living, dead):
        file.touch()
    remove_leftovers(tmp_path, "a")
    assert list(tmp_path.iterdir()) == [living]

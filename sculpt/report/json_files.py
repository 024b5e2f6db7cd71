"""JSON files of a run directory: atomic, with a checksum where they are read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculpt.files import written_whole

_MADE_AGAIN = "remove it to have it made again"


class Record(dict[str, Any]):
    """An object of a JSON file. A key that it lacks is a ValueError that names the file, for the file is at fault."""

    def __init__(self, content: Mapping[str, Any], file: Path, remedy: str) -> None:
        super().__init__(content)
        self._file, self._remedy = file, remedy

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self._file} is damaged (it lacks {key!r}); {self._remedy}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object; the file is there whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(_text(content))


def read_json(path: Path, remedy: str = _MADE_AGAIN) -> Record:
    """Reads a JSON object, whose objects are `Record`s all the way down.

    Args:
      path: the file.
      remedy: what to do should it be damaged.

    Raises:
      ValueError: if the file holds something else.
    """
    try:
        content = json.loads(path.read_text(), object_hook=lambda found: Record(found, path, remedy))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, Record):
        raise ValueError(f"{path} is damaged (no JSON object); {remedy}")
    return content


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with the fingerprint of the rest as "fingerprint", its last key."""
    write_json(path, {**content, "fingerprint": fingerprint(content)})


def read_sealed(path: Path, remedy: str = _MADE_AGAIN) -> Record:
    """Reads what `write_sealed` wrote, without "fingerprint".

    Raises:
      ValueError: unless the file is, byte by byte, as it was written.
    """
    content = read_json(path, remedy)
    check_text(path, content, remedy)
    if content.pop("fingerprint", None) != fingerprint(content):
        raise ValueError(f"{path} is damaged (it does not match its fingerprint); {remedy}")
    return content


def check_text(path: Path, content: Mapping[str, Any], remedy: str = _MADE_AGAIN) -> None:
    """Raises ValueError unless `write_json` would write the file as it is."""
    if path.read_bytes() != _text(content).encode():
        raise ValueError(f"{path} is damaged (it is not as it was written); {remedy}")


def fingerprint(sections: Mapping[str, Any]) -> str:
    """SHA-256 of settings in canonical JSON."""
    return hashlib.sha256(json.dumps(as_json(sections), sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> Any:
    """Arrays, numpy scalars, tuples and paths as what JSON has for them."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return [as_json(v) for v in value]


def _text(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=2, allow_nan=False) + "\n"
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error

"""Policies in files: read one after the other, so that a file may hold millions of them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SUFFIXES = (".jsonl", ".npz", ".npy")


def read_policies(file: str | Path) -> Iterator[np.ndarray]:
    """The policies of a file, int32 `[sites]` each.

    | suffix | content |
    | --- | --- |
    | `.jsonl` | a list of integers on each line, or an object whose "policy" is one |
    | `.npz` | an array "policies", integers `[n, sites]` |
    | `.npy` | the same as the only array; read from disk as it is needed |

    Raises:
      ValueError: at once for a missing file or an unknown suffix; on the way for what is no policy, naming the line.
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"policies are read from {', '.join(SUFFIXES)} files, got {file}")
    if not file.is_file():
        raise ValueError(f"no file of policies at {file}")
    return _lines(file) if file.suffix == ".jsonl" else iter(_array(file))


def count_policies(file: str | Path) -> int:
    """How many policies `read_policies` will give, without reading them all into memory.

    Raises:
      ValueError: as `read_policies` does at once.
    """
    file = Path(file)
    read_policies(file)
    if file.suffix != ".jsonl":
        return len(_array(file))
    with file.open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def _lines(file: Path) -> Iterator[np.ndarray]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
            policy = content.get("policy") if isinstance(content, dict) else content
            if not isinstance(policy, list) or not all(type(option) is int for option in policy):
                raise ValueError(
                    f'{file}, line {number}: expected a list of integers or {{"policy": [...]}}, got {line.strip()[:60]}'
                )
            yield np.asarray(policy, np.int32)


def _array(file: Path) -> np.ndarray:
    try:
        if file.suffix == ".npy":
            policies = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(file, allow_pickle=False) as arrays:
                if "policies" not in arrays:
                    raise ValueError(f"it holds {sorted(arrays)}, expected an array 'policies'")
                policies = arrays["policies"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read policies from {file}: {error}") from error
    if policies.ndim != 2 or not np.issubdtype(policies.dtype, np.integer):
        raise ValueError(
            f"expected policies as integers [n, sites] in {file}, got {policies.dtype}{list(policies.shape)}"
        )
    return policies

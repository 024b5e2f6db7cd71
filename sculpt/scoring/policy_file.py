"""Reads and writes files of policies and scores, one row after another."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.files import written_whole
from sculpt.rows import DAMAGE, checksum_of, decode_row, encode_row

SUFFIXES = (".jsonl", ".npz", ".npy")
"""Of files of policies."""
_WRITTEN_BY = {".npz": (b"PK", "numpy.savez"), ".npy": (b"\x93NUMPY", "numpy.save")}
"""How an array's file begins, and what writes it."""
COLUMNS = (
    "accuracy",
    "loss",
    "macs",
    "macs_ratio",
    "macs_realised",
    "macs_realised_ratio",
    "params",
    "params_ratio",
)
"""What is written of each policy, besides its index in the stream and itself."""
COUNTS = ("macs", "macs_realised", "params")
"""Those of them that are whole numbers."""


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
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
            policy = content.get("policy") if isinstance(content, dict) else content
            if not isinstance(policy, list) or not all(
                type(option) is int and abs(option) < 2**31 for option in policy
            ):
                raise ValueError(
                    f'{file}, line {number}: expected a list of integers or {{"policy": [...]}}, got {line.strip()[:60]}'
                )
            yield np.asarray(policy, np.int32)


def _array(file: Path) -> np.ndarray:
    begins, writer = _WRITTEN_BY[file.suffix]
    try:
        # NumPy takes what it does not know for a pickle, and says so.
        with file.open("rb") as content:
            if not content.read(8).startswith(begins):
                raise ValueError(
                    f"{writer} did not write it; write it with that, or name it .jsonl if every line is a policy"
                )
        if file.suffix == ".npy":
            policies = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(file, allow_pickle=False) as arrays:
                if "policies" not in arrays:
                    raise ValueError(f"it holds {sorted(arrays)}, expected an array 'policies'")
                policies = arrays["policies"]
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged files
        raise ValueError(f"cannot read policies from {file}: {str(error) or type(error).__name__}") from error
    if policies.ndim != 2 or not np.issubdtype(policies.dtype, np.integer):
        raise ValueError(
            f"expected policies as integers [n, sites] in {file}, got {policies.dtype}{list(policies.shape)}"
        )
    return policies


def check_scores_file(file: Path, policies: Any) -> None:
    """Raises ValueError unless scores can be written to a file of this name, which is not that of the policies."""
    if file.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"scores are written to .jsonl or .parquet files, got {file}")
    if isinstance(policies, str | Path) and Path(policies).resolve() == file.resolve():
        raise ValueError(f"{file} holds the policies: name another file for their scores")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `.jsonl` file of scores: "index", "policy" and `COLUMNS`, numbers or None.

    Raises:
      ValueError: for a line that is not as it was written, naming it.
    """
    with file.open("rb") as lines:
        for index, line in enumerate(lines):
            try:
                row = decode_row(line)
                if row["index"] != index:
                    raise ValueError(f"it has the index {row['index']}")
            except DAMAGE as error:
                raise ValueError(
                    f"{file}, line {index + 1} is damaged: delete the file to score all policies again, or cut it off before that line "
                    "to score those from there on"
                ) from error
            yield row


def pack_rows(lines: Path, out: Path) -> None:
    """Makes a parquet file of a `.jsonl` file of scores, some thousand rows at a time.

    Raises:
      ValueError: as `read_rows` does, or if the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("policy", pa.list_(pa.int32())),
            *((name, pa.int64() if name in COUNTS else pa.float32()) for name in COLUMNS),
            ("crc32", pa.int64()),
        ]
    )
    rows = ({**row, "crc32": checksum_of(row)} for row in read_rows(lines))
    with (
        written_whole(out) as temporary,
        pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer,
    ):
        while block := list(itertools.islice(rows, 8192)):
            writer.write_table(pa.Table.from_pylist(block, schema))


def unpack_rows(out: Path, lines: Path) -> None:
    """Makes the `.jsonl` file again that `pack_rows` made a parquet file of.

    Raises:
      ValueError: if the parquet file is damaged, or the disk is full.
    """
    with written_whole(lines) as temporary, temporary.open("w") as target:
        for line in _packed_lines(out):
            target.write(line + "\n")


def _packed_lines(out: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(out, page_checksum_verification=True) as source:
            for batch in source.iter_batches(8192):
                for row in batch.to_pylist():
                    checksum = row.pop("crc32")
                    row |= {name: as_json(row[name]) for name in COLUMNS}
                    if row["index"] != index or checksum_of(row) != checksum:
                        raise ValueError(f"row {index} does not match its checksum")
                    index += 1
                    yield encode_row(row)
    except Exception as error:  # pyarrow raises many kinds on damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{out} is damaged ({reason}): delete it to score all policies again") from error


def as_json(value: Any) -> int | float | None:
    """A whole number as it is, another as the shortest that reads back as the same float32; None for None and what is not finite, which
    JSON lacks."""
    if isinstance(value, int | np.integer):
        return int(value)
    return None if value is None or not math.isfinite(value) else float(str(np.float32(value)))

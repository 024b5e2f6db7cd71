"""JSON lines with a checksum each, for files that grow line by line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What `decode_row` raises for a line that `encode_row` did not write."""


def encode_row(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON without its end, the checksum of the rest last, as "crc32"."""
    body = json.dumps(row, allow_nan=False)
    return f'{body[:-1]}, "crc32": {checksum_of(row)}}}'


def checksum_of(row: Mapping[str, Any]) -> int:
    """The CRC-32 of a row that is not empty, without "crc32"."""
    return zlib.crc32(json.dumps(row, allow_nan=False).encode())


def decode_row(line: bytes) -> dict[str, Any]:
    """The row of a line with its end, without "crc32".

    Raises:
      one of `DAMAGE`: unless the line is, byte by byte, as `encode_row` wrote it.
    """
    row = json.loads(line)
    row.pop("crc32")
    if encode_row(row) + "\n" != line.decode():
        raise ValueError("it does not match its checksum")
    return row

"""Rows of policy scores carry a checksum: a changed digit or a flipped bit is found on resume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sculpt.rows import encode_row
from sculpt.scoring.policy_file import COLUMNS, as_json, pack_rows, read_rows, unpack_rows
from tests.scoring.test_stream import run, some_policies


def write_rows(file: Path) -> list[dict[str, Any]]:
    """Three rows of scores; the numbers are float32."""
    scores = {name: as_json(0.1 * place) for place, name in enumerate(COLUMNS)}
    rows: list[dict[str, Any]] = [{"index": i, "policy": [i, 1, 0], **scores} for i in range(3)]
    rows[1]["loss"] = None
    file.write_text("".join(encode_row(row) + "\n" for row in rows))
    return rows


def test_every_flipped_bit_of_the_rows_is_found(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    rows, content = write_rows(out), out.read_bytes()
    assert list(read_rows(out)) == rows
    for bit in range(0, 8 * len(content), 9):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        out.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"scores.jsonl, line \d is damaged: delete the file"):
            list(read_rows(out))


def test_rows_that_are_lost_or_twice_there_are_found(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    write_rows(out)
    lines = out.read_text().splitlines(keepends=True)
    for there in ([0, 2], [1, 2], [0, 0, 1, 2], [0, 2, 1]):
        out.write_text("".join(lines[line] for line in there))
        with pytest.raises(ValueError, match="is damaged"):
            list(read_rows(out))


def test_flipped_bits_of_a_parquet_file_are_found_or_change_nothing(tmp_path: Path) -> None:
    lines, out, again = (tmp_path / name for name in ("scores.jsonl", "scores.parquet", "again.jsonl"))
    write_rows(lines)
    pack_rows(lines, out)
    content = out.read_bytes()
    found = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        out.write_bytes(flipped)
        try:
            unpack_rows(out, again)
        except ValueError as error:
            found += "scores.parquet is damaged" in str(error)
        else:
            # Fewer rows are no harm: the others are scored again.
            assert lines.read_bytes().startswith(again.read_bytes())
    assert found > 100


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.parquet"])
@pytest.mark.fast("scores.parquet")
def test_damaged_scores_are_not_taken_over(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    run(some_policies(5), out)
    if name.endswith("jsonl"):
        out.write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.98', out.read_text(), count=1))
    else:
        table = pyarrow.parquet.read_table(out)
        scores = pyarrow.array([0.98] * len(table), pyarrow.float32())
        pyarrow.parquet.write_table(table.set_column(2, "accuracy", scores), out)
    with pytest.raises(ValueError, match=rf"{name}.* is damaged"):
        run(some_policies(5), out)

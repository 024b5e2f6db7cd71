"""The closing table of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("network", "test accuracy", "MACs theoretical", "MACs realised", "weights", "latency measured")
"""Theoretical: zeros are not counted. Realised: counted in the program that really runs. Measured: on this device."""
ENGINE_COLUMNS = ("engine", "batch", "dense", "compact", "dense / compact")


@dataclasses.dataclass(frozen=True)
class Row:
    """One state of the network."""

    name: str
    """"dense", "masked", "reconstructed" (where fine-tuning begins with that), "fine-tuned" or "compact"."""
    accuracy: float | None
    """Share of the test images classified correctly, in [0, 1]; None of a network whose outputs are not finite."""
    macs_theoretical: int
    """Multiply-accumulates per image, products with masked weights left out."""
    macs_realised: int
    """Multiply-accumulates per image of the arrays as they stand."""
    params: int
    """Weights that are not masked."""
    latency_ms: float | None
    """Milliseconds per batch (median), None where it was not measured."""
    latency_spread_ms: tuple[float, float] | None
    """First and third quartile."""


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table as text, one tuple per row in the order of `COLUMNS`; ratios are to the first row."""
    dense = rows[0]
    return [
        (
            row.name,
            "-" if row.accuracy is None else f"{100 * row.accuracy:.2f}%",
            _with_ratio(row.macs_theoretical, dense.macs_theoretical),
            _with_ratio(row.macs_realised, dense.macs_realised),
            _with_ratio(row.params, dense.params),
            _latency(row),
        )
        for row in rows
    ]


def _with_ratio(value: int, dense: int) -> str:
    return f"{value:,} {100 * value / dense:.1f}%"


def _latency(row: Row) -> str:
    if row.latency_ms is None or row.latency_spread_ms is None:
        return "-"
    low, high = row.latency_spread_ms
    return f"{row.latency_ms:.2f} ms [{low:.2f}, {high:.2f}]"


def closing_table(rows: Sequence[Row], caption: str) -> Table:
    """The table for a terminal.

    Args:
      rows: the dense network first.
      caption: sample sizes, seed and device of the numbers.

    Raises:
      ValueError: if there is no row.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        raise ValueError("expected at least one row, the dense network, got none")
    table = Table(caption=Text(caption), box=box.SIMPLE_HEAD, caption_justify="left")
    for column in COLUMNS:
        # Narrow terminals may break a heading between its words, never inside one.
        width = max(map(len, column.split()))
        table.add_column(column, justify="left" if column == "network" else "right", min_width=width)
    for row in cells(rows):
        table.add_row(*map(Text, row))  # brackets are no markup here
    return table


def latency_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `sculpt bench latency` for a terminal: dense beside compact, and how many times as fast that is.

    Args:
      rows: of `latency.json`, the dense network's before the compact one's.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", caption=Text(engine_caption(rows)))
    for column in ENGINE_COLUMNS:
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in engine_cells(rows):
        table.add_row(*map(Text, row))
    return table


def engine_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Dense beside compact, and how many times as fast that is: a tuple per engine and batch size in the order of `ENGINE_COLUMNS`."""
    found = []
    for dense, compact in zip(rows[::2], rows[1::2]):
        ratio = dense["median_ms"] / compact["median_ms"]
        (low, high), (other_low, other_high) = dense["quartiles_ms"], compact["quartiles_ms"]
        notes = ["slower"] * (ratio < 1) + ["within the spread"] * (low <= other_high and other_low <= high)
        words = f" ({', '.join(notes)})" if notes else ""
        found.append(
            (dense["engine"], str(dense["batch"]), _timed(dense), _timed(compact), f"{ratio:.2f}{words}")
        )
    return found


def _timed(row: Mapping[str, Any]) -> str:
    median, low, high = map(_three_digits, (row["median_ms"], *row["quartiles_ms"]))
    return f"{median} ms [{low}, {high}]"


def _three_digits(value: float) -> str:
    """With three significant digits: latencies of small networks are hundredths of a millisecond."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-9))))}f}"


def engine_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """What these numbers are, and what they were measured with."""
    first = rows[0]
    engines = ", ".join(dict.fromkeys(f"{row['engine']} {row['version']}" for row in rows))
    return (
        f"Milliseconds per call: median [quartiles] of n = {first['n']} samples, dense and compact in turn. Threads: {first['threads']}, "
        f"{first['precision']}, {first['device']}; {engines}."
    )

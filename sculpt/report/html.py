"""`report.html`: one file, readable offline."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sculpt.files import written_whole
from sculpt.report.tables import COLUMNS, ENGINE_COLUMNS, Row, cells, engine_caption, engine_cells

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .7rem 0 1.4rem; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
figure { margin: 1.2rem 0; overflow-x: auto; }
.note { color: #555; }
"""
_SITES = (
    "A site is one decision, named by the layer that it is about: which of its channels stay, in it and in all layers that have to lose the "
    "same ones (.2, .3: further channels of it that go by themselves), or which pattern its kernel takes. The option is what stays: a "
    "share of the units or of the weights (2:4 is two of every four), or a window of so many rows and columns."
)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number and what it is."""

    name: str
    """What it says."""
    value: str
    """The number, with its unit."""
    kind: str
    """"theoretical", "realised" or "measured"."""
    n: str
    """What it was taken over: "400 test images", "30 calls of 128 images", "closed form"."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What the file shows."""

    title: str
    """Heading."""
    seed: int
    """Of every random draw of the run."""
    device: str
    """Where everything was measured."""
    versions: Mapping[str, str]
    """Package -> version."""
    rows: Sequence[Row]
    """The closing table, the dense network first."""
    caption: str
    """What the rows were taken over."""
    numbers: Sequence[Number]
    """Every single number of the run."""
    sites: Sequence[tuple[str, str, str]]
    """Name, family and chosen option of each site."""
    arrays: Sequence[str]
    """One line per kernel: its dense and compact shape."""
    config: Mapping[str, Mapping[str, Any]]
    """Section -> settings."""
    plots: Mapping[str, str]
    """Caption -> SVG."""
    engines: Sequence[Mapping[str, Any]] = ()
    """Rows of `latency.json`, the dense network's before the compact one's; none where engines were not asked."""


def write_html(report: Report, path: str | Path) -> None:
    """Writes the report as one self-contained file."""
    with written_whole(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The report as HTML text."""
    origin = f"seed {report.seed}, {report.device}, " + ", ".join(
        f"{k} {v}" for k, v in report.versions.items()
    )
    settings = [
        (section, name, "-" if value is None else str(value))
        for section, values in report.config.items()
        for name, value in values.items()
    ]
    engines = []
    if report.engines:
        engines = [
            "<h2>In engines</h2>",
            _table(ENGINE_COLUMNS, engine_cells(report.engines), numbers_from=1),
            f'<p class="note">{html.escape(engine_caption(report.engines))}</p>',
        ]
    numbers = [(n.name, n.value, n.kind, n.n, str(report.seed)) for n in report.numbers]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(report.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(report.title)}</h1>",
        f'<p class="note">Every number on this page: {html.escape(origin)}.</p>',
        "<h2>Before and after</h2>",
        _table(COLUMNS, cells(report.rows), numbers_from=1),
        f'<p class="note">{html.escape(report.caption)} Theoretical: products with masked weights are left out. '
        "Realised: what the arrays as they stand compute. Measured: on the device named above.</p>",
        *engines,
        *(_figure(caption, svg) for caption, svg in report.plots.items()),
        "<h2>Every number</h2>",
        _table(("quantity", "value", "kind", "n", "seed"), numbers),
        "<h2>The policy</h2>",
        _table(("site", "family", "option"), report.sites),
        f'<p class="note">{html.escape(_SITES)}</p>',
        "<h2>Kernels</h2>",
        _table(("kernel: dense shape to compact shape",), [(line,) for line in report.arrays]),
        "<h2>Configuration</h2>",
        _table(("section", "setting", "value"), settings),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    lines = []
    for row in rows:
        line = ""
        for index, cell in enumerate(row):
            number = numbers_from is not None and index >= numbers_from
            start = '<td class="number">' if number else "<td>"
            line += f"{start}{html.escape(cell)}</td>"
        lines.append(f"<tr>{line}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure(caption: str, svg: str) -> str:
    # As an image, not inline: ids of several SVGs in one page would collide.
    data = base64.b64encode(svg.encode()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import sculpt
from sculpt.report import (
    Number,
    Report,
    Row,
    closing_table,
    graph_plot,
    kept_plot,
    pareto_plot,
    render,
    reward_plot,
    write_html,
)
from sculpt.report.tables import engine_cells
from tests.conftest import untrained_digits

ROWS = [
    Row("dense", 0.95, 1000, 1000, 400, 10.0, (9.0, 11.0)),
    Row("masked", 0.5, 500, 1000, 200, 10.1, (9.1, 11.1)),
    Row("compact", 0.94, 500, 500, 200, None, None),
]


@pytest.fixture(scope="module")
def space() -> sculpt.Space:
    return sculpt.make_space(sculpt.trace(untrained_digits(), jnp.zeros((1, 8, 8, 1))))


def policy(space: sculpt.Space) -> jax.Array:
    return sculpt.random_policies(space, jax.random.key(0), 1, budget=0.5)[0]


def texts(svg: str) -> str:
    return " ".join(node.text or "" for node in ElementTree.fromstring(svg).iter())


def test_the_table_shows_theoretical_realised_and_measured() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing_table(ROWS, "n = 400 test images, seed 0, cpu"))
    text = console.export_text()
    assert re.search(r"theoretical.*realised.*measured", text)
    assert re.search(r"masked +50.00% +500 50.0% +1,000 100.0% +200 50.0% +10.10 ms \[9.10, 11.10\]", text)
    assert "n = 400 test images" in text
    with pytest.raises(ValueError, match="at least one row"):
        closing_table([], "")


def test_reward_and_pareto_plots_are_svg_and_repeatable() -> None:
    history = [{"evaluations": 32.0 * i, "best": 0.1 * i, "mean_reward": 0.05 * i} for i in (1, 2, 3)]
    front = [(0.3, 0.7), (0.5, 0.9)]
    for make in (lambda: reward_plot(history), lambda: pareto_plot(front, front[1], 0.5, 256)):
        assert make() == make()
        assert ElementTree.fromstring(make()).tag.endswith("svg")
    with pytest.raises(ValueError, match="at least one row"):
        reward_plot([])


def test_single_sites_have_no_mean_reward() -> None:
    rows = [
        {"evaluations": 32.0 * i, "best": 0.1 * i, "mean_reward": 0.05 * i, "single_sites": 0.0}
        for i in (1, 2, 3)
    ]
    high, low = ({**rows[0], "mean_reward": mean, "single_sites": 32.0} for mean in (0.9, 0.2))
    assert reward_plot([high, *rows[1:]]) == reward_plot([low, *rows[1:]]) != reward_plot(rows)


@pytest.mark.slow
def test_layer_and_graph_plots(space: sculpt.Space) -> None:
    for make in (kept_plot, graph_plot):
        dense, cut = make(space, np.zeros(space.num_sites, np.int32)), make(space, policy(space))
        assert ElementTree.fromstring(cut).tag.endswith("svg")
        assert dense != cut


def report(**changes: object) -> Report:
    fields = {
        "title": "resnet8 <digits>",
        "seed": 7,
        "device": "cpu (two cores)",
        "versions": {"jax": "1.2.3"},
        "rows": ROWS,
        "caption": "Accuracy: n = 400 test images.",
        "numbers": [Number("latency of the compact network", "3.1 ms", "measured", "30 calls of 128 images")],
        "sites": [("stem_conv", "rect", "2x2")],
        "arrays": ["stem/kernel [3, 3, 1, 16] -> [2, 2, 1, 9]"],
        "config": {"search": {"budget": 0.5, "weights": None}},
        "plots": {"Search": "<svg xmlns='http://www.w3.org/2000/svg'/>"},
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


class Links(HTMLParser):
    """Everything that a browser would fetch, and whether tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    write_html(report(), tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert links.fetched
    assert all(link.startswith("data:") for link in links.fetched)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_correctness_07_the_page_says_n_seed_device_versions_and_kind() -> None:
    text = render(report())
    for part in (
        "n = 400",
        "seed 7",
        "cpu (two cores)",
        "jax 1.2.3",
        "measured",
        "30 calls of 128 images",
        "budget",
        "2x2",
    ):
        assert part in text
    assert "resnet8 &lt;digits&gt;" in text
    assert "<digits>" not in text


def test_latencies_in_engines_are_read_with_their_spread() -> None:
    def row(median: float, low: float, high: float) -> dict[str, Any]:
        return {"engine": "xla", "batch": 8, "median_ms": median, "quartiles_ms": [low, high]}

    rows = [row(0.02237, 0.0221, 0.0229), row(0.01127, 0.011, 0.0115)]
    rows += [row(0.36, 0.34, 1.36), row(0.4, 0.39, 0.44)]
    rows += [row(513.7, 511.0, 519.0), row(600.0, 590.0, 610.0)]
    rows += [row(1.5, 1.4, 1.6), row(1.45, 1.3, 1.5)]
    clear, noisy, slower, close = engine_cells(rows)
    assert clear == ("xla", "8", "0.0224 ms [0.0221, 0.0229]", "0.0113 ms [0.0110, 0.0115]", "1.98")
    assert noisy[4] == "0.90 (slower, within the spread)"
    assert slower[2:] == ("514 ms [511, 519]", "600 ms [590, 610]", "0.86 (slower)")
    assert close[4] == "1.03 (within the spread)"

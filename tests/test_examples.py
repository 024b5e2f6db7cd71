"""The examples and the pages of docs/ run as they are written."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import runpy
from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.name for p in (REPOSITORY / "examples").glob("*.py"))
PAGES = sorted(p.name for p in (REPOSITORY / "docs").glob("*.md"))
LIBRARIES = {"equinox", "haiku", "keras"}


def blocks(name: str) -> list[str]:
    """The Python code of a page of docs/."""
    return re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "docs" / name).read_text(), re.MULTILINE | re.DOTALL
    )


BLOCKS = [(name, place) for name in PAGES for place in range(len(blocks(name)))]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.slow
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REPOSITORY / "examples" / name))
    before, after = re.findall(r"([\d,]+) -> ([\d,]+) MACs", capsys.readouterr().out)[-1]
    assert int(after.replace(",", "")) <= 0.5 * int(before.replace(",", ""))


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / "docs" / name).read_text()):
        assert (REPOSITORY / "docs" / link).exists(), link


@pytest.mark.parametrize(("name", "place"), BLOCKS)
@pytest.mark.fast(
    "coupled-axes.md-0", "coupled-axes.md-1", "devices.md-1", "libraries.md-1", "libraries.md-2"
)
def test_page(name: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it leaves its files
    code = blocks(name)[place]
    others = LIBRARIES & set(re.findall(r"^import (\w+)", code, re.MULTILINE))
    missing = [library for library in others if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"not installed: {missing[0]}")
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # it sets that itself, and here it is undone
    with contextlib.ExitStack() as stack:
        if others:  # they are not as strict
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        exec(compile(code, name, "exec"), {"jax": jax})

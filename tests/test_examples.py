"""The examples and the pages of docs/ run as they are written."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.name for p in (REPOSITORY / "examples").glob("*.py"))
PAGES = sorted(p.name for p in (REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REPOSITORY / "examples" / name))
    before, after = re.findall(r"([\d,]+) -> ([\d,]+) MACs", capsys.readouterr().out)[-1]
    assert int(after.replace(",", "")) <= 0.5 * int(before.replace(",", ""))


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where it leaves its files
    text = (REPOSITORY / "docs" / name).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (REPOSITORY / "docs" / link).exists(), link
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, name, "exec"), {"jax": jax})

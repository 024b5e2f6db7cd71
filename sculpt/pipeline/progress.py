"""Progress of a run: listeners and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Watcher:
    """Told how a run gets on. This one says nothing."""

    def start(self, stage: str) -> None:
        """A stage begins."""

    def note(self, text: str) -> None:
        """A sentence about what is not as asked for."""

    def progress(self, done: int, total: int, unit: str, note: str) -> None:
        """The stage did `done` of `total` steps, which are called `unit`; `note` is its latest figure."""

    def finish(self, stage: str, seconds: float | None, note: str = "") -> None:
        """The stage is complete; `seconds` is None where it was so already, `note` is what came out."""


_EVERY = 60.0
"""Seconds between two lines of progress where no bar can be shown."""


class Bars(Watcher):
    """A bar with stage, rate and time left for the stage under way (no terminal: a line a minute), and a line for each one that is
    complete."""

    def __init__(self, console: Console, bars: Progress) -> None:
        self._console = console
        self._bars = bars
        self._task: Any = None
        self._stage = ""
        self._told = 0.0

    def start(self, stage: str) -> None:
        self._task = self._bars.add_task(stage, total=None, unit="", note="")
        self._stage, self._told = stage, time.monotonic()

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def progress(self, done: int, total: int, unit: str, note: str) -> None:
        self._bars.update(self._task, completed=done, total=total, unit=unit, note=note)
        if not self._console.is_terminal and time.monotonic() >= self._told + _EVERY:
            self._told = time.monotonic()
            self._console.print(
                f"{self._stage:<9} {done} of {total} {unit}  {note}".rstrip(), highlight=False
            )

    def finish(self, stage: str, seconds: float | None, note: str = "") -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        text = "done before" if seconds is None else f"{seconds:.1f} s"
        self._console.print(f"{stage:<9} {text:<11}  {note}".rstrip(), highlight=False)


@contextmanager
def watching(console: Console) -> Iterator[Bars]:
    """Bars on a terminal; on anything else lines."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps or policies per second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {task.fields['unit']}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=120,
    ) as bars:
        yield Bars(console, bars)

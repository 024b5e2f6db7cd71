"""Terminal output of the command line."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_FILES = 200


def error_line(message: str) -> str:
    """A mistake, as one line."""
    return f"sculpt: error: {' '.join(message.split())}"


def print_any_text() -> None:
    """Has characters that the terminal's encoding lacks printed as question marks, instead of failing late."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def make_console() -> Console:
    """For the terminal, or a file, whose lines are long."""
    from rich.console import Console

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console

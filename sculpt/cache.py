"""The cache folder of the user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SCULPT_CACHE_DIR`, or `~/.cache/sculpt`."""
    named = os.environ.get("SCULPT_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "sculpt"

"""Writes the metrics of a run as TensorBoard event files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sculpt.files import remove_folder

_COUNTERS = {"search": "evaluations"}
"""Stage -> what its rows are counted by, where that is not "step"."""


def write_events(rows: Iterable[Mapping[str, Any]], folder: Path) -> int:
    """Writes every number of the rows of `metrics.jsonl` as a scalar named "stage/name"; what was in the folder goes.

    Searches are drawn over policies scored, training over steps. May be called while the run goes on.

    Returns:
      The number of scalars.

    Raises:
      ValueError: if there is no row, or tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs the extra: pip install 'autosculpt[tensorboard]'") from error
    rows = list(rows)
    if not rows:
        raise ValueError("this run has no metrics yet: there is nothing to draw")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with SummaryWriter(str(temporary)) as writer:
            for row in rows:
                stage = row["stage"]
                step = int(row[_COUNTERS.get(stage, "step")])
                for name, value in row.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        writer.add_scalar(f"{stage}/{name}", value, step)
                        count += 1
        remove_folder(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count

"""What benchmarks of many minutes share: stages that are kept on disk and skipped when they are there already."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sculpt
from sculpt.files import written_whole
from sculpt.model import Model


def stage(file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Reads the stage's result, or computes and keeps it with the seconds it took."""
    if not file.exists():
        begun = time.perf_counter()
        result = compute()
        result["seconds"] = round(time.perf_counter() - begun, 1)
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(result))
    return json.loads(file.read_text())


def settle(folder: Path, settings: dict[str, Any]) -> None:
    """Notes the settings of a run directory; ends the program where it was begun with others."""
    text = json.dumps(settings, indent=1)
    file = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(text)
    if file.read_text() != text:
        raise SystemExit(f"{folder} was begun with other settings ({file}): choose another --run")


def test_accuracy(model: Model, splits: Any) -> float:
    """Accuracy on the test split, in percent."""
    test = splits.test
    return 100 * float(sculpt.evaluate(model, test.images, test.labels, normalise=splits.normalise).accuracy)


def in_words(config: sculpt.FinetuneConfig) -> str:
    """What matters of a configuration: length, batch, and what is not as by default."""
    always = ("epochs", "batch_size", "weight_decay")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    defaults = dataclasses.asdict(sculpt.FinetuneConfig())
    return ", ".join(f"{k}={v}" for k, v in values.items() if k in always or v != defaults[k])

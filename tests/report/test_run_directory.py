from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.report import RESULT_FIELDS, RunDirectory, check_result
from sculpt.report.run_directory import STAGE_FILES

DEFAULTS = {"budget": 0.5, "families": ("channels", "rect"), "weights": None}


def result() -> dict:
    return {name: 1 if fields is None else dict.fromkeys(fields, 1) for name, fields in RESULT_FIELDS.items()}


LEFT = {
    "a record": lambda run: run.complete("search", {}),
    "checkpoints": lambda run: run.checkpoints("search").mkdir(parents=True),
    "a stage behind it": lambda run: run.complete("compact", {}),
}


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_settings_are_fixed_once_the_stage_has_begun(
    tmp_path: Path, left: Callable[[RunDirectory], Any]
) -> None:
    run = RunDirectory.open(tmp_path / "deep" / "run")
    merged = run.merged("search", {"budget": 0.3}, DEFAULTS)
    assert merged == {"budget": 0.3, "families": ["channels", "rect"], "weights": None}
    assert not run.path.exists()
    run.settle("search", merged)
    assert run.merged("search", {"weights": "w"}, DEFAULTS) == merged | {"weights": "w"}
    run.settle("search", merged | {"budget": 0.7})  # as long as the stage has not begun
    run.settle("search", merged)
    left(run)
    with pytest.raises(ValueError, match=r"budget is 0.3 there, 0.9 was"):
        run.settle("search", {"budget": 0.9})
    again = RunDirectory.open(tmp_path / "deep" / "run")
    assert again.merged("search", {}, DEFAULTS) == merged
    assert again.merged("search", {"families": ("channels", "rect")}, DEFAULTS) == merged
    assert again.config == {"search": merged}


def test_a_foreign_configuration_says_which_fields_differ(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    run.settle("train", DEFAULTS)  # the first stage begins with the run
    with pytest.raises(
        ValueError, match=r"budget is 0.5 there, 0.3 was asked for; weights is None there, 'w' was"
    ):
        run.merged("train", {"budget": 0.3, "weights": "w"}, DEFAULTS)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"sections": {}}', b"\xff\xfe", None],
    ids=["empty", "cut", "list", "bare", "bytes", "edit"],
)
def test_a_damaged_configuration_is_noticed(tmp_path: Path, damage: bytes | None) -> None:
    run = RunDirectory.open(tmp_path)
    run.settle("search", DEFAULTS)
    file = tmp_path / "config.json"
    file.write_bytes(file.read_bytes().replace(b"0.5", b"0.6") if damage is None else damage)
    with pytest.raises(
        ValueError, match=r"config.json is damaged .*restore it, or choose another --run"
    ) as error:
        RunDirectory.open(tmp_path).merged("search", {}, DEFAULTS)
    assert "made again" not in str(error.value)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory.open(tmp_path / "file")
    with pytest.raises(ValueError, match="is not empty and is no run directory"):
        RunDirectory.open(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        RunDirectory.existing(tmp_path / "absent")


def test_stages(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    assert not run.done("search")
    with pytest.raises(ValueError, match="run `sculpt search`"):
        run.record("search")
    record = run.complete(
        "search", {"policy": jnp.asarray([1, 2]), "score": np.float32(0.5), "folder": tmp_path}
    )
    assert record == run.record("search") == {"policy": [1, 2], "score": 0.5, "folder": str(tmp_path)}
    (tmp_path / "stages" / "search.json").write_text('{"policy": [1,')
    with pytest.raises(ValueError, match=r"search.json is damaged"):
        run.record("search")


def test_a_stage_is_complete_with_its_record_and_its_files(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    for stage, files in STAGE_FILES.items():
        for name in files:
            with pytest.raises(ValueError, match=f"{name} is not there: `sculpt {stage}`"):
                run.file(name)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
            assert run.file(name) == tmp_path / name
        assert not run.done(stage)
        run.complete(stage, {})
        assert run.done(stage)
        (tmp_path / files[0]).unlink()
        assert run.recorded(stage) and not run.done(stage)


def test_a_record_that_lacks_something_is_a_clear_error(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    run.complete("evaluate", {"rows": [{"name": "dense"}]})
    record = run.record("evaluate")
    assert record["rows"][0]["name"] == "dense"
    for read in (lambda: record["device"], lambda: record["rows"][0]["accuracy"]):
        with pytest.raises(
            ValueError, match=r"evaluate.json is damaged \(it lacks '\w+'\); remove it to have it made"
        ):
            read()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run")
    with run.locked():
        # A lock belongs to whoever opened the file, so that a second opening is like that of another process.
        with pytest.raises(ValueError, match=f"another process is working on {run.path}: wait"), run.locked():
            pass
        # Killed before anything was settled, the folder may be begun again.
        assert RunDirectory.open(run.path) == run
    with run.locked():
        pass


def test_metrics_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    run.log("search", {"best": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "search", "be')
    run.log("search", {"best": jnp.float32(0.75)})
    run.log("finetune", {"epoch": 1})
    assert run.metrics("search") == [{"stage": "search", "best": 0.5}, {"stage": "search", "best": 0.75}]
    assert run.metrics("finetune") == [{"stage": "finetune", "epoch": 1}]
    assert run.metrics("train") == []


def test_the_result_has_exactly_the_agreed_fields(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    with pytest.raises(ValueError, match=r"no result.json yet"):
        run.result()
    run.write_result(result())
    assert run.result() == json.loads((tmp_path / "result.json").read_text()) == result()
    lacking = result()
    del lacking["pruned"]["macs_realised"]
    with pytest.raises(ValueError, match=r"pruned: missing fields \['macs_realised'\]"):
        check_result(lacking)
    with pytest.raises(ValueError, match=r"unexpected fields \['extra'\]"):
        run.write_result({**result(), "extra": 1})
    with pytest.raises(ValueError, match="splits"):
        check_result({**result(), "splits": 3})


def test_nothing_temporary_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        run.complete("search", {"score": float("nan")})
    assert not run.done("search")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []

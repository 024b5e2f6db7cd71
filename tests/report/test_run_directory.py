from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
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
    assert run.metrics() == [{"stage": "search", "best": 0.5}]
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


@pytest.mark.parametrize("line", [b"5", b"[]", b'{"stage": "search"}', b"{", b"\xff", b"[" * 10_000])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: bytes) -> None:
    run = RunDirectory.open(tmp_path)
    run.log("search", {"best": 0.5})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged: remove that line"):
        run.metrics()


def flipped(content: bytes) -> Iterator[bytes]:
    """The content with one bit flipped, at some forty places before the last byte."""
    for bit in range(3, 8 * len(content) - 8, max(1, 8 * len(content) // 41)):
        yield content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_flipped_bits_of_what_is_read_back_are_found(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    run.settle("search", DEFAULTS | {"rate": 1e-05})
    run.complete("search", {"policy": [1, 2], "score": 1e-05})
    run.log("search", {"best": 1e-05})
    for name, read in {
        "config.json": lambda: run.config,
        "stages/search.json": lambda: run.record("search"),
        "metrics.jsonl": run.metrics,
    }.items():
        content = (tmp_path / name).read_bytes()
        for damaged in (*flipped(content), content.replace(b"1e-05", b"1E-05")):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{Path(name).name}.* is damaged"):
                read()


def test_a_stage_with_a_damaged_file_is_not_complete(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    for stage, files in STAGE_FILES.items():
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(result()))
        run.complete(stage, {})
    for stage, files in STAGE_FILES.items():
        for name in files:
            content = (tmp_path / name).read_bytes()
            for damaged in (content.replace(b"1", b"2", 1), b"", content + b" "):
                (tmp_path / name).write_bytes(damaged)
                if stage in ("evaluate", "export", "report"):  # quickly made again
                    assert not run.done(stage)
                else:
                    with pytest.raises(
                        ValueError, match=f"{name} is damaged: .*remove it to have it made again"
                    ):
                        run.done(stage)
            if name == "result.json":
                (tmp_path / name).write_bytes(content.replace(b"1", b"2", 1))
                with pytest.raises(ValueError, match=r"result.json is damaged: .*run that again"):
                    run.result()
            (tmp_path / name).write_bytes(content)
            assert run.done(stage)


def test_damaged_optional_files_are_found_and_may_be_absent(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    for name in ("masks.safetensors", "agent.safetensors"):
        (tmp_path / name).write_text(name)
    run.complete("search", {})
    (tmp_path / "agent.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"agent.safetensors is damaged"):
        run.done("search")
    (tmp_path / "agent.safetensors").unlink()
    assert run.done("search")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    for name in (".config.json.4999999.tmp", f".config.json.{os.getpid()}.tmp"):
        (tmp_path / name).write_text("half")
    assert RunDirectory.open(tmp_path) == run  # killed before anything was settled
    for stage in ("train", "search"):
        (run.checkpoints(stage) / "steps").mkdir(parents=True)
    run.complete("train", {})
    (tmp_path / "stages" / ".search.json.1.tmp").write_text("half")
    (tmp_path / "checkpoints" / ".removed-0" / "steps").mkdir(parents=True)
    (tmp_path / ".tensorboard.4999999.tmp").mkdir()
    (tmp_path / ".mine.tmp").write_text("not ours")
    run.tidy()
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert there == {
        *("stages", "stages/train.json", "checkpoints", "checkpoints/search", "checkpoints/search/steps"),
        *(".lock", ".mine.tmp"),
    }
    (tmp_path / ".config.json.4999999.tmp").write_text("of another process")
    with run.locked():
        run.tidy()
    assert (tmp_path / ".config.json.4999999.tmp").exists()


def test_a_dangling_link_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"run is a link to .*moved, which does not exist: make that folder"):
        RunDirectory.open(tmp_path / "run")
    (tmp_path / "moved").mkdir()
    assert RunDirectory.open(tmp_path / "run").path == tmp_path / "run"

"""A run directory: configuration, finished stages, metrics and the result; every file complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sculpt.files import named_disk_full, remove_folder, remove_leftovers, written_whole
from sculpt.report.json_files import (
    Record,
    as_json,
    check_text,
    fingerprint,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
)
from sculpt.rows import DAMAGE, decode_row, encode_row

STAGE_FILES: dict[str, tuple[str, ...]] = {
    "train": ("dense.safetensors",),
    "search": ("masks.safetensors",),
    "finetune": ("params.safetensors",),
    "compact": ("compact.safetensors",),
    "evaluate": ("result.json",),
    "export": ("compact.stablehlo",),
    "report": ("report.html", *(f"plots/{name}.svg" for name in ("graph", "kept", "pareto", "reward"))),
}
"""The files that each stage leaves beside its record; the stage is not complete without them."""
_OPTIONAL_FILES = {
    "search": ("agent.safetensors", "layers.safetensors"),
    "report": ("plots/latency.svg",),
}
"""Further files of a stage, which may be absent."""
_QUICK = ("evaluate", "export", "report")
"""Stages whose files are made again if their content is not as it was written."""
RESULT_FIELDS: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "dataset": None,
    "seed": None,
    "device": None,
    "versions": None,
    "splits": ("train", "validation", "test"),
    "dense": ("test_accuracy", "macs", "params", "latency_ms"),
    "pruned": (
        "test_accuracy",
        "test_accuracy_before_finetune",
        "macs_theoretical",
        "macs_realised",
        "params",
        "latency_ms",
    ),
    "search": ("evaluations", "unique_evaluations", "seconds", "rerank_seconds", "policies_per_second"),
    "budget": None,
    "compact_max_abs_diff": None,
    "policy": None,
}
"""The fields of `result.json`, and of the objects in it."""
_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """One run on disk.

    `config.json` holds sections of settings, each fixed when its stage begins; `stages/NAME.json` says that a stage
    has run, what came out, and what its files hash to; `metrics.jsonl` grows by a line per step; `result.json` ends the run. A process that writes
    holds `.lock`.
    """

    path: Path
    """The folder."""

    @staticmethod
    def open(path: str | Path) -> RunDirectory:
        """The run directory at `path`, which need not exist yet; nothing is written.

        Raises:
          ValueError: if `path` is a file, or a folder with other contents.
        """
        folder = Path(path)
        if folder.is_symlink() and not folder.exists():
            raise ValueError(
                f"{folder} is a link to {folder.readlink()}, which does not exist: make that folder, or choose another --run"
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, expected a run directory")
        begun = (folder / "config.json").exists() or not folder.is_dir()
        # A kill may have left the lock, and the temporary file of the first thing written.
        if not begun and any(not file.name.startswith((_LOCK, ".config.json.")) for file in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and is no run directory; choose another --run")
        return RunDirectory(folder)

    @staticmethod
    def existing(path: str | Path) -> RunDirectory:
        """The run directory at `path`.

        Raises:
          ValueError: if there is none.
        """
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"{path} is no run directory: it has no config.json")
        return RunDirectory(Path(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing this run; the folder is made if need be. Ends with the process at the latest.

        Raises:
          ValueError: if another process has it.
        """
        import fcntl  # not on every system that reads run directories

        self.path.mkdir(parents=True, exist_ok=True)
        # The file stays: were it removed, two processes could each hold a lock on a file of that name.
        with (self.path / _LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is working on {self.path}: wait until it ends, or choose another --run"
                ) from error
            yield

    def remove_leftovers(self) -> None:
        """Removes what killed processes left: temporary files, and checkpoints of finished stages. Call it with the lock held."""
        remove_leftovers(self.path)
        for stage in STAGE_FILES:
            if self.recorded(stage):
                remove_folder(self.checkpoints(stage))

    def tidy(self) -> None:
        """Removes what killed processes left, unless another process has the lock or nothing may be written here."""
        with contextlib.suppress(ValueError, OSError), self.locked():
            self.remove_leftovers()

    @property
    def config(self) -> dict[str, Record]:
        """Section name -> settings.

        Raises:
          ValueError: if the file is damaged.
        """
        file = self.path / "config.json"
        if not file.exists():
            return {}
        remedy = "restore it, or choose another --run: a run cannot go on without its settings"
        content = read_json(file, remedy)
        sections = content.get("sections")
        if not isinstance(sections, dict) or content.get("fingerprint") != fingerprint(sections):
            raise ValueError(f"{file} is damaged (it does not match its fingerprint); {remedy}")
        check_text(file, content, remedy)
        return sections

    def merged(self, section: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Record:
        """The settings of a section: those on disk, or else `defaults`, with what is given. Writes nothing.

        Args:
          section: such as "search".
          given: settings asked for explicitly; once the stage has begun they have to agree with those on disk.
          defaults: every setting that has a default.

        Raises:
          ValueError: if a given setting differs from the one on disk, which is fixed; all that differ are named.
        """
        found = self.config.get(section)
        if found is None or not self._begun(section):
            return as_json({**defaults, **(found or {}), **given})
        differ = [
            f"{name} is {found.get(name)!r} there, {value!r} was asked for"
            for name, value in as_json(given).items()
            if found.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {'; '.join(differ)}; choose another --run"
            )
        return found

    def settle(self, section: str, settings: Mapping[str, Any]) -> None:
        """Writes the settings of a section, fixed from when its stage has begun.

        Raises:
          ValueError: if the stage has begun with other settings.
        """
        before = self.config
        sections = {**before, section: self.merged(section, settings, {})}
        if sections != before:
            write_json(
                self.path / "config.json", {"fingerprint": fingerprint(sections), "sections": sections}
            )

    def checkpoints(self, stage: str) -> Path:
        """The folder that a stage keeps checkpoints in as long as it runs."""
        return self.path / "checkpoints" / stage

    def _begun(self, stage: str) -> bool:
        """Whether a stage, or one behind it, has left anything; the first begins with the run."""
        stages = list(STAGE_FILES)
        behind = stages[stages.index(stage) :]
        return behind == stages or any(self.recorded(s) or self.checkpoints(s).is_dir() for s in behind)

    def done(self, stage: str) -> bool:
        """Whether a stage is complete: its record and all the files that it leaves are there, and their content is as it was written.

        Raises:
          ValueError: if the record is damaged, or a file that takes long to make.
        """
        if not self.recorded(stage):
            return False
        written = self._read(stage).get("files", {})
        needed = STAGE_FILES.get(stage, ())
        if any(name not in written or not (self.path / name).is_file() for name in needed):
            return False
        changed = [
            self.path / name
            for name, digest in written.items()
            if (self.path / name).is_file() and _digest(self.path / name) != digest
        ]
        if changed and stage not in _QUICK:
            raise ValueError(
                f"{changed[0]} is damaged: it is not as `sculpt {stage}` wrote it; restore it, or remove it to have it made again"
            )
        return not changed

    def recorded(self, stage: str) -> bool:
        """Whether a stage has run, even if files that it left were removed since."""
        return self._stage(stage).is_file()

    def file(self, name: str) -> Path:
        """The path of a file that a stage left.

        Raises:
          ValueError: if it is not there; the message names the stage that makes it.
        """
        path = self.path / name
        if not path.is_file():
            (stage,) = (stage for stage, files in STAGE_FILES.items() if name in files)
            raise ValueError(f"{path} is not there: `sculpt {stage}` on the same --run makes it again")
        return path

    def complete(self, stage: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the record of a stage, with what its files hash to, and returns it as it will be read back."""
        plain = as_json(record)
        names = (*STAGE_FILES.get(stage, ()), *_OPTIONAL_FILES.get(stage, ()))
        files = {name: _digest(self.path / name) for name in names if (self.path / name).is_file()}
        write_sealed(self._stage(stage), {**plain, "files": files})
        return plain

    def record(self, stage: str) -> Record:
        """What came out of a stage that has run.

        Raises:
          ValueError: if it has not, or its record is damaged; also, later, where a key is asked for that it lacks.
        """
        if not self.recorded(stage):
            raise ValueError(f"{self.path} has no finished stage {stage!r}: run `sculpt {stage}` on it first")
        record = self._read(stage)
        record.pop("files", None)
        return record

    def _read(self, stage: str) -> Record:
        return read_sealed(self._stage(stage))

    def _stage(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def log(self, stage: str, row: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        with named_disk_full(file), file.open("a+b") as out:
            # A run that was killed while it wrote leaves half a line.
            out.truncate(_whole_lines(out))
            out.write((encode_row({"stage": stage, **as_json(row)}) + "\n").encode())

    def rewind(self, stage: str, counter: str, value: float) -> None:
        """Takes out of `metrics.jsonl` the rows of a stage whose `counter` is `value` or more: they will come again."""
        file = self.path / "metrics.jsonl"
        rows = list(_rows(file))
        kept = [row for row in rows if row.get("stage") != stage or row.get(counter, value) < value]
        if len(kept) < len(rows):
            with written_whole(file) as temporary:
                temporary.write_text("".join(encode_row(row) + "\n" for row in kept))

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The rows that one stage logged, or all of them; without a last line that a kill cut short.

        Raises:
          ValueError: for a line that is not as it was written, naming it.
        """
        rows = _rows(self.path / "metrics.jsonl")
        return [row for row in rows if stage is None or row.get("stage") == stage]

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`.

        Raises:
          ValueError: if it has not exactly the fields of `RESULT_FIELDS`.
        """
        check_result(result)
        write_json(self.path / "result.json", as_json(result))

    def result(self) -> Record:
        """What `result.json` says.

        Raises:
          ValueError: if it is absent, damaged, or has other fields.
        """
        file = self.path / "result.json"
        if not file.is_file():
            raise ValueError(f"{self.path} has no result.json yet: run `sculpt evaluate` on it first")
        result = read_json(file)
        check_result(result)
        if self.recorded("evaluate") and not self.done("evaluate"):
            raise ValueError(f"{file} is damaged: it is not as `sculpt evaluate` wrote it; run that again")
        return result


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_result(result: Mapping[str, Any]) -> None:
    """Raises ValueError unless a result has exactly the fields of `RESULT_FIELDS`."""
    _check_fields("result.json", result, tuple(RESULT_FIELDS))
    for name, fields in RESULT_FIELDS.items():
        if fields is not None:
            _check_fields(f"result.json, {name}", result[name], fields)


def _check_fields(what: str, found: Any, expected: Sequence[str]) -> None:
    names = set(found) if isinstance(found, Mapping) else {type(found).__name__}
    if names != set(expected):
        missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
        raise ValueError(f"{what}: missing fields {missing}, unexpected fields {extra}")


def _whole_lines(file: Any) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        if (last := file.read(end - begin).rfind(b"\n")) >= 0:
            return begin + last + 1
        end = begin
    return 0


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            return
        try:
            yield decode_row(line)
        except DAMAGE as error:
            raise ValueError(
                f"{file}, line {number} is damaged: remove that line, or restore the file"
            ) from error

"""A run directory: configuration, finished stages, metrics and the result; every file complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sculpt.files import written_whole

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
_MADE_AGAIN = "remove it to have it made again"


class Record(dict[str, Any]):
    """An object of a JSON file. A key that it lacks is a ValueError that names the file, for the file is at fault."""

    def __init__(self, content: Mapping[str, Any], file: Path, remedy: str) -> None:
        super().__init__(content)
        self._file, self._remedy = file, remedy

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self._file} is damaged (it lacks {key!r}); {self._remedy}")


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """One run on disk.

    `config.json` holds sections of settings, each fixed when its stage begins; `stages/NAME.json` says that a stage
    has run and what came out; `metrics.jsonl` grows by a line per step; `result.json` ends the run. A process that writes
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
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, expected a run directory")
        begun = (folder / "config.json").exists() or not folder.is_dir()
        if not begun and any(file.name != _LOCK for file in folder.iterdir()):
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
            return _plain({**defaults, **(found or {}), **given})
        differ = [
            f"{name} is {found.get(name)!r} there, {value!r} was asked for"
            for name, value in _plain(given).items()
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
        """Whether a stage is complete: its record and all the files that it leaves are there, a `result.json` that can be read."""
        files = STAGE_FILES.get(stage, ())
        return self.recorded(stage) and all(_whole(self.path / name) for name in files)

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
        """Writes the record of a stage and returns it as it will be read back."""
        plain = _plain(record)
        write_json(self._stage(stage), plain)
        return plain

    def record(self, stage: str) -> Record:
        """What came out of a stage that has run.

        Raises:
          ValueError: if it has not, or its record is damaged; also, later, where a key is asked for that it lacks.
        """
        if not self.recorded(stage):
            raise ValueError(f"{self.path} has no finished stage {stage!r}: run `sculpt {stage}` on it first")
        return read_json(self._stage(stage))

    def _stage(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def log(self, stage: str, row: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        with file.open("a+b") as out:
            # A run that was killed while it wrote leaves half a line; end it, so that it harms no other.
            if out.tell() and not _ends_line(out):
                out.write(b"\n")
            out.write((json.dumps({"stage": stage, **_plain(row)}) + "\n").encode())

    def rewind(self, stage: str, counter: str, value: float) -> None:
        """Takes out of `metrics.jsonl` the rows of a stage whose `counter` is `value` or more: they will come again."""
        file = self.path / "metrics.jsonl"
        rows = list(_rows(file))
        kept = [row for row in rows if row.get("stage") != stage or row.get(counter, value) < value]
        if len(kept) < len(rows):
            with written_whole(file) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The rows that one stage logged, or all of them; lines cut short by a kill are left out."""
        rows = _rows(self.path / "metrics.jsonl")
        return [row for row in rows if stage is None or row.get("stage") == stage]

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`.

        Raises:
          ValueError: if it has not exactly the fields of `RESULT_FIELDS`.
        """
        check_result(result)
        write_json(self.path / "result.json", _plain(result))

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
        return result


def _whole(path: Path) -> bool:
    """Whether a file is there and, where it is JSON, can be read: a damaged one is made again like a lost one."""
    if not path.is_file() or path.suffix != ".json":
        return path.is_file()
    try:
        read_json(path)
    except ValueError:
        return False
    return True


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


def fingerprint(sections: Mapping[str, Any]) -> str:
    """SHA-256 of settings in canonical JSON."""
    return hashlib.sha256(json.dumps(_plain(sections), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object; the file is there whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = _MADE_AGAIN) -> Record:
    """Reads a JSON object, whose objects are `Record`s all the way down.

    Args:
      path: the file.
      remedy: what to do should it be damaged.

    Raises:
      ValueError: if the file holds something else.
    """
    try:
        content = json.loads(path.read_text(), object_hook=lambda found: Record(found, path, remedy))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, Record):
        raise ValueError(f"{path} is damaged (no JSON object); {remedy}")
    return content


def _plain(value: Any) -> Any:
    """Arrays, numpy scalars, tuples and paths as what JSON has for them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(v) for v in value]


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue

"""Kill and corruption trials of run directories: one JSON record for each, appended, so that a stopped series goes on.

    python -m tests.trials kill --records FILE --each 10
    python -m tests.trials corrupt --records FILE --each 20

A kill trial begins a run with one of its stages, sends SIGKILL or SIGINT to it at a random moment of that stage, runs it
to its end and compares the directory with that of a run which nobody stopped. A corruption trial flips one random bit of
one file of a finished run and runs it again: it must end with one line that names the file, or with the directory as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sculpt.pipeline import STAGES
from sculpt.report.run_directory import STAGE_FILES

REPOSITORY = Path(__file__).resolve().parent.parent
OPTIONS = (
    *("--model", "resnet8", "--dataset", "digits", "--budget", "0.5", "--train-epochs", "1"),
    *(
        "--evaluations",
        "16",
        "--score-images",
        "64",
        "--calibration-images",
        "64",
        "--rerank",
        "0",
        "--epochs",
        "1",
    ),
)
_CHANGES = re.compile(r"seconds|latency|spread|per_second|crc32|^seal$|^fingerprint|^files$")
"""Fields that hold times, or checksums over them."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the trials that the records lack; 1 if any went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.trials", description="Kill and corruption trials of run directories."
    )
    parser.add_argument("kind", choices=("kill", "corrupt"))
    parser.add_argument("--records", type=Path, required=True, help="file of records, which grows")
    parser.add_argument("--each", type=int, default=10, help="trials of each kind (10)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="trials-") as folder:
        trials = Trials(Path(folder), given.records)
        for record in trials.kill(given.each) if given.kind == "kill" else trials.corrupt(given.each):
            print(json.dumps(record), flush=True)
    verdicts = Counter(record["verdict"] for record in trials.done(given.kind))
    print(dict(verdicts))
    return int(any(verdict.startswith("wrong") for verdict in verdicts))


class Trials:
    """Trials beside a reference run, made here once."""

    def __init__(self, folder: Path, records: Path) -> None:
        self._folder = folder
        self._records = records
        self._cache = folder / "warm"
        self._reference = folder / "reference" / "run"
        self._seconds: dict[str, float] = {}

    def done(self, kind: str) -> list[dict[str, Any]]:
        """Records of earlier trials of a kind."""
        if not self._records.exists():
            return []
        records = map(json.loads, self._records.read_text().splitlines())
        return [record for record in records if record["kind"] == kind]

    def kill(self, each: int) -> Iterator[dict[str, Any]]:
        """Sends signals: `each` of every stage, signal and state of the cache of compiled programs."""
        self._prepare()
        for number in range(each):
            for stage in STAGES:
                for name in ("SIGKILL", "SIGINT"):
                    for cache in ("warm", "cold"):
                        trial = {
                            "kind": "kill",
                            "stage": stage,
                            "signal": name,
                            "cache": cache,
                            "number": number,
                        }
                        if not self._known(trial):
                            yield self._add(trial | self._killed(trial))

    def corrupt(self, each: int) -> Iterator[dict[str, Any]]:
        """Flips bits: `each` of every file."""
        self._prepare()
        for number in range(each):
            for file in _files(self._reference):
                if file == ".lock":  # empty
                    continue
                trial = {"kind": "corrupt", "file": file, "number": number}
                if not self._known(trial):
                    yield self._add(trial | self._corrupted(trial))

    def _prepare(self) -> None:
        process = self._start(self._reference, "warm", OPTIONS)
        _, told = process.communicate()
        assert process.returncode == 0, told
        for stage in STAGES:
            record = json.loads((self._reference / "stages" / f"{stage}.json").read_text())
            self._seconds[stage] = record["stage_seconds"]

    def _start(self, run: Path, cache: str, options: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        folder = self._cache if cache == "warm" else self._folder / "cold"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SCULPT_CACHE_DIR": str(folder)}
        command = [sys.executable, "-m", "sculpt", "prune", *options, "--run", str(run)]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def _killed(self, trial: dict[str, Any]) -> dict[str, Any]:
        stage, cold = trial["stage"], self._folder / "cold"
        draw = random.Random(json.dumps(trial))
        run = self._folder / "kill" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        shutil.rmtree(cold, ignore_errors=True)
        shutil.copytree(self._reference, run)
        (run / ".lock").unlink()
        for later in STAGES[STAGES.index(stage) :]:
            for file in (f"stages/{later}.json", *STAGE_FILES[later]):
                (run / file).unlink(missing_ok=True)
        earlier = [row for row in self._reference_rows() if STAGES.index(row["stage"]) < STAGES.index(stage)]
        (run / "metrics.jsonl").write_text("".join(row["line"] for row in earlier))
        process = self._start(run, trial["cache"])
        while not (run / ".lock").exists() and process.poll() is None:
            time.sleep(0.002)
        # A cold start compiles, which the time of the reference run has in it too.
        delay = draw.uniform(0, self._seconds[stage])
        time.sleep(delay)
        early = process.poll() is None
        process.send_signal(getattr(signal, trial["signal"]))
        _, told = process.communicate(timeout=300)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        where = next((s for s in STAGES if not (run / "stages" / f"{s}.json").exists()), "after the last")
        again = self._start(run, trial["cache"])
        _, last = again.communicate(timeout=600)
        found = {"seconds_into": round(delay, 3), "in": where, "code": code, "resumed": again.returncode}
        wrong = []
        if (
            code not in ((137,) if trial["signal"] == "SIGKILL" else (130,))
            and early
            and where != "after the last"
        ):
            wrong.append(f"exit code {code}: {told.decode()[-300:]}")
        if again.returncode != 0:
            wrong.append(f"resumed with {again.returncode}: {last.decode()[-300:]}")
        else:
            wrong += self._differences(run)
        wrong += [f"left {path.name}" for path in run.parent.iterdir() if path != run]
        return found | {"verdict": f"wrong: {'; '.join(wrong)}" if wrong else "equal"}

    def _reference_rows(self) -> list[dict[str, Any]]:
        """Stage and text of every line of the reference's metrics."""
        lines = (self._reference / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [{"stage": json.loads(line)["stage"], "line": line} for line in lines]

    def _corrupted(self, trial: dict[str, Any]) -> dict[str, Any]:
        draw = random.Random(json.dumps(trial))
        run = self._folder / "corrupt" / "run"
        shutil.rmtree(run.parent, ignore_errors=True)
        shutil.copytree(self._reference, run)
        path = run / trial["file"]
        content = bytearray(path.read_bytes())
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        process = self._start(run, "warm")
        _, told = process.communicate(timeout=600)
        found = {"byte": place, "bit": bit, "code": process.returncode}
        message = told.decode(errors="replace").strip()
        if process.returncode == 2:
            lines = [line for line in message.splitlines() if "error" in line.lower()] or [message]
            clear = path.name in message and "Traceback" not in message
            verdict = "refused" if clear else f"wrong: unclear: {message[-300:]}"
            return found | {"verdict": verdict, "message": lines[-1].replace(str(run), "RUN")}
        wrong = self._differences(run) if process.returncode == 0 else [message[-300:]]
        return found | {"verdict": f"wrong: {'; '.join(wrong)}" if wrong else "made again or equal"}

    def _differences(self, run: Path) -> list[str]:
        """Files that are there too many or too few, or of other content than the reference's but for times."""
        mine, theirs = _files(run), _files(self._reference)
        found = [f"{name} is left" for name in mine if name not in theirs]
        found += [f"{name} is missing" for name in theirs if name not in mine]
        for name in mine:
            if name in theirs and _content(run / name) != _content(self._reference / name):
                found.append(f"{name} differs")
        return found

    def _known(self, trial: dict[str, Any]) -> bool:
        return any(trial.items() <= record.items() for record in self.done(trial["kind"]))

    def _add(self, record: dict[str, Any]) -> dict[str, Any]:
        with self._records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record


def _files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if not path.is_dir())


def _content(path: Path) -> Any:
    """The content of a file without measured times."""
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_lasting(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".html":
        # Times are among its numbers; the other files hold those that last.
        return re.sub(r"\d[\d.,]*", "0", path.read_text())
    return path.read_bytes()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(item) for name, item in value.items() if not _CHANGES.search(name)}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())

"""Policies streamed from files into files: same scores, constant programs, nothing lost or done twice after a kill."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.scoring.evaluation import score_compiled
from sculpt.scoring.journal import Journal, evaluate_file
from sculpt.scoring.policy_file import count_policies, read_policies
from sculpt.scoring.problem import make_problem
from sculpt.scoring.stream import score_stream
from tests.conftest import REPOSITORY

IMAGES = jax.random.normal(jax.random.key(0), (40, 6))
LABELS = jax.random.randint(jax.random.key(1), (40,), 0, 4)


def small_task() -> tuple[sculpt.Model, sculpt.Space]:
    """Three dense layers; the same each time."""

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]

    shapes = {"a": (6, 16), "b": (16, 16), "c": (16, 4)}
    params = {name: jax.random.normal(jax.random.key(i), s) for i, (name, s) in enumerate(shapes.items())}
    model = sculpt.from_function(apply, params)
    return model, sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 6))))


MODEL, SPACE = small_task()
PROBLEM = make_problem(MODEL, SPACE, IMAGES, LABELS)


def some_policies(n: int) -> np.ndarray:
    """Random policies, of which some come back."""
    return np.asarray(sculpt.random_policies(SPACE, jax.random.key(5), n))


def run(policies: object, out: Path, **options: object) -> sculpt.StreamReport:
    return evaluate_file(MODEL, SPACE, policies, out, IMAGES, LABELS, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_stream_gives_the_scores_and_costs_of_one_call() -> None:
    policies = some_policies(75)
    expected = sculpt.evaluate_policies(MODEL, SPACE, policies, IMAGES, LABELS)
    costs = sculpt.cost(SPACE, policies)
    blocks = list(score_stream(PROBLEM, iter(policies), chunk=16))
    assert [block.start for block in blocks] == [0, 16, 32, 48, 64]
    joined = np.concatenate([block.policies for block in blocks])
    assert np.array_equal(joined, policies)
    for name in ("accuracy", "loss"):
        found = np.concatenate([getattr(block.scores, name) for block in blocks])
        np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-6)
    realised = np.concatenate([block.cost.macs_realised for block in blocks])
    np.testing.assert_allclose(realised, costs.macs_realised, rtol=1e-6)


def test_policies_that_come_back_are_not_scored_again() -> None:
    policies = some_policies(20)
    twice = np.concatenate([policies, policies[::-1], policies[:3]])
    blocks = list(score_stream(PROBLEM, iter(twice), chunk=8))
    distinct = len({policy.tobytes() for policy in policies})
    assert sum(block.evaluated for block in blocks) == distinct
    losses = np.concatenate([block.scores.loss for block in blocks])
    assert np.array_equal(losses[:20], losses[20:40][::-1])
    assert np.array_equal(losses[:3], losses[40:])


def test_the_policies_seen_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sculpt.scoring.stream._REMEMBERED", 3)
    policies = some_policies(4)
    blocks = score_stream(PROBLEM, policies[[0, 1, 2, 0, 3, 2, 0, 1]], chunk=1)
    assert [block.evaluated for block in blocks] == [1, 1, 1, 0, 1, 0, 0, 1]


@pytest.mark.slow
def test_a_block_may_hold_more_policies_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sculpt.scoring.stream._REMEMBERED", 3)
    policies = some_policies(40)
    back_and_forth = np.concatenate([policies, policies[::-1], policies])
    blocks = list(score_stream(PROBLEM, iter(back_and_forth), chunk=16))
    expected = sculpt.evaluate_policies(MODEL, SPACE, back_and_forth, IMAGES, LABELS)
    losses = np.concatenate([block.scores.loss for block in blocks])
    np.testing.assert_allclose(losses, expected.loss, rtol=1e-6)


def test_an_endless_stream_is_read_no_further_than_a_block_ahead_and_compiles_once() -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        for seed in itertools.count():
            taken += 1
            yield np.random.default_rng(seed).integers(0, SPACE.num_options)

    stream = score_stream(PROBLEM, endless(), chunk=4)
    next(stream)
    assert taken == 8
    compiled = getattr(score_compiled, "_cache_size")()  # noqa: B009
    for _ in range(5):
        next(stream)
    assert getattr(score_compiled, "_cache_size")() == compiled  # noqa: B009


@pytest.mark.parametrize("suffix", [".jsonl", ".npz", ".npy"])
@pytest.mark.parametrize("out", ["scores.jsonl", "scores.parquet"])
@pytest.mark.fast(
    "scores.jsonl-.npz",
    "scores.jsonl-.npy",
    "scores.parquet-.jsonl",
    "scores.parquet-.npz",
    "scores.parquet-.npy",
)
def test_files_in_and_out(tmp_path: Path, suffix: str, out: str) -> None:
    import pyarrow.parquet as pq

    policies = some_policies(30)
    source = tmp_path / f"policies{suffix}"
    if suffix == ".jsonl":
        rows = [p.tolist() if i % 2 else {"policy": p.tolist(), "name": i} for i, p in enumerate(policies)]
        source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif suffix == ".npz":
        np.savez(source, policies=policies)
    else:
        np.save(source, policies)
    assert count_policies(source) == 30
    seen: list[int] = []
    report = run(source, tmp_path / out, chunk=8, on_progress=lambda r: seen.append(r.policies))
    assert seen == [8, 16, 24, 30]
    assert (report.policies, report.resumed) == (30, 0)
    if out.endswith("parquet"):
        rows = pq.read_table(tmp_path / out).to_pylist()
        assert not (tmp_path / f"{out}.partial.jsonl").exists()
    else:
        rows = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(30))
    assert np.array_equal([row["policy"] for row in rows], policies)
    expected = sculpt.evaluate_policies(MODEL, SPACE, policies, IMAGES, LABELS)
    np.testing.assert_allclose([row["loss"] for row in rows], expected.loss, rtol=1e-6)
    np.testing.assert_allclose(
        [row["macs_ratio"] for row in rows], sculpt.cost(SPACE, policies).macs_ratio, rtol=1e-6
    )
    before = (tmp_path / out).read_bytes()
    again = run(source, tmp_path / out, chunk=8)
    assert (again.resumed, again.evaluated, again.hit_rate) == (30, 0, 0.0)
    assert (tmp_path / out).read_bytes() == before


@pytest.mark.parametrize("out", ["scores.jsonl", "scores.parquet"])
def test_a_stream_cut_anywhere_ends_as_if_it_had_not_been(tmp_path: Path, out: str) -> None:
    policies = some_policies(60)
    run(iter(policies), tmp_path / "whole" / out, chunk=16)

    def interrupted() -> Iterator[np.ndarray]:
        yield from policies[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), tmp_path / out, chunk=16)
    lines = tmp_path / (out if out.endswith("jsonl") else f"{out}.partial.jsonl")
    with lines.open("a") as file:
        file.write('{"index": 32, "poli')  # what a kill in mid-write leaves
    report = run(iter(policies), tmp_path / out, chunk=16)
    assert 0 < report.resumed < 40
    assert (tmp_path / out).read_bytes() == (tmp_path / "whole" / out).read_bytes()


SCRIPT = """
import sys, itertools, time
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from tests.scoring.test_stream import run, some_policies

def slowly(policies):
    for index, policy in enumerate(policies):
        if index % 50 == 0:
            time.sleep(float(sys.argv[3]))
        yield policy

run(slowly(some_policies(1000)), __import__("pathlib").Path(sys.argv[1]), chunk=50)
"""


@pytest.mark.slow
def test_a_thousand_policies_survive_a_kill_in_the_middle(tmp_path: Path) -> None:
    out = tmp_path / "killed.jsonl"
    cache = str(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    command = [sys.executable, "-c", SCRIPT, str(out), cache, "0.2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 120
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_at = out.read_bytes().count(b"\n")
    assert 0 < killed_at < 1000
    report = run(some_policies(1000), out, chunk=50)
    assert report.resumed == killed_at
    run(some_policies(1000), tmp_path / "whole.jsonl", chunk=50)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_of_another_task_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    run(some_policies(5), out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"belongs to another task \(other data sha256\): give another file"):
        evaluate_file(MODEL, SPACE, some_policies(5), out, IMAGES + 1, LABELS)
    drawn = sculpt.importance(MODEL, SPACE.trace, "random", key=jax.random.key(0))
    otherwise = sculpt.make_space(SPACE.trace, importance=drawn)
    with pytest.raises(ValueError, match=r"belongs to another task \(other choices sha256\)"):
        evaluate_file(MODEL, otherwise, some_policies(5), out, IMAGES, LABELS)
    other = sculpt.from_function(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], MODEL.params)
    space = sculpt.make_space(sculpt.trace(other, jnp.zeros((1, 6))))
    with pytest.raises(ValueError, match=r"belongs to another task \(other program sha256\)"):
        evaluate_file(other, space, some_policies(5), out, IMAGES, LABELS)
    with pytest.raises(ValueError, match="holds 5 rows, there are only 3 policies"):
        run(some_policies(3), out)
    (tmp_path / "scores.jsonl.json").unlink()
    with pytest.raises(ValueError, match="which says what it belongs to, cannot be read"):
        run(some_policies(5), out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("out", ["scores.jsonl", "scores.parquet"])
def test_scores_of_other_policies_are_not_gone_on_with(tmp_path: Path, out: str) -> None:
    policies = some_policies(12)
    run(policies[:6], tmp_path / out)
    before = (tmp_path / out).read_bytes()
    others = policies.copy()
    others[4] = (others[4] + 1) % SPACE.num_options
    with pytest.raises(ValueError, match=r"holds scores of other policies: policy 4 .* give another --out"):
        run(others, tmp_path / out)
    assert (tmp_path / out).read_bytes() == before
    assert not (tmp_path / f"{out}.partial.jsonl").exists()
    assert run(policies, tmp_path / out).resumed == 6


def test_a_parquet_file_that_grows_loses_nothing_to_a_kill(tmp_path: Path) -> None:
    policies = some_policies(60)
    out = tmp_path / "scores.parquet"
    run(policies[:10], out, chunk=4)

    def interrupted() -> Iterator[np.ndarray]:
        yield from policies[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), out, chunk=4)
    rows = out.with_name("scores.parquet.partial.jsonl").read_bytes().count(b"\n")
    assert rows > 30
    scored = {policy.tobytes() for policy in policies[:rows]}
    report = run(policies, out, chunk=4)
    assert report.resumed == rows
    assert report.evaluated == len({policy.tobytes() for policy in policies} - scored)
    run(policies, tmp_path / "whole" / "scores.parquet", chunk=4)
    assert out.read_bytes() == (tmp_path / "whole" / "scores.parquet").read_bytes()


def test_rows_of_before_are_whole_whatever_is_left_of_the_last_kill(tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    partial, policies = tmp_path / "scores.parquet.partial.jsonl", some_policies(20)
    run(policies[:10], out)
    for killed in (partial, out):  # while unpacking, while packing
        killed.with_name(f".{killed.name}.4999999.tmp").write_text('{"index": 0, "pol')
    assert run(policies, out).resumed == 10
    assert not list(tmp_path.glob("*.tmp"))
    run(policies, tmp_path / "scores.jsonl")
    partial.write_bytes((tmp_path / "scores.jsonl").read_bytes())  # killed after packing
    before = out.read_bytes()
    assert run(policies, out).resumed == 20
    assert out.read_bytes() == before
    assert not partial.exists()


@pytest.mark.parametrize("out", ["scores.jsonl", "scores.parquet"])
def test_scores_of_a_diverged_network_are_null(tmp_path: Path, out: str) -> None:
    import pyarrow.parquet as pq

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    def evaluated(policies: Any, file: Path) -> sculpt.StreamReport:
        return evaluate_file(diverged, SPACE, policies, file, IMAGES, LABELS, chunk=4)

    weights = {name: 1e30 * weight for name, weight in MODEL.params.items()}
    diverged = dataclasses.replace(MODEL, params=weights)
    policies = some_policies(20)
    evaluated(policies[:10], tmp_path / out)

    def interrupted() -> Iterator[np.ndarray]:
        yield from policies[:19]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(interrupted(), tmp_path / out)
    assert evaluated(policies, tmp_path / out).resumed > 10
    evaluated(policies, tmp_path / "whole" / out)
    assert (tmp_path / out).read_bytes() == (tmp_path / "whole" / out).read_bytes()
    if out.endswith("parquet"):
        rows = pq.read_table(tmp_path / out).to_pylist()
    else:
        lines = (tmp_path / out).read_text().splitlines()
        rows = [json.loads(line, parse_constant=refused) for line in lines]
    assert [row["index"] for row in rows] == list(range(20))
    assert any(row["loss"] is None for row in rows)
    assert all(np.isfinite(row["macs_ratio"]) for row in rows)


def test_a_row_that_is_none_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    run(some_policies(3), out)
    lines = out.read_text().splitlines()
    out.write_text("\n".join([lines[0], '{"index": 1}', lines[2]]) + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged: delete the file to score all"):
        run(some_policies(5), out)


def test_a_file_that_was_refused_is_not_locked(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    with Journal(out, {"task": 1}):
        pass
    refused = Journal(out, {"task": 2})  # kept, as the traceback of an error keeps it
    with pytest.raises(ValueError, match="belongs to another task"):
        refused.__enter__()
    with Journal(out, {"task": 1}):
        pass


HOSTS = """
import sys
import tests.conftest
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
from tests.scoring.test_stream import Path, run, some_policies

try:
    run(some_policies(8), Path(sys.argv[3]))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_what_the_first_host_refuses_is_refused_on_all(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    run(some_policies(12)[4:], out)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, str(port), str(rank), str(out)],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert "holds scores of other policies" in outputs[0]
    assert "the first host cannot go on with" in outputs[1]


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    with (
        Journal(out, {}),
        pytest.raises(ValueError, match="another process is writing beside"),
        Journal(out, {}),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"1,2", r"policies are read from \.jsonl, \.npz, \.npy files"),
        ("p.jsonl", b"[0, 0]\nzero\n", "line 2 is not JSON"),
        ("p.jsonl", b'[0, 0]\n{"mask": 3}\n', "line 2: expected a list of integers"),
        ("p.jsonl", b"[0, 1.5]\n", "line 1: expected a list of integers"),
        ("p.jsonl", b"[0, 99999999999]\n", "line 1: expected a list of integers"),
        ("p.jsonl", b"[0, 0]\n[0, 99]\n", r"policy 1: site .* has options"),
        ("p.jsonl", b"[0]\n", r"policy 0: expected policies as integers"),
        ("p.npz", b"not a zip", "cannot read policies from .*: numpy.savez did not write it"),
        ("p.npz", b"PK\x03\x04 and no more", "cannot read policies from"),
        ("p.npy", b"", "cannot read policies from"),
        (
            "p.npy",
            b"[0, 0]\n",
            r"cannot read policies from .*: numpy.save did not write it; .* name it \.jsonl",
        ),
    ],
)
def test_bad_policies_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(file, tmp_path / "scores.jsonl")


def test_missing_and_unfit_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of policies at"):
        read_policies(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"scores are written to \.jsonl or \.parquet files"):
        run(some_policies(1), tmp_path / "scores.csv")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['weights'\], expected an array 'policies'"):
        run(tmp_path / "other.npz", tmp_path / "scores.jsonl")
    np.save(tmp_path / "float.npy", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"integers \[n, sites\] .* got float64\[3, 2\]"):
        run(tmp_path / "float.npy", tmp_path / "scores.jsonl")

"""Two processes that know each other give what one gives, and one of them writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sculpt
from tests.conftest import REPOSITORY
from tests.scoring.test_stream import IMAGES, LABELS, MODEL, SPACE, some_policies

SCRIPT = """
import json, sys
import jax
import tests.conftest
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
import sculpt
from tests.scoring.test_stream import IMAGES, LABELS, MODEL, SPACE, some_policies
from sculpt.scoring import evaluate_file

assert jax.device_count() == 4
found = {}
for shards in ((4, 1), (2, 2)):
    plan = sculpt.EvaluationPlan(policy_shards=shards[0], image_shards=shards[1], images_per_batch=8)
    scores = sculpt.evaluate_policies(MODEL, SPACE, some_policies(21), IMAGES, LABELS, plan=plan)
    found[str(shards)] = [scores.accuracy.tolist(), scores.loss.tolist()]
    out = f"{sys.argv[3]}/scores{shards[0]}.jsonl"
    report = evaluate_file(MODEL, SPACE, some_policies(21), out, IMAGES, LABELS, plan=plan, chunk=8)
    assert report.policies == 21, report
print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / "first", tmp_path / "second"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        command = [sys.executable, "-c", SCRIPT, str(port), str(rank), str(folder)]
        processes.append(
            subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second
    expected = sculpt.evaluate_policies(MODEL, SPACE, some_policies(21), IMAGES, LABELS)
    for accuracy, loss in first.values():
        np.testing.assert_array_equal(np.float32(accuracy), expected.accuracy)
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-5)
    written = [json.loads(line) for line in (folders[0] / "scores4.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["loss"] for row in written], expected.loss, rtol=1e-5)
    assert not list(folders[1].iterdir())

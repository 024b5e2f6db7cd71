"""Ctrl-C sets a flag that loops look at; a second one ends the process at once; exit code 130 in both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sculpt.interrupts import check_interrupt, deferred_interrupts, defers_interrupts
from tests.conftest import REPOSITORY


def test_the_flag_is_looked_at() -> None:
    check_interrupt()
    with deferred_interrupts():
        assert defers_interrupts()
        signal.raise_signal(signal.SIGINT)  # raises nothing
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    assert not defers_interrupts()
    check_interrupt()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # as before


def test_an_own_handler_is_left_alone() -> None:
    caught = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        with deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT]


LONG_CALL = """
import ctypes, sys
sys.modules["jax"] = None  # starts quicker
from sculpt.interrupts import deferred_interrupts
with deferred_interrupts():
    print("begun", flush=True)
    sleep = ctypes.CDLL(None).sleep  # like a compilation: no handler of Python runs meanwhile, and EINTR ends it early
    for _ in range(100):
        left = 60
        while left:
            left = sleep(left)
"""


def test_a_second_interrupt_ends_a_long_call_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_CALL], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.decode().count("press Ctrl-C again to end at once") == 1


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_a_run_that_is_interrupted_while_it_compiles(tmp_path: Path, presses: int) -> None:
    options = ["--model", "resnet8", "--dataset", "digits", "--run", str(tmp_path / "run")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SCULPT_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "sculpt", "train", *options],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "run" / "config.json").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(1.0)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in told
    assert (b"the same command resumes" in told) == (presses == 1)

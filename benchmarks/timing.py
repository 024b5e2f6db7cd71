"""What benchmarks share: timing side by side, the device's peak, and results that say where they come from."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from sculpt.environment import device_name, versions

_TOLD_BY_ENVIRONMENT = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
RESULTS = Path(__file__).resolve().parent / "results"


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run, its results waited for."""
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times in turn: the load of the machine hits all alike. Compile them before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def matmul_runs(dtype: str, device_count: int = 1) -> tuple[Callable[[], object], float]:
    """A matrix product as large as the device likes, and its floating-point operations; on all of `device_count` at once."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    mesh = jax.make_mesh((device_count,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    left = jax.device_put(jnp.ones((device_count, size, size), dtype), sharding)
    multiply = jax.jit(functools.partial(jnp.einsum, "bij,bjk->bik"))
    return lambda: multiply(left, left), 2.0 * device_count * size**3


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (lowest to highest)."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def provenance() -> list[str]:
    """Lines that say how, where and with what a table was made."""
    environment = [f"{name}={os.environ[name]}" for name in _TOLD_BY_ENVIRONMENT if name in os.environ]
    command = " ".join(
        [*environment, "python -m", _module(), *(_portable(argument) for argument in sys.argv[1:])]
    )
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    return [
        f"Command: `{command}`",
        f"Device: {len(jax.devices())} x {device_name()}; {about}; commit {commit()}",
    ]


def write_results(name: str, lines: Sequence[str]) -> None:
    """Prints a table and keeps it in `benchmarks/results/<name>.md`."""
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


def commit() -> str:
    """The commit of this repository, "-dirty" behind it where files were changed since; "unknown" where git does not tell."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _module() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


def _portable(argument: str) -> str:
    """An argument without the folders of this machine."""
    path = Path(argument)
    return f"DATA/{path.name}" if path.is_absolute() else argument

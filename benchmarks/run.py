"""Runs the benchmarks that the given data allow: `make bench`, or

    python -m benchmarks.run --data DATA

DATA holds `cifar10/` (parquet files of JPEG images) and `weights/` (safetensors). Without it only what needs no data runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def commands(data: Path | None) -> list[list[str]]:
    """Arguments of `python -m` for each benchmark."""
    names = ("trace_networks", "bench_evaluate", "bench_search", "bench_filter_groups")
    alone = [[f"benchmarks.{name}"] for name in names]
    if data is None:
        return alone
    weights = str(data / "weights" / "cifar10_resnet20.safetensors")
    return [
        *alone,
        ["benchmarks.prune_cifar_jpeg", "--weights", weights, "--data-dir", str(data / "cifar10")],
        ["benchmarks.bench_engines", "--weights", weights],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of real images and pretrained weights")
    options = parser.parse_args()
    return max(
        subprocess.run([sys.executable, "-m", *command]).returncode for command in commands(options.data)
    )


if __name__ == "__main__":
    sys.exit(main())

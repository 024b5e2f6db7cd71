"""Runs the benchmarks that the given data allow: `make bench`, or

    python -m benchmarks.run --data DATA

DATA holds `cifar10/` and `tiny_imagenet/` (parquet files of JPEG images) and `weights/` (safetensors). Without it only what needs no
data runs. All of it takes hours; what trains or searches is kept under runs/, and goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def commands(data: Path | None) -> list[list[str]]:
    """Arguments of `python -m` for each benchmark."""
    names = (
        "trace_networks",
        "bench_evaluate",
        "bench_search",
        "bench_filter_groups",
        "bench_group_overheads",
        "bench_depthwise",
        "bench_toy",
    )
    alone = [[f"benchmarks.{name}"] for name in names]
    if data is None:
        return alone
    weights = str(data / "weights" / "cifar10_resnet20.safetensors")
    on_tasks = (
        "prune_tasks",
        "bench_controls",
        "bench_permutation",
        "bench_proxy",
        "bench_reconstruct",
        "bench_resources",
        "bench_engines",
        "bench_layer_latency",
        "bench_transfer",
    )
    return [
        *alone,
        ["benchmarks.prune_cifar_jpeg", "--weights", weights, "--data-dir", str(data / "cifar10")],
        *([f"benchmarks.{name}", "--data", str(data)] for name in on_tasks),
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

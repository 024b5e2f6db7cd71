"""Groups of filters cut as an engine likes them, beside those that the rule of `compact` makes.

    taskset -c 1 python -m benchmarks.bench_group_overheads

ResNet-18 at 224 pixels with weights drawn at random, its 3x3 filters of four or of two kinds of window (`rect_grouped`), one thread. The
dense network and the two compact ones alternate; what an engine computes is compared with the model before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import jax
import numpy as np

import sculpt
from benchmarks.bench_engines import GROUPED, drawn, same_option
from benchmarks.timing import provenance, write_results
from sculpt.latency.engines import ENGINES, engine_of
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import CompactFunction
from sculpt.pruning.compaction.filter_groups import OVERHEAD
from sculpt.pruning.space import Space


def describe(model: Model) -> tuple[str, ...]:
    assert isinstance(model.apply, CompactFunction)
    return model.apply.describe()


def row(model: Model, space: Space, label: str, engine: str, batch: int, side: int, repeats: int) -> str:
    policy = same_option(space, label)
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    x = np.asarray(jax.random.normal(jax.random.key(1), (batch, side, side, 3)))
    begun = time.perf_counter()
    overheads = sculpt.measure_group_overheads(masked, space, policy, x, engine=engine, threads=1)
    measuring = time.perf_counter() - begun
    networks = {
        "dense": model,
        "rule": sculpt.compact(masked, space, policy),
        "measured": sculpt.compact(masked, space, policy, overheads=overheads),
    }
    same = describe(networks["rule"]) == describe(networks["measured"])
    found = sculpt.compare_latency(networks, x, repeats, engine=engine, threads=1)
    milliseconds = [
        f"{1e3 * latency.median:.1f} ({1e3 * latency.spread[0]:.1f} to {1e3 * latency.spread[1]:.1f})"
        for latency in found.values()
    ]
    ratios = [f"{found['dense'].median / found[name].median:.2f}" for name in ("rule", "measured")]
    chosen = Counter(overheads.values())
    cuts = ", ".join(
        f"{count} {words}"
        for overhead, count in chosen.most_common()
        for words in [{OVERHEAD: "as the rule's", None: "in one piece"}.get(overhead, f"of {overhead}")]
    )
    package = engine_of(engine).package
    cells = [
        f"{engine} {found['dense'].versions[package]}",
        GROUPED[label],
        str(batch),
        *milliseconds,
        *ratios,
        cuts + (": the same network" if same else ""),
        f"{measuring:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=sorted(ENGINES),
        default=["onnxruntime", "openvino", "xla"],
        help="those not installed are left out",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=15, help="samples of each network")
    parser.add_argument("--note", default="", help="a line about the machine, such as what else ran on it")
    options = parser.parse_args()
    model, image = drawn("resnet18")
    space = sculpt.make_space(sculpt.trace(model, image), ("rect_grouped",))
    lines = [
        "# Groups of filters as an engine likes them: ResNet-18, 224x224",
        "",
        *provenance(),
        *([options.note] if options.note else []),
        f"Milliseconds per call, one thread, float32: median of {options.repeats} samples (first to third quartile), the networks in turn. "
        "The ratios are dense / compact. The cuts: how many kernels are cut as the rule does (an overhead of "
        "16 filters), or as others would; where all are, the two columns are one network timed twice, and their difference is noise. The last column: seconds that `measure_group_overheads` took.",
        "",
        "| engine | filters keep | batch | dense | rule | measured | rule, times as fast | measured, times as fast | cuts | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    absent = []
    for engine in options.engines:
        try:
            engine_of(engine)
        except ValueError as error:
            absent.append(f"Not measured: {engine}: {error}.")
            continue
        for batch in options.batches:
            for label in GROUPED:
                lines.append(row(model, space, label, engine, batch, image.shape[1], options.repeats))
                print(lines[-1], flush=True)
                jax.clear_caches()
        write_results("bench_group_overheads", lines)
    if absent:
        write_results("bench_group_overheads", [*lines, "", *absent])


if __name__ == "__main__":
    main()

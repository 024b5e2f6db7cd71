"""The agent against its controls: the same evaluator, the same number of evaluations, several seeds.

    python -m benchmarks.bench_controls --data DATA --tasks digits-resnet8 --budgets 0.3 0.5 --seeds 0 1 2 3 4

Tasks are those of `tasks`, their dense network trained (or fine-tuned) once, with seed 0. Every method searches channels and
windows with the same images to score on, and ends with the same re-rank; what it chooses is fine-tuned alike and tested. A search is
kept under --run and skipped when it is there already, so that a killed benchmark goes on where it was; the table holds whatever is
complete, and every search of it is a line of the file of records beside it. `--known benchmarks/results/bench_controls.jsonl` takes the
searches of such a file for done, and adds to them. `--finetunes 4` fine-tunes what was found with so many keys; tests are then means over
them. Networks without BatchNorm are reconstructed wherever the others are recalibrated, and before they are fine-tuned.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks import records
from benchmarks.stages import in_words, stage, test_accuracy
from benchmarks.tasks import TASKS, BenchmarkTask, begin, compacted, parser_of, to_reconstruct, tuned
from benchmarks.timing import RESULTS, provenance, write_results
from sculpt.agents.cma_es import load_evosax
from sculpt.agents.config import RULES, Method
from sculpt.data.splits import Splits
from sculpt.model import Model
from sculpt.pruning.space import Space

METHODS = {name: {"method": name} for name in get_args(Method)} | {
    f"{name}, warm": {"method": name, "warm_start": True} for name in ("agent", "random", "evolution")
}
"""Row of the table -> fields of `SearchConfig`. Warm: begins from retained energy, as CMA-ES does; the agent and the table begin from
single sites, "agent, warm" from both."""
RERANK = 4
"""So many of the best policies are fine-tuned briefly before one is chosen."""
LOOKS = (128, 256, 512, 1024, 2048)
"""Evaluations after which the best so far is told."""


def searched(
    model: Model,
    space: Space,
    splits: Splits,
    task: BenchmarkTask,
    config: sculpt.SearchConfig,
    seed: int,
    folder: Path,
    made: dict[str, Any],
) -> dict[str, Any]:
    """One search, and the test accuracy of what it found after fine-tuning; `made` says where."""
    found = sculpt.search(model, space, splits, config, jax.random.key(seed))
    after = tested(model, space, splits, task, found.policy, 0, folder / f"seed{seed}")
    return {
        "score": found.front[0].score,
        "chosen": found.score,
        "validation": found.validation_accuracy,
        "tests": [after["test_accuracy"]],
        "search_seconds": found.seconds,
        "rerank_seconds": found.rerank_seconds,
        "unique": found.unique_evaluations,
        "evaluations": config.evaluations,
        "best": improvements(found.history),
        "policy": found.policy.tolist(),
        "made": made,
    }


def improvements(history: Sequence[Mapping[str, float]]) -> list[tuple[int, float]]:
    """Evaluations and score of each policy within the budget that is better than all before; of one update the last is known."""
    found: list[tuple[int, float]] = []
    for row in history:
        if "best" in row and (not found or row["best"] > found[-1][1]):
            found.append((int(row["evaluations"]), row["best"]))
    return found


def tested(
    model: Model, space: Space, splits: Splits, task: BenchmarkTask, policy: Any, key: int, place: Path
) -> dict[str, Any]:
    """Fine-tunes what a policy leaves, with a key of that number, and tests it."""
    small = compacted(model, space, policy, to_reconstruct(model, splits))
    place.parent.mkdir(parents=True, exist_ok=True)
    after = tuned(small, splits, task.finetune, key, place, teacher=model)
    # Programs of compact networks are all different: a process may hold only so many.
    jax.clear_caches()
    return after


def best_after(result: dict[str, Any], evaluations: int) -> float | None:
    """The best score within the budget among the first so many evaluations; None where there is none."""
    return max((best for count, best in result["best"] if count <= evaluations), default=None)


def evaluations_to(result: dict[str, Any], score: float) -> float:
    """Evaluations until a score is reached; infinite where it never is."""
    return min((count for count, best in result["best"] if best >= score), default=np.inf)


def in_quartiles(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(found: list[dict[str, Any]], evaluations: int) -> list[str]:
    """Rows of one task and budget: the methods of which there are results."""
    looks = [look for look in LOOKS if look < evaluations]
    by_method = {
        method: [result for result in found if result["method"] == method]
        for method in dict.fromkeys(result["method"] for result in found)
    }
    goal = np.median([result["score"] for result in by_method["random"]]) if "random" in by_method else np.inf
    lines = [
        f"| method | seeds | {' | '.join(f'best after {look}' for look in looks)} | best after {evaluations} | validation | "
        "test, fine-tuned | distinct | evaluations to random's end | seconds |",
        f"| --- | --- |{' --- |' * len(looks)} --- | --- | --- | --- | --- | --- |",
    ]
    for method, results in by_method.items():
        early = []
        for look in looks:
            values = [best_after(result, look) for result in results]
            early.append("-" if None in values else f"{np.median(np.asarray(values, float)):.3f}")
        reached = np.median([evaluations_to(result, float(goal)) for result in results])
        ending = "not reached" if np.isinf(reached) else f"{reached:.0f}"
        if method == "random" or "random" not in by_method:
            ending = "-"
        lines.append(
            f"| {method} | {len(results)} | {' | '.join(early)} | {in_quartiles([r['score'] for r in results], 3)} | "
            f"{in_quartiles([r['validation'] for r in results], 3)} | {in_quartiles([np.mean(r['tests']) for r in results], 2)} | "
            f"{np.median([r['unique'] for r in results]):.0f} | {ending} | "
            f"{' / '.join(f'{np.median([r[part] for r in results]):.0f}' for part in ('search_seconds', 'rerank_seconds'))} |"
        )
    return lines


def report(options: argparse.Namespace) -> None:
    """Prints the tables as Markdown and keeps them in benchmarks/results/, with the records that they are made of."""
    lines = [
        "# The agent and its controls",
        "",
        *provenance(),
        f"{options.evaluations} evaluations of every method, accuracy on 256 train images after BatchNorm recalibration on 128 (networks without "
        "BatchNorm: after reconstruction on 128, and again on 512 before fine-tuning), "
        f"families channels and rect. The best {RERANK} distinct policies are fine-tuned briefly; the one with the highest accuracy on "
        "validation then (column validation) is fine-tuned with the dense network as its teacher and tested. Median [quartiles] over the seeds "
        "of the search; the fine-tuning has the same keys throughout (where there are several, tests are means over them). "
        "Seconds: the search, compilation included / the re-rank, of one process on a shared machine. Every search is a line of "
        "`bench_controls.jsonl` beside this file.",
    ]
    everything = []
    for name in TASKS:
        found = list(records.gathered(options.run, name, METHODS))
        everything += found
        for budget in sorted({result["budget"] for result in found}):
            rows = [result for result in found if result["budget"] == budget]
            keys = " or ".join(str(count) for count in sorted({len(result["tests"]) for result in rows}))
            lines += ["", f"## {name}, budget {budget}", "", *table(rows, options.evaluations), ""]
            lines += [f"Fine-tuning: {in_words(TASKS[name].finetune)}; keys: {keys}."]
            lines += [f"Made: {records.origins(rows)}."]
    records.keep(RESULTS / "bench_controls.jsonl", everything)
    write_results("bench_controls", lines)


def main() -> None:
    parser = parser_of(__doc__, "bench_controls", ["digits-resnet8"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--finetunes", type=int, default=1, metavar="KEYS")
    parser.add_argument("--evaluations", type=int, default=512)
    parser.add_argument(
        "--known", type=Path, nargs="*", default=[], metavar="FILE", help="records of searches that were done"
    )
    options = parser.parse_args()
    for file in options.known:
        records.unpack(file, options.run, options.evaluations)
    if "cma_es" in options.methods:
        load_evosax()  # now rather than after hours
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    for name in options.tasks:
        folder = options.run / name
        task, splits, dense = begin(name, folder, options.data, evaluations=options.evaluations)
        made = records.made_on(dense, test_accuracy(dense, splits))
        space = sculpt.make_space(sculpt.trace(dense, jnp.zeros((1, *splits.train.images.shape[1:]))))
        for budget in options.budgets:
            for method in options.methods:
                fields = METHODS[method]
                config = sculpt.SearchConfig(
                    budget=budget,
                    evaluations=options.evaluations,
                    rerank=RERANK,
                    rerank_finetune=task.brief,
                    **fields,
                )
                place = records.place(options.run, name, budget, method)
                # A rule has no chance in it.
                for seed in options.seeds[:1] if fields["method"] in RULES else options.seeds:
                    compute = functools.partial(
                        searched, dense, space, splits, task, config, seed, place, made
                    )
                    result = stage(place / f"seed{seed}.json", compute)
                    policy = np.asarray(result["policy"], np.int32)
                    for again in range(len(result["tests"]), options.finetunes):
                        key = f"finetune{again}-seed{seed}"
                        repeat = functools.partial(
                            tested, dense, space, splits, task, policy, again, place / key
                        )
                        stage(place / f"{key}.json", repeat)
                report(options)


if __name__ == "__main__":
    main()

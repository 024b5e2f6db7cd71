"""The agent against its controls: the same evaluator, the same number of evaluations, several seeds.

    python -m benchmarks.bench_controls --data DATA --tasks digits-resnet8 --budgets 0.3 0.5 --seeds 0 1 2 3 4

Tasks are those of `tasks`, their dense network trained (or fine-tuned) once, with seed 0. Every method searches channels and
windows with the same images to score on, and ends with the same re-rank; what it chooses is fine-tuned alike and tested. A search is
kept under --run and skipped when it is there already, so that a killed benchmark goes on where it was; the table holds whatever is
complete. `--finetunes 4` fine-tunes what was found with so many keys; tests are then means over them. Networks without BatchNorm are reconstructed wherever the others are recalibrated, and before they are fine-tuned.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import in_words, stage
from benchmarks.tasks import TASKS, Task, begin, compacted, parser_of, to_reconstruct, tuned
from benchmarks.timing import provenance, write_results
from sculpt.agents import Method
from sculpt.agents.cma_es import load_evosax
from sculpt.agents.config import RULES
from sculpt.model import Model
from sculpt.pruning import Space
from sculpt.training import Splits

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
    task: Task,
    config: sculpt.SearchConfig,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """One search, and the test accuracy of what it found after fine-tuning."""
    found = sculpt.search(model, space, splits, config, jax.random.key(seed))
    after = tested(model, space, splits, task, found.policy, 0, folder / f"seed{seed}")
    return {
        "score": found.front[0].score,
        "chosen": found.score,
        "validation": found.validation_accuracy,
        "test": after["test_accuracy"],
        "search_seconds": found.seconds,
        "rerank_seconds": found.rerank_seconds,
        "unique": found.unique_evaluations,
        "best": [[row["evaluations"], row.get("best")] for row in found.history],
        "policy": found.policy.tolist(),
    }


def tested(
    model: Model, space: Space, splits: Splits, task: Task, policy: Any, key: int, place: Path
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
    values = [best for count, best in result["best"] if count <= evaluations and best is not None]
    return max(values, default=None)


def evaluations_to(result: dict[str, Any], score: float) -> float:
    """Evaluations until a score is reached; infinite where it never is."""
    return min(
        (count for count, best in result["best"] if best is not None and best >= score), default=np.inf
    )


def in_quartiles(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(found: dict[str, list[dict[str, Any]]], evaluations: int) -> list[str]:
    """Rows of one task and budget: the methods of which there are results."""
    looks = [look for look in LOOKS if look < evaluations]
    goal = np.median([result["score"] for result in found["random"]]) if "random" in found else np.inf
    lines = [
        f"| method | seeds | {' | '.join(f'best after {look}' for look in looks)} | best after {evaluations} | validation | "
        "test, fine-tuned | distinct | evaluations to random's end | seconds |",
        f"| --- | --- |{' --- |' * len(looks)} --- | --- | --- | --- | --- | --- |",
    ]
    for method, results in found.items():
        early = []
        for look in looks:
            values = [best_after(result, look) for result in results]
            early.append("-" if None in values else f"{np.median(np.asarray(values, float)):.3f}")
        reached = np.median([evaluations_to(result, float(goal)) for result in results])
        lines.append(
            f"| {method} | {len(results)} | {' | '.join(early)} | {in_quartiles([r['score'] for r in results], 3)} | "
            f"{in_quartiles([r['validation'] for r in results], 3)} | {in_quartiles([r['test'] for r in results], 2)} | "
            f"{np.median([r['unique'] for r in results]):.0f} | {f'{reached:.0f}' if np.isfinite(reached) else 'not reached'} | "
            f"{' / '.join(f'{np.median([r[part] for r in results]):.0f}' for part in ('search_seconds', 'rerank_seconds'))} |"
        )
    return lines


def results_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Method -> results of the seeds that are complete."""
    found = {}
    for method in METHODS:
        place = folder / method.replace(", ", "-")
        rows = []
        for file in sorted(place.glob("seed*.json")):
            row = json.loads(file.read_text())
            again = [json.loads(other.read_text()) for other in place.glob(f"finetune*-{file.name}")]
            rows.append({**row, "test": np.mean([row["test"], *(other["test_accuracy"] for other in again)])})
        if rows:
            found[method] = rows
    return found


def report(options: argparse.Namespace) -> None:
    """Prints the tables as Markdown and keeps them in benchmarks/results/."""
    lines = [
        "# The agent and its controls",
        "",
        *provenance(),
        f"{options.evaluations} evaluations of every method, accuracy on 256 train images after BatchNorm recalibration on 128 (networks without "
        "BatchNorm: after reconstruction on 128, and again on 512 before fine-tuning), "
        f"families channels and rect. The best {RERANK} distinct policies are fine-tuned briefly; the one with the highest accuracy on "
        "validation then (column validation) is fine-tuned with the dense network as its teacher and tested. Median "
        "[quartiles] over the seeds of the search; the fine-tuning has the same "
        f"{'key' if options.finetunes == 1 else f'{options.finetunes} keys, tests being means over them,'} throughout. Seconds: the search, compilation included / "
        "the re-rank, of one process on a shared machine.",
    ]
    for name in TASKS:
        for place in sorted((options.run / name).glob("budget*")):
            if found := results_of(place):
                budget = place.name.removeprefix("budget")
                lines += ["", f"## {name}, budget {budget}", "", *table(found, options.evaluations)]
                lines += ["", f"Fine-tuning: {in_words(TASKS[name].finetune)}."]
    write_results("bench_controls", lines)


def main() -> None:
    parser = parser_of(__doc__, "bench_controls", ["digits-resnet8"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--finetunes", type=int, default=1, metavar="KEYS")
    parser.add_argument("--evaluations", type=int, default=512)
    options = parser.parse_args()
    if "cma_es" in options.methods:
        load_evosax()  # now rather than after hours
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    for name in options.tasks:
        folder = options.run / name
        task, splits, dense = begin(name, folder, options.data, evaluations=options.evaluations)
        space = sculpt.make_space(sculpt.trace(dense, jnp.zeros((1, *splits.train.images.shape[1:]))))
        for budget in options.budgets:
            for method in options.methods:
                fields = METHODS[method]
                # A rule has no chance in it.
                for seed in options.seeds[:1] if fields["method"] in RULES else options.seeds:
                    config = sculpt.SearchConfig(
                        budget=budget,
                        evaluations=options.evaluations,
                        rerank=RERANK,
                        rerank_finetune=task.brief,
                        **fields,
                    )
                    place = folder / f"budget{budget}" / method.replace(", ", "-")
                    compute = functools.partial(searched, dense, space, splits, task, config, seed, place)
                    stage(place / f"seed{seed}.json", compute)
                    policy = json.loads((place / f"seed{seed}.json").read_text())["policy"]
                    for again in range(1, options.finetunes):
                        repeated = f"finetune{again}-seed{seed}"
                        repeat = functools.partial(
                            tested,
                            dense,
                            space,
                            splits,
                            task,
                            np.asarray(policy, np.int32),
                            again,
                            place / repeated,
                        )
                        stage(place / f"{repeated}.json", repeat)
                report(options)


if __name__ == "__main__":
    main()

"""What an agent that was taught on small networks is worth on a larger one that it has not seen, at few evaluations.

    python -m benchmarks.bench_transfer --data DATA --lessons digits-resnet8 --tasks cifar10-jpeg-resnet20

The lessons are networks of other tasks, searched by one agent (`sculpt.agents.pretrain`); the agent is kept under --run. On every task
searches begin with it, without it, or are of another method; same evaluator, same number of evaluations, same seeds, no re-rank and no
fine-tuning. A search is kept under --run and skipped when it is there already.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp

import sculpt
from benchmarks.bench_controls import best_after, improvements, in_quartiles
from benchmarks.stages import stage
from benchmarks.tasks import TASKS, begin, parser_of
from benchmarks.timing import provenance, write_results
from sculpt.agents.pretraining import Lesson, pretrain
from sculpt.data.splits import Splits
from sculpt.model import Model, Params
from sculpt.pruning.space import Space

LESSON_BUDGETS = (0.3, 0.5, 0.7)
METHODS: dict[str, dict[str, Any]] = {
    "agent, taught": {"method": "agent"},
    "agent": {"method": "agent"},
    "random": {"method": "random"},
    "random, warm": {"method": "random", "warm_start": True},
    "evolution": {"method": "evolution"},
    "evolution, warm": {"method": "evolution", "warm_start": True},
}
"""Row of the table -> fields of `SearchConfig`. Warm: begins from retained energy, as the taught agent does, and the other one unless it
has evaluations enough to score single sites first."""


def dense_of(name: str, options: argparse.Namespace) -> tuple[Model, Space, Splits]:
    _, splits, model = begin(name, options.run / name, options.data)
    return (
        model,
        sculpt.make_space(sculpt.trace(model, jnp.zeros((1, *splits.train.images.shape[1:])))),
        splits,
    )


def taught(options: argparse.Namespace) -> Params:
    """The agent that learned on the lessons; kept, for that takes longer than to use it."""
    file = options.run / f"agent-{'-'.join(options.lessons)}-{options.lesson_evaluations}.safetensors"
    if not file.exists():
        budget, *front = LESSON_BUDGETS
        config = sculpt.SearchConfig(
            budget=budget, front=tuple(front), evaluations=options.lesson_evaluations, rerank=0
        )

        def tell(lesson: int, row: dict[str, Any]) -> None:
            print(options.lessons[lesson], row["update"], row.get("mean_reward"), flush=True)

        lessons = [Lesson(*dense_of(name, options)) for name in options.lessons]
        sculpt.save_params(pretrain(lessons, config, jax.random.key(0), on_metrics=tell), file)
    return sculpt.load_params(file)


def searched(
    model: Model,
    space: Space,
    splits: Splits,
    config: sculpt.SearchConfig,
    seed: int,
    agent: Params | None,
) -> dict[str, Any]:
    found = sculpt.search(model, space, splits, config, jax.random.key(seed), agent=agent)
    return {
        "score": found.score,
        "first": next(row["mean_reward"] for row in found.history if not row["single_sites"]),
        "best": improvements(found.history),
        "search_seconds": found.seconds,
    }


def row_of(method: str, results: list[dict[str, Any]], looks: list[int]) -> str:
    bests = []
    for look in looks:
        values = [best_after(result, look) for result in results]
        found = [value for value in values if value is not None]
        bests.append(in_quartiles(found, 3) if len(found) == len(values) else "-")
    first = in_quartiles([result["first"] for result in results], 3)
    return f"| {method} | {len(results)} | {first} | {' | '.join(bests)} |"


def main() -> None:
    parser = parser_of(__doc__, "bench_transfer", ["cifar10-jpeg-resnet20"])
    parser.add_argument("--lessons", nargs="+", default=["digits-resnet8"], choices=list(TASKS))
    parser.add_argument("--lesson-evaluations", type=int, default=1536, help="of each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=128)
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.run / "cache"))
    agent = taught(options)
    looks = [look for look in (32, 64, 128, 256, 512) if look <= options.evaluations]
    lines = [
        "# What an agent taught on other networks is worth",
        "",
        *provenance(),
        f"Lessons: {', '.join(options.lessons)}, {options.lesson_evaluations} evaluations of each, budgets {', '.join(map(str, LESSON_BUDGETS))}. "
        "Accuracy on 256 train images after BatchNorm recalibration on 128, families channels and rect; nothing is fine-tuned. The mean of "
        "the first 32 policies (within the budget) is what was known before; then the best after so many evaluations. Median [quartiles] "
        "over the seeds.",
    ]
    for name in options.tasks:
        model, space, splits = dense_of(name, options)
        for budget in options.budgets:
            lines += [
                "",
                f"## {name}, budget {budget}",
                "",
                f"| method | seeds | mean of the first 32 | {' | '.join(f'best after {look}' for look in looks)} |",
                f"| --- | --- | --- |{' --- |' * len(looks)}",
            ]
            for method in options.methods:
                config = sculpt.SearchConfig(
                    budget=budget, evaluations=options.evaluations, rerank=0, **METHODS[method]
                )
                teach = agent if method == "agent, taught" else None
                results = []
                for seed in options.seeds:
                    place = options.run / name / f"budget{budget}-{options.evaluations}"
                    label = method.replace(", ", "-")
                    if teach is not None:
                        label = f"{label}-{'-'.join(options.lessons)}-{options.lesson_evaluations}"
                    place.mkdir(parents=True, exist_ok=True)
                    compute = functools.partial(searched, model, space, splits, config, seed, teach)
                    results.append(stage(place / f"{label}-seed{seed}.json", compute))
                lines.append(row_of(method, results, looks))
                print(lines[-1], flush=True)
                write_results("bench_transfer", lines)


if __name__ == "__main__":
    main()

"""Searches whose optimum is known: a chain of layers, what each keeps worth something by a table, no network run.

    python -m benchmarks.bench_toy

Every layer's worth rises with the channels that it keeps, more for some layers than for others; in the second toy a pair of
neighbours loses what they differ in, so that sites cannot be chosen one by one. The cost of a layer is the product of
its two widths. The optimum within the budget is found exactly, by dynamic programming over layers, widths and cost.
Searches are kept under --run, and skipped when they are there already.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sculpt
from benchmarks.stages import settle, stage
from benchmarks.timing import provenance, write_results
from sculpt.agents.config import RULES
from sculpt.data.splits import Split, Splits
from sculpt.pruning.space import Space
from sculpt.scoring.evaluation import Scores
from sculpt.scoring.problem import Problem

WIDTH = 16
METHODS = ("agent", "table", "cma_es", "evolution", "random", "greedy", "uniform")


@dataclasses.dataclass(frozen=True)
class ToyChain:
    """A chain of dense layers of one width, and what a policy for it is worth."""

    sites: int = 20
    """Layers that can be pruned; one more, the head, follows."""
    pairs: float = 0.0
    """Weight of what neighbours lose by their difference."""
    seed: int = 0
    """Draws the table."""

    told: bool = False
    """Whether the scale of a layer's weights tells its importance; else nothing does."""

    def importance(self) -> np.ndarray:
        """float64 `[sites]`: worth of all channels of a layer; the mean is 1."""
        drawn = np.random.default_rng(self.seed).lognormal(sigma=1.0, size=self.sites)
        return drawn / drawn.mean()

    def worth(self, kept: np.ndarray) -> np.ndarray:
        """float64 `[sites, n]`: worth of each layer by itself where it keeps fractions `[n]` of its channels."""
        return self.importance()[:, None] * (1 - (1 - kept[None]) ** 2) / self.sites

    def loss(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """What two neighbours lose that keep these fractions."""
        return self.pairs * np.abs(first - second) / self.sites

    def __call__(self, problem: Problem, policies: jax.Array, count: jax.Array) -> Scores:
        """Scores `[n]` of policies int32 `[n, sites]`: worth as accuracy."""
        del count
        kept = jnp.asarray(problem.space.kept)
        fractions = jnp.take_along_axis(kept[None], policies[:, :, None], axis=2)[:, :, 0]
        importance = jnp.asarray(self.importance(), jnp.float32)
        alone = (importance[None] * (1 - (1 - fractions) ** 2)).mean(axis=1)
        apart = jnp.abs(fractions[:, 1:] - fractions[:, :-1]).sum(axis=1) * (self.pairs / self.sites)
        return Scores(alone - apart, 1 - alone + apart)

    def optimum(self, space: Space, budget: float) -> float:
        """The most that a policy within the budget is worth.

        Costs are whole numbers: products of the channels kept on both sides of a layer.
        """
        kept = space.kept[0, : space.num_options[0]].astype(np.float64)
        channels = np.round(kept * WIDTH).astype(int)
        most = int(np.floor((budget + 1e-6) * WIDTH**2 * self.sites + WIDTH * 10 * (budget + 1e-6)))
        worth = self.worth(kept)
        best = np.full((len(kept), most + 1), -np.inf)
        for option, width in enumerate(channels):  # the first layer reads all inputs
            if WIDTH * width <= most:
                best[option, WIDTH * width] = worth[0, option]
        for site in range(1, self.sites):
            after = np.full_like(best, -np.inf)
            for option, width in enumerate(channels):
                for before, other in enumerate(channels):
                    cost = width * other
                    if cost <= most:
                        reached = (
                            best[before, : most + 1 - cost]
                            + worth[site, option]
                            - self.loss(kept[option], kept[before])
                        )
                        after[option, cost:] = np.maximum(after[option, cost:], reached)
            best = after
        head = [best[option, : most + 1 - 10 * width].max() for option, width in enumerate(channels)]
        return float(np.max(head))


def chain_space(chain: ToyChain) -> tuple[sculpt.Model, Space]:
    """The network of a chain, untrained, for images `[n, 4, 4, 1]` and ten classes, and its search space."""
    rng = np.random.default_rng(1)
    widths = [WIDTH] * (chain.sites + 1) + [10]
    scales = [*(chain.importance() if chain.told else np.ones(chain.sites)), 1.0]
    params = {
        f"layer{i:02d}": jnp.asarray(scale * rng.normal(size=pair), jnp.float32)
        for i, (pair, scale) in enumerate(zip(itertools.pairwise(widths), scales))
    }

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for name in sorted(params)[:-1]:
            x = jax.nn.relu(x @ params[name])
        return x @ params[sorted(params)[-1]]

    model = sculpt.from_function(apply, params)
    return model, sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 4, 4, 1))), families=("channels",))


def noise() -> Splits:
    """Images that nobody looks at."""
    images, labels = np.zeros((8, 4, 4, 1), np.uint8), np.arange(8, dtype=np.int32)
    split = Split(images, labels)
    return Splits("noise", split, split, split, 10, (0.5,), (0.5,))


def share(method: str, chain: ToyChain, evaluations: int, budget: float) -> dict[str, float]:
    """What the policy that a search finds is worth, as a share of the optimum."""
    model, space = chain_space(chain)
    config = sculpt.SearchConfig(
        method=method,  # type: ignore[arg-type]
        budget=budget,
        evaluations=64 if method in RULES else evaluations,
        score_images=1,
        calibration_images=0,
        rerank=0,
    )
    found = sculpt.search(model, space, noise(), config, jax.random.key(chain.seed), scorer=chain)
    # Every chain is a program of its own: a process may hold only so many.
    jax.clear_caches()
    return {"share": found.score / chain.optimum(space, budget)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/bench_toy"))
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--pairs", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    settle(options.run, {"sites": options.sites, "budget": options.budget})
    counts = " | ".join(f"{pairs:g}, {n}" for pairs in options.pairs for n in options.evaluations)
    columns = len(options.pairs) * len(options.evaluations)
    options_per_site = int(chain_space(ToyChain(options.sites))[1].num_options[0])
    lines = [
        "# Searches whose optimum is known",
        "",
        *provenance(),
        f"{options.sites} sites of {options_per_site} options, budget {options.budget}. Percent of the optimum that the best policy "
        f"is worth, median (lowest to highest) of seeds {options.seeds}, each with a table and a search of its own. Columns: "
        "weight of the pairs, evaluations.",
        "",
        f"| method | {counts} |",
        f"| --- |{' --- |' * columns}",
    ]
    for method in METHODS:
        cells = []
        for pairs, evaluations in itertools.product(options.pairs, options.evaluations):
            shares = []
            for seed in options.seeds:
                chain = ToyChain(options.sites, pairs, seed)
                file = options.run / method / f"pairs{pairs:g}-{evaluations}-seed{seed}.json"
                compute = functools.partial(share, method, chain, evaluations, options.budget)
                shares.append(100 * stage(file, compute)["share"])
            cells.append(f"{np.median(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_results("bench_toy", lines)


if __name__ == "__main__":
    main()

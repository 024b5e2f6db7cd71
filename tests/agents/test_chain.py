"""On a chain whose optimum is known exactly the agent comes within two percent of it."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import sculpt
from benchmarks.bench_toy import ToyChain, chain_space, noise
from sculpt.pruning.costs import resource_used

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_the_optimum_is_that_of_trying_everything(pairs: float) -> None:
    _, space = chain_space(ToyChain(3))
    chain = ToyChain(3, pairs)
    every = np.asarray(list(itertools.product(range(int(space.num_options[0])), repeat=3)), np.int32)
    kept = space.kept[0][every].astype(np.float64)
    worth = (chain.importance()[None] * (1 - (1 - kept) ** 2)).mean(axis=1)
    worth -= chain.loss(kept[:, 1:], kept[:, :-1]).sum(axis=1)
    for budget in (0.2, 0.4, 0.7):
        within = np.asarray(jax.jit(lambda p: resource_used(space, p))(every)) <= budget + 1e-6
        assert chain.optimum(space, budget) == pytest.approx(worth[within].max(), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [0.0, 1.0])
def test_the_agent_comes_within_two_percent_of_the_optimum(pairs: float) -> None:
    model, space = chain_space(ToyChain(20))
    config = sculpt.SearchConfig(budget=0.4, evaluations=1024, score_images=1, calibration_images=0, rerank=0)
    shares = []
    for seed in range(3):
        chain = ToyChain(20, pairs, seed)
        found = sculpt.search(model, space, noise(), config, jax.random.key(seed), scorer=chain)
        shares.append(found.score / chain.optimum(space, 0.4))
    assert max(shares) <= 1 + 1e-5
    assert np.median(shares) >= 0.98

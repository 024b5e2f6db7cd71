"""Settings: sensible defaults, and one clear refusal for what makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sculpt.agents.config import AgentConfig, SearchConfig
from sculpt.scoring.rewards import RewardConfig
from sculpt.training.config import FinetuneConfig

LAGRANGIAN = RewardConfig(kind="lagrangian")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"method": "guess"}, "method must be one of agent, table, random"),
        ({"objective": "speed"}, "objective must be one of"),
        ({"budget": 0.0}, "budget must be in"),
        ({"budget": 1.5}, "budget must be in"),
        ({"budget": float("nan")}, "budget must be in"),
        ({"evaluations": 0}, "evaluations must be a whole number of at least 1, got 0"),
        ({"evaluations": 10, "batch_size": 16}, r"evaluations=10 is less than one update of 16 policies"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"score_images": 0}, "score_images"),
        ({"calibration_images": -1}, "calibration_images"),
        ({"rerank": -1}, "rerank"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"epochs": 0}, "epochs"),
        ({"clip_ratio": 1.0}, "clip_ratio"),
        ({"entropy": -0.1}, "entropy"),
        ({"final_entropy": -0.1}, "final_entropy must be a number of at least 0, or None, got -0.1"),
        ({"kl_limit": 0.0}, "kl_limit must be a number above 0, or None, got 0.0"),
        ({"method": "random", "kl_limit": 0.1}, "kl_limit=0.1 needs method='agent' or 'table'"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 2, "discount": 1.5}, "discount"),
        ({"rounds": 2, "discount": 0.5, "gae_lambda": -1.0}, "gae_lambda"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"evaluations": "many"}, "evaluations must be a whole number of at least 1, got 'many'"),
        ({"budget": "half"}, "budget must be in .* got 'half'"),
        ({"agent": {"hidden": 16}}, "SearchConfig.agent must be of type AgentConfig, got dict: AgentConfig"),
        ({"reward": None}, "SearchConfig.reward must be of type RewardConfig, got NoneType"),
        # settings that the others would ignore
        ({"discount": 0.9}, "needs rounds > 1"),
        ({"gae_lambda": 0.5}, "needs a discount"),
        ({"rounds": 2, "method": "random"}, "needs method='agent'"),
        ({"reward": LAGRANGIAN}, "set projection=False"),
        ({"projection": False}, "would ignore the budget"),
        ({"projection": False, "reward": LAGRANGIAN, "method": "random"}, "needs method='agent'"),
        (
            {"projection": False, "reward": LAGRANGIAN, "sensitivity": 0.3},
            "sensitivity=0.3 needs projection=True",
        ),
        ({"sensitivity": 1.0}, r"sensitivity must be in \[0, 1\), got 1.0"),
        (
            {"method": "evolution", "agent": AgentConfig(hidden=16)},
            "agent=AgentConfig.* needs method='agent'",
        ),
        ({"method": "random", "learning_rate": 0.01}, "learning_rate=0.01 needs method='agent'"),
        ({"method": "uniform", "epochs": 1}, "epochs=1 needs method='agent'"),
        ({"method": "magnitude", "clip_ratio": 0.1}, "clip_ratio=0.1 needs method='agent'"),
        ({"method": "random", "entropy": 0.0}, "entropy=0.0 needs method='agent'"),
        ({"method": "table", "agent": AgentConfig(hidden=16)}, "agent=AgentConfig.* needs method='agent'"),
        ({"method": "lamp", "warm_start": True}, "warm_start=True: method='lamp' has no use for it"),
        ({"rerank": 0, "rerank_finetune": FinetuneConfig(max_steps=7)}, "rerank=0 fine-tunes none"),
    ],
)
def test_refusals(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SearchConfig(**wrong)


def test_without_a_projection_single_sites_may_be_switched_off() -> None:
    assert SearchConfig(projection=False, reward=LAGRANGIAN, sensitivity=0.0).sensitivity == 0.0


@pytest.mark.parametrize("wrong", [{"hidden": 10}, {"layers": 0}, {"heads": 0}])
def test_refusals_of_agent_sizes(wrong: dict) -> None:
    with pytest.raises(ValueError, match="AgentConfig"):
        AgentConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "batch", "updates"),
    [
        ({"evaluations": 2000}, 32, 62),
        ({"evaluations": 2048}, 64, 32),
        ({"evaluations": 4096, "batch_size": 16}, 16, 256),
        ({"evaluations": 12}, 12, 1),
        ({"evaluations": 512, "rounds": 4}, 32, 4),
    ],
)
def test_evaluations_are_never_exceeded(settings: dict, batch: int, updates: int) -> None:
    config = SearchConfig(**settings)
    assert (config.batch, config.updates) == (batch, updates)
    assert config.updates * config.policies_per_update <= config.evaluations


def test_numbers_of_numpy_count_like_pythons() -> None:
    settings: dict[str, Any] = {
        "budget": np.float32(0.5),
        "front": (np.float64(0.25),),
        "batch_size": np.int32(8),
    }
    assert repr(SearchConfig(**settings)) == repr(SearchConfig(budget=0.5, front=(0.25,), batch_size=8))
    assert repr(AgentConfig(hidden=np.int64(16))) == repr(AgentConfig(hidden=16))  # type: ignore[arg-type]
    training: dict[str, Any] = {"epochs": np.int64(2), "learning_rate": np.float32(0.5)}
    assert repr(FinetuneConfig(**training)) == repr(FinetuneConfig(epochs=2, learning_rate=0.5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AgentConfig(own_logits="no"), "own_logits must be True or False, got 'no'"),  # type: ignore[arg-type]
        (lambda: SearchConfig(warm_start="no"), "warm_start must be True or False, got 'no'"),  # type: ignore[arg-type]
    ],
)
def test_switches_are_true_or_false(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()

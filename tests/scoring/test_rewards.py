"""The reward: no cliff, no free band, weights that adapt."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.scoring.rewards import RewardConfig, init_reward, quality, reward, update_reward, violation

BUDGET = jnp.float32(0.5)


@pytest.mark.parametrize("kind", ["lagrangian", "schedule"])
def test_correctness_17_reward_falls_with_every_bit_of_violation_and_has_no_cliff(kind: str) -> None:
    config = RewardConfig(kind=kind, weight=2.0)  # type: ignore[arg-type]
    ratios = jnp.linspace(0.0, 1.0, 1001)
    rewards = np.asarray(reward(init_reward(config), jnp.full(1001, 0.9), ratios, BUDGET))
    steps = np.diff(rewards)
    within = np.asarray(ratios[1:]) <= 0.5
    np.testing.assert_allclose(rewards[:501], 0.9, rtol=1e-6)
    assert (steps[~within] < 0).all()
    assert np.abs(steps).max() < 2.0 * 0.001 * 1.1  # nowhere steeper than the weight
    assert rewards.min() > -1.0


def test_a_better_network_is_always_worth_more() -> None:
    state = init_reward(RewardConfig(kind="lagrangian"))
    rewards = reward(state, jnp.linspace(0, 1, 11), jnp.full(11, 0.8), BUDGET)
    assert (np.diff(rewards) > 0).all()


def test_the_multiplier_rises_while_the_budget_is_broken_and_falls_again() -> None:
    config = RewardConfig(kind="lagrangian", weight=1.0, rate=2.0)
    state = init_reward(config)
    broken = update_reward(config, state, jnp.asarray([0.9, 0.7]), BUDGET, jnp.float32(0.1))
    np.testing.assert_allclose(broken.weight, 1.0 + 2.0 * 0.3, rtol=1e-6)
    kept = update_reward(config, broken, jnp.asarray([0.1, 0.1]), BUDGET, jnp.float32(0.2))
    assert kept.weight < broken.weight
    for _ in range(10):
        kept = update_reward(config, kept, jnp.asarray([0.1]), BUDGET, jnp.float32(0.3))
    assert kept.weight == 0.0


def test_the_schedule_grows_linearly() -> None:
    config = RewardConfig(kind="schedule", weight=1.0, rate=3.0)
    weights = [
        float(update_reward(config, init_reward(config), jnp.zeros(2), BUDGET, jnp.float32(t)).weight)
        for t in (0.0, 0.5, 1.0)
    ]
    np.testing.assert_allclose(weights, [1.0, 2.5, 4.0])


def test_under_a_kept_budget_quality_is_all() -> None:
    config = RewardConfig()
    state = update_reward(config, init_reward(config), jnp.asarray([0.9]), BUDGET, jnp.float32(1.0))
    assert reward(state, jnp.float32(0.7), jnp.float32(0.9), BUDGET) == jnp.float32(0.7)


def test_quality_and_violation() -> None:
    assert quality(jnp.float32(0.8), jnp.float32(1.5), "accuracy") == jnp.float32(0.8)
    assert quality(jnp.float32(0.8), jnp.float32(1.5), "loss") == -1.5
    np.testing.assert_allclose(violation(jnp.asarray([0.2, 0.5, 0.75]), BUDGET), [0, 0, 0.25])


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "cliff"},
        {"kind": "lagrangian", "weight": -1.0},
        {"kind": "schedule", "rate": float("inf")},
        {"kind": "lagrangian", "weight": "1"},
        {"kind": "lagrangian", "weight": None},
        {"kind": "schedule", "rate": True},
        {"kind": "budget", "weight": 2.0},
        {"kind": "budget", "rate": 2.0},
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="RewardConfig"):
        RewardConfig(**wrong)

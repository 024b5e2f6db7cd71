"""Racing finds good policies for less work, and says how far its early rungs are to be trusted."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

import sculpt
from sculpt.data.splits import Splits
from sculpt.model import Model
from tests.networks import network, traced

pytestmark = pytest.mark.optimised

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def task(trained_digits: tuple[Model, Splits]) -> dict[str, Any]:
    """48 policies for a trained network and 400 images."""
    model, splits = trained_digits
    space = sculpt.make_space(sculpt.trace(model, splits.normalise(splits.train.images[:1])))
    images = splits.normalise(splits.train.images[:400])
    return {
        "model": model,
        "space": space,
        "policies": np.asarray(sculpt.random_policies(space, KEY, 48, budget=0.6)),
        "images": images,
        "labels": splits.train.labels[:400],
        "calibration": images[:64],
    }


@pytest.fixture(scope="module")
def small_task() -> dict[str, Any]:
    """12 policies for a network that was not trained, and 40 images."""
    space = sculpt.make_space(traced("plain"))
    images = np.asarray(jax.random.normal(KEY, (40, 8, 8, 3)))
    return {
        "model": network("plain"),
        "space": space,
        "policies": np.asarray(sculpt.random_policies(space, KEY, 12, budget=0.6)),
        "images": images,
        "labels": np.arange(40, dtype=np.int32) % 5,
        "calibration": images[:8],
    }


@pytest.mark.slow
def test_finalists_carry_their_full_score_and_the_best_is_near_the_top(task: dict[str, Any]) -> None:
    full = sculpt.evaluate_policies(**task)
    race = sculpt.race_policies(**task, key=KEY, first_images=50, sample=4)
    assert [(rung.images, rung.policies) for rung in race.rungs] == [(50, 48), (200, 12), (400, 3)]
    assert sorted(race.order) == list(range(48))
    finalists = race.order[:3]
    assert np.all(race.images[finalists] == 400)
    np.testing.assert_allclose(race.loss[finalists], np.asarray(full.loss)[finalists], rtol=1e-4)
    assert list(finalists) == sorted(finalists, key=lambda i: race.loss[i])
    ranks = np.argsort(np.argsort(np.asarray(full.loss)))
    assert ranks[race.order[0]] < 5
    assert race.work < 0.6


@pytest.mark.slow
def test_the_correlation_is_that_of_the_sample(task: dict[str, Any]) -> None:
    race = sculpt.race_policies(**task, key=KEY, first_images=50, sample=16)
    drawn = np.asarray(jax.random.permutation(KEY, 48))[:16]
    few = sculpt.evaluate_policies(**task | {"images": task["images"][:50], "labels": task["labels"][:50]})
    full = sculpt.evaluate_policies(**task)
    expected = spearmanr(np.asarray(few.loss)[drawn], np.asarray(full.loss)[drawn])[0]
    assert race.rungs[0].rank_correlation == pytest.approx(np.asarray(expected).item(), abs=1e-6)
    assert race.rungs[-1].rank_correlation == pytest.approx(1.0)


def test_a_sampled_policy_with_the_best_full_score_wins(small_task: dict[str, Any]) -> None:
    race = sculpt.race_policies(**small_task, key=KEY, first_images=4, factor=4, sample=12)
    assert [rung.policies for rung in race.rungs] == [12, 3, 1]
    assert np.all(race.images == 40)
    assert race.order.tolist() == sorted(range(12), key=lambda i: race.loss[i])


def test_one_policy_and_few_images_are_a_race_too(small_task: dict[str, Any]) -> None:
    few = small_task | {"policies": small_task["policies"][:1]}
    race = sculpt.race_policies(**few, key=KEY, first_images=1000)
    assert race.order.tolist() == [0]
    assert [(rung.images, rung.policies) for rung in race.rungs] == [(40, 1)]
    assert np.isnan(race.rungs[0].rank_correlation)


@pytest.mark.parametrize(
    ("name", "value"), [("first_images", 0), ("factor", 1), ("factor", 2.5), ("sample", 1)]
)
def test_numbers_out_of_range_are_refused(small_task: dict[str, Any], name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
        sculpt.race_policies(**small_task, key=KEY, **{name: value})  # type: ignore[arg-type]

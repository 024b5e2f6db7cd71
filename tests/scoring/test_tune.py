"""The tuned plan is the fastest of those tried, fits into memory, and is remembered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import sculpt
from sculpt.scoring import tune
from sculpt.scoring.tune import Choices
from tests.networks import network, traced

IMAGES = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
LABELS = jax.random.randint(jax.random.key(1), (64,), 0, 5)
SPACE = sculpt.make_space(traced("plain"))
CHOICES = (("convolution", ("lax", "im2col")), ("images_per_batch", (64, 16)))
FEW = (("images_per_batch", (64, 16)),)


def tuned(cache: Path | None = None, choices: Choices = CHOICES, calibrated: bool = True) -> sculpt.Tuning:
    calibration = IMAGES if calibrated else None
    return sculpt.tune_plan(
        network("plain"), SPACE, IMAGES, LABELS, calibration, choices=choices, cache=cache
    )


def test_the_fastest_of_the_plans_tried_is_chosen_and_gives_the_same_scores() -> None:
    found = tuned()
    rates = {trial.plan: trial.policies_per_second or 0.0 for trial in found.trials}
    assert len(rates) == 3
    assert rates[found.plan] == max(rates.values())
    assert found.plan.policy_shards == len(jax.devices())
    assert all(trial.memory is not None and trial.memory > 0 for trial in found.trials)
    text = "\n".join(found.describe())
    assert found.plan.describe() in text
    assert "chosen in this run on 8 x cpu" in text
    policies = sculpt.random_policies(SPACE, jax.random.key(2), 9)
    plans = (None, *rates)
    all_scores = [
        sculpt.evaluate_policies(network("plain"), SPACE, policies, IMAGES, LABELS, IMAGES, plan)
        for plan in plans
    ]
    for scores in all_scores[1:]:
        np.testing.assert_allclose(scores.accuracy, all_scores[0].accuracy, atol=1.01 / 64)
        np.testing.assert_allclose(scores.loss, all_scores[0].loss, atol=1e-4, rtol=1e-4)


def test_what_was_found_is_remembered_by_shapes_and_precision(tmp_path: Path) -> None:
    first = tuned(tmp_path, choices=FEW)
    again = tuned(tmp_path, choices=FEW)
    assert not first.remembered
    assert again.remembered
    assert dataclasses.replace(again, remembered=False) == first
    assert "an earlier run" in "\n".join(again.describe())
    assert not tuned(tmp_path, choices=FEW[:1], calibrated=False).remembered
    for file in tmp_path.iterdir():
        file.write_text("{broken")
    assert not tuned(tmp_path, choices=FEW).remembered


def test_plans_beyond_the_memory_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {trial.plan: trial.memory or 0 for trial in tuned(choices=FEW).trials}
    largest, smallest = max(needs, key=lambda plan: needs[plan]), min(needs, key=lambda plan: needs[plan])
    assert needs[smallest] < needs[largest]
    monkeypatch.setattr(tune, "_memory_limit", lambda: needs[largest] - 1)
    found = tuned(choices=FEW)
    skipped = [trial for trial in found.trials if trial.policies_per_second is None]
    assert [trial.plan for trial in skipped] == [largest]
    assert "MiB, " in skipped[0].note
    assert found.plan != largest
    monkeypatch.setattr(tune, "_memory_limit", lambda: 10)
    with pytest.raises(
        ValueError, match=r"no plan fits into memory: needs .* MiB, 0 are free; use fewer images"
    ):
        tuned()


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"choices must be \(field, values to try\)"):
        tuned(choices=(("speed", (1, 2)),))
    with pytest.raises(ValueError, match=r"choices must be \(field, values to try\)"):
        tuned(choices=(("convolution", ()),))

"""The tuned plan is the fastest of those tried, fits into memory, and is remembered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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


def tuned(
    cache: Path | None = None,
    choices: Choices = CHOICES,
    calibrated: bool = True,
    images: int = 64,
    **fields: Any,
) -> sculpt.Tuning:
    calibration = IMAGES if calibrated else None
    return sculpt.tune_plan(
        network("plain"),
        SPACE,
        IMAGES[:images],
        LABELS[:images],
        calibration,
        choices=choices,
        cache=cache,
        **fields,
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_was_found_is_remembered_by_shapes_and_precision(tmp_path: Path) -> None:
    first = tuned(tmp_path, choices=FEW)
    again = tuned(tmp_path, choices=FEW)
    assert not first.remembered
    assert again.remembered
    assert dataclasses.replace(again, remembered=False) == first
    assert "an earlier run" in "\n".join(again.describe())
    for other in (
        {"calibrated": False},
        {"images": 32},
        {"precision": "bfloat16"},
        {"choices": FEW[:1] + CHOICES[:1]},
    ):
        found = tuned(tmp_path, **{"choices": FEW, **other})  # type: ignore[arg-type]
        assert not found.remembered
        assert found.plan.precision == other.get("precision", "float32")
    for file in tmp_path.iterdir():
        file.write_text("{broken")
    assert not tuned(tmp_path, choices=FEW).remembered


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_mesh_is_tuned_and_more_devices_than_there_are_is_passed_over() -> None:
    found = tuned(choices=(("mesh", ((8, 1), (4, 2), (9, 1))), ("policy_shards", (2, 8))), calibrated=False)
    tried = {(trial.plan.policy_shards, trial.plan.image_shards): trial for trial in found.trials}
    assert {(8, 1), (4, 2), (9, 1)} <= set(tried)
    assert tried[9, 1].note == "needs 9 devices, there are 8"
    assert found.plan.devices <= 8


@pytest.mark.slow
def test_a_remembered_plan_that_no_longer_fits_is_found_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuned(tmp_path, choices=FEW)
    needs = {trial.plan: trial.memory or 0 for trial in first.trials}
    assert tuned(tmp_path, choices=FEW).remembered
    monkeypatch.setattr(tune, "_memory_limit", lambda: max(needs.values()))
    assert tuned(tmp_path, choices=FEW).remembered
    monkeypatch.setattr(tune, "_memory_limit", lambda: needs[first.plan] - 1)
    if needs[first.plan] > min(needs.values()):
        assert not tuned(tmp_path, choices=FEW).remembered
    else:
        with pytest.raises(ValueError, match="no plan fits"):
            tuned(tmp_path, choices=FEW)


def test_the_memory_of_the_host_is_what_programs_can_have() -> None:
    rows = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    limit = tune._memory_limit()
    assert (limit is None) == ("MemAvailable" not in rows)
    assert limit is None or limit > 0


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"choices must be \(field, values to try\)"):
        tuned(choices=(("speed", (1, 2)),))
    with pytest.raises(ValueError, match=r"choices must be \(field, values to try\)"):
        tuned(choices=(("convolution", ()),))

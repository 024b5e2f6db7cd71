"""Every plan gives the same scores: chunks, batches, lowering of convolutions, devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import sculpt
from sculpt.scoring.evaluation import score_compiled
from sculpt.scoring.problem import Repair
from tests.networks import network, slow_but, traced

IMAGES = jax.random.normal(jax.random.key(0), (150, 8, 8, 3))
LABELS = jax.random.randint(jax.random.key(1), (150,), 0, 5)
PLANS = {
    "small batches": sculpt.EvaluationPlan(images_per_batch=16),
    "vmap": sculpt.EvaluationPlan(policies_per_chunk=4, images_per_batch=64),
    "im2col": sculpt.EvaluationPlan(convolution="im2col"),
    "im2col, vmap": sculpt.EvaluationPlan(policies_per_chunk=3, convolution="im2col"),
    "two devices": sculpt.EvaluationPlan(policy_shards=2),
    "eight devices, vmap": sculpt.EvaluationPlan(policies_per_chunk=2, policy_shards=8),
    "images over two devices": sculpt.EvaluationPlan(image_shards=2),
    "images over three devices": sculpt.EvaluationPlan(images_per_batch=16, image_shards=3),
    "policies and images over devices": sculpt.EvaluationPlan(policy_shards=4, image_shards=2),
}


@functools.cache
def space_of(name: str) -> sculpt.Space:
    """One space for each network: compiled programs are kept by its identity."""
    return sculpt.make_space(traced(name))


def scores(
    name: str, plan: sculpt.EvaluationPlan, number: int = 11, repair: Repair = "recalibrate"
) -> sculpt.Scores:
    """Scores of some policies, repaired on two batches."""
    space = space_of(name)
    policies = sculpt.random_policies(space, jax.random.key(2), number)
    return sculpt.evaluate_policies(
        network(name), space, policies, IMAGES, LABELS, IMAGES[:128], plan, repair=repair
    )


@slow_but("small batches", "im2col, vmap", "policies and images over devices", among=PLANS, argument="plan")
@pytest.mark.slow
def test_every_plan_gives_the_same_scores(plan: str) -> None:
    expected, found = scores("residual", sculpt.EvaluationPlan()), scores("residual", PLANS[plan])
    np.testing.assert_allclose(found.accuracy, expected.accuracy, atol=1.01 / 150)
    np.testing.assert_allclose(found.loss, expected.loss, atol=1e-4, rtol=1e-4)


@slow_but(
    "policies and images over devices",
    among=("im2col, vmap", "policies and images over devices"),
    argument="plan",
)
@pytest.mark.slow
def test_reconstruction_is_the_same_in_every_plan(plan: str) -> None:
    expected = scores("residual", sculpt.EvaluationPlan(), repair="reconstruct")
    found = scores("residual", PLANS[plan], repair="reconstruct")
    np.testing.assert_allclose(found.accuracy, expected.accuracy, atol=1.01 / 150)
    np.testing.assert_allclose(found.loss, expected.loss, atol=1e-3, rtol=1e-3)


def test_a_plan_for_more_devices_than_there_are_says_so() -> None:
    with pytest.raises(ValueError, match=r"the plan uses 16 x 1 devices, there are 8: lower policy_shards"):
        scores("plain", sculpt.EvaluationPlan(policy_shards=16))


@pytest.mark.parametrize("field", ["convolution", "precision"])
def test_unknown_choices_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of"):
        sculpt.EvaluationPlan(**{field: "fast"})  # type: ignore[arg-type]


@pytest.mark.slow
def test_no_retrace_on_several_devices() -> None:
    plan = sculpt.EvaluationPlan(policy_shards=2)
    scores("plain", plan, 8)
    compiled = getattr(score_compiled, "_cache_size")()  # noqa: B009
    for number in (8, 7, 5):
        scores("plain", plan, number)
    assert getattr(score_compiled, "_cache_size")() == compiled  # noqa: B009

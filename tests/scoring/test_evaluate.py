"""Batched scores equal those of one masked network at a time, and nothing is compiled twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.scoring.evaluate import _scored
from tests.networks import network, traced

IMAGES = jax.random.normal(jax.random.key(0), (50, 8, 8, 3))
LABELS = jax.random.randint(jax.random.key(1), (50,), 0, 5)


def cache_size() -> int:
    """Programs that `evaluate_policies` has compiled."""
    return getattr(_scored, "_cache_size")()  # noqa: B009


def one_by_one(
    name: str, space: sculpt.Space, policy: jax.Array, calibration: jax.Array | None
) -> tuple[float, float]:
    """The same scores by the plainest route: mask, recalibrate, run, compare."""
    model = network(name)
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    if calibration is not None:
        masked = sculpt.recalibrate(masked, calibration, images_per_batch=16)
    logits = np.asarray(masked(IMAGES), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    labels = np.asarray(LABELS)
    return float((logits.argmax(1) == labels).mean()), float(-logs[np.arange(50), labels].mean())


@pytest.mark.parametrize("name", ["residual", "nnx"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("chunk", [1, 4])
def test_scores_equal_a_plain_loop(name: str, calibrated: bool, chunk: int) -> None:
    space = sculpt.make_space(traced(name))
    policies = sculpt.random_policies(space, jax.random.key(2), 5)
    calibration = IMAGES[:32] if calibrated else None
    plan = sculpt.EvaluationPlan(policies_per_chunk=chunk, images_per_batch=16)
    scores = sculpt.evaluate_policies(network(name), space, policies, IMAGES, LABELS, calibration, plan)
    for i, policy in enumerate(policies[:3]):
        accuracy, loss = one_by_one(name, space, policy, calibration)
        assert float(scores.accuracy[i]) == pytest.approx(accuracy, abs=1e-6)
        assert float(scores.loss[i]) == pytest.approx(loss, rel=1e-4, abs=1e-4)


def test_no_retrace_between_calls_and_numbers_of_policies() -> None:
    model, space = network("plain"), sculpt.make_space(traced("plain"))
    policies = sculpt.random_policies(space, jax.random.key(3), 8)
    first = sculpt.evaluate_policies(model, space, policies, IMAGES, LABELS)
    compiled = cache_size()
    for n in (8, 7, 5):
        again = sculpt.evaluate_policies(model, space, policies[:n], IMAGES, LABELS)
        assert np.array_equal(again.accuracy, first.accuracy[:n])
    assert cache_size() == compiled


def test_padding_images_do_not_count() -> None:
    model, space = network("plain"), sculpt.make_space(traced("plain"))
    policies = sculpt.random_policies(space, jax.random.key(4), 2)
    whole = sculpt.evaluate_policies(
        model, space, policies, IMAGES, LABELS, plan=sculpt.EvaluationPlan(1, 50)
    )
    pieces = sculpt.evaluate_policies(
        model, space, policies, IMAGES, LABELS, plan=sculpt.EvaluationPlan(1, 16)
    )
    assert np.array_equal(whole.accuracy, pieces.accuracy)
    np.testing.assert_allclose(whole.loss, pieces.loss, rtol=1e-5)


def test_recalibration_gives_the_statistics_of_the_batch_whatever_the_momentum() -> None:
    model = network("plain")
    state = sculpt.recalibrate(model, IMAGES, images_per_batch=50).state["batch_stats"]
    kernel = model.params["Conv_0"]["kernel"]
    dims = ("NHWC", "HWIO", "NHWC")
    values = jax.lax.conv_general_dilated(IMAGES, kernel, (1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(state["BatchNorm_0"]["mean"], values.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state["BatchNorm_0"]["var"], values.var((0, 1, 2)), rtol=1e-3)


def test_recalibration_leaves_networks_without_statistics_alone() -> None:
    model = network("function")
    assert sculpt.recalibrate(model, IMAGES).state == model.state


def test_whole_model_accuracy() -> None:
    model = network("plain")
    scores = sculpt.evaluate(model, IMAGES, LABELS, images_per_batch=16)
    assert float(scores.accuracy) == pytest.approx(float((jnp.argmax(model(IMAGES), 1) == LABELS).mean()))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, :4], LABELS, "expected images"),
        (np.zeros((50, 8, 8, 3), np.uint8), LABELS, "normalise"),
        (IMAGES, LABELS[:10], "expected integer labels"),
        (IMAGES, LABELS.astype(jnp.float32), "expected integer labels"),
        (IMAGES[:0], LABELS[:0], "expected images"),
    ],
)
def test_bad_images_and_labels_are_refused(images: object, labels: object, message: str) -> None:
    model, space = network("plain"), sculpt.make_space(traced("plain"))
    policies = sculpt.random_policies(space, jax.random.key(3), 2)
    with pytest.raises(ValueError, match=message):
        sculpt.evaluate_policies(model, space, policies, images, labels)


@pytest.mark.parametrize("field", ["policies_per_chunk", "images_per_batch"])
def test_plans_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be a whole number"):
        sculpt.EvaluationPlan(**{field: 0})


def test_a_model_without_logits_is_refused() -> None:
    model = sculpt.from_function(lambda params, x: x * params["w"], {"w": jnp.ones(())})
    with pytest.raises(ValueError, match=r"logits \[1, classes\]; this one gives \[1, 4, 4, 1\]"):
        sculpt.evaluate(model, jnp.zeros((3, 4, 4, 1)), np.zeros(3, np.int32))

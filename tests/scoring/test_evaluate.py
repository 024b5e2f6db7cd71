"""Batched scores equal those of one masked network at a time, and nothing is compiled twice."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.repair.reconstruction import BRIEF, RIDGE, _reconstructed
from sculpt.scoring.evaluation import score_compiled
from tests.networks import network, traced

IMAGES = jax.random.normal(jax.random.key(0), (50, 8, 8, 3))
LABELS = jax.random.randint(jax.random.key(1), (50,), 0, 5)


def cache_size() -> int:
    """Programs that `evaluate_policies` has compiled."""
    return getattr(score_compiled, "_cache_size")()  # noqa: B009


def one_by_one(
    name: str, space: sculpt.Space, policy: jax.Array, calibration: jax.Array | None
) -> tuple[float, float]:
    """The same scores by the plainest route: mask, recalibrate, run, compare."""
    model = network(name)
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    if calibration is not None:
        masked = sculpt.recalibrate(masked, calibration)
    logits = np.asarray(masked(IMAGES), np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    labels = np.asarray(LABELS)
    return float((logits.argmax(1) == labels).mean()), float(-logs[np.arange(50), labels].mean())


@pytest.mark.parametrize("name", ["residual", "nnx"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.fast("4-False-nnx")
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


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("residual", 4),
        ("biased", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("residual", 1), ("biased", 4))),
    ],
)
@pytest.mark.slow
def test_scores_of_reconstructed_networks_equal_a_plain_loop(name: str, chunk: int) -> None:
    model, space = network(name), sculpt.make_space(traced(name))
    policies = sculpt.random_policies(space, jax.random.key(2), 5)
    plan = sculpt.EvaluationPlan(policies_per_chunk=chunk, images_per_batch=16)
    scores = sculpt.evaluate_policies(
        model, space, policies, IMAGES, LABELS, IMAGES[:40], plan, repair="reconstruct"
    )
    for i, policy in enumerate(policies[:2]):
        masks = sculpt.make_masks(space, model.params, policy)
        params, _ = _reconstructed(
            model.apply, BRIEF, model.params, model.state, masks, IMAGES[:40], jnp.float32(RIDGE)
        )
        expected = sculpt.evaluate(model.replace(params=params), IMAGES, LABELS)
        # Conjugate gradients carry on what the two programs round differently.
        assert float(scores.accuracy[i]) == pytest.approx(float(expected.accuracy), abs=0.021)
        assert float(scores.loss[i]) == pytest.approx(float(expected.loss), rel=3e-3)


@pytest.mark.parametrize(
    ("calibration", "repair", "message"),
    [
        (None, "reconstruct", "needs calibration images"),
        (IMAGES, "mend", "repair must be one of recalibrate, rec"),
    ],
)
def test_impossible_repairs_are_refused(calibration: Any, repair: Any, message: str) -> None:
    model, space = network("plain"), sculpt.make_space(traced("plain"))
    policies = np.zeros((1, space.num_sites), np.int32)
    with pytest.raises(ValueError, match=message):
        sculpt.evaluate_policies(model, space, policies, IMAGES, LABELS, calibration, repair=repair)


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


def test_raw_images_are_normalised_batch_by_batch() -> None:
    model, raw = network("plain"), np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    seen: list[int] = []

    def normalise(images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return images.astype(np.float32) / 255.0

    found = sculpt.evaluate(model, raw, LABELS, 16, normalise=normalise)
    wanted = sculpt.evaluate(model, raw.astype(np.float32) / 255.0, LABELS, 16)
    assert float(found.accuracy) == float(wanted.accuracy) and float(found.loss) == float(wanted.loss)
    assert max(seen) == 16
    with pytest.raises(ValueError, match="normalise them first"):
        sculpt.evaluate(model, raw, LABELS, normalise=lambda images: images)
    with pytest.raises(ValueError, match=r"expected integer labels \[50\]"):
        sculpt.evaluate(model, raw, LABELS[:16], 16, normalise=normalise)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_batches_hold_whole_numbers_of_images(size: int) -> None:
    with pytest.raises(ValueError, match="images_per_batch must be a whole number of at least 1"):
        sculpt.evaluate(network("plain"), IMAGES, LABELS, size)
    with pytest.raises(ValueError, match="images_per_batch must be a whole number of at least 1"):
        sculpt.recalibrate(network("plain"), IMAGES, size)


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


@pytest.mark.parametrize("field", ["policies_per_chunk", "images_per_batch", "policy_shards", "image_shards"])
def test_plans_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be a whole number"):
        sculpt.EvaluationPlan(**{field: 0})  # type: ignore[arg-type]


def test_a_model_without_logits_is_refused() -> None:
    model = sculpt.from_function(lambda params, x: x * params["w"], {"w": jnp.ones(())})
    with pytest.raises(ValueError, match=r"labels \[3, 4, 4\] for logits \[3, 4, 4, 1\], got int32\[3\]"):
        sculpt.evaluate(model, jnp.zeros((3, 4, 4, 1)), np.zeros(3, np.int32))


def test_labels_that_the_model_has_no_class_for_are_refused() -> None:
    model = network("plain")
    with pytest.raises(ValueError, match=r"labels from 0 to 4 .* got 0 to 5"):
        sculpt.evaluate(model, IMAGES[:2], np.asarray([0, 5]))
    space = sculpt.make_space(traced("plain"))
    policies = np.zeros((1, space.num_sites), np.int32)
    with pytest.raises(ValueError, match="got -1 to 0"):
        sculpt.evaluate_policies(model, space, policies, IMAGES[:2], np.asarray([0, -1]))


def test_images_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not take images float32\[2, 8, 8, 7\]"):
        sculpt.evaluate(network("plain"), jnp.zeros((2, 8, 8, 7)), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="normalised floating-point images, got uint8"):
        sculpt.recalibrate(network("plain"), np.zeros((2, 8, 8, 3), np.uint8))


def test_recalibration_leaves_frozen_statistics_and_constants_alone() -> None:
    """A frozen norm and a constant scale before a live norm: only the live one's statistics move, and to the right place."""
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (16, 4)).astype(np.float32)
    state = {
        name: jnp.asarray(v, jnp.float32)
        for name, v in {"frozen": [1.0] * 4, "scale": [2.0] * 4, "mean": [7.0] * 4}.items()
    }

    def body(params: dict, state: dict, x: jax.Array) -> jax.Array:
        return (x - state["frozen"][None]) / state["scale"][None] * params["w"][None]

    def train(params: dict, state: dict, x: jax.Array, key: jax.Array) -> tuple[jax.Array, dict]:
        y = body(params, state, x)
        return y, state | {"mean": 0.9 * state["mean"] + 0.1 * y.mean(0)}

    model = sculpt.from_function(body, {"w": jnp.ones(4)}, state, train)
    found = sculpt.recalibrate(model, x).state
    np.testing.assert_array_equal(found["frozen"], state["frozen"])
    np.testing.assert_array_equal(found["scale"], state["scale"])
    np.testing.assert_allclose(found["mean"], ((x - 1.0) / 2.0).mean(0), rtol=1e-5)


def test_a_network_whose_outputs_are_not_finite_has_no_scores() -> None:
    # Pruned to less than everything the root is of a number below zero.
    model = sculpt.from_function(
        lambda p, x: jnp.sqrt((x * 0 + 1) @ p["a"] @ p["b"] - 3.5),
        {"a": jnp.ones((1, 4)), "b": jnp.ones((4, 2))},
    )
    images, labels = jnp.ones((6, 1)), jnp.zeros(6, jnp.int32)
    space = sculpt.make_space(sculpt.trace(model, images))
    scores = sculpt.evaluate_policies(model, space, [[0], [1]], images, labels)
    assert np.isfinite(scores.accuracy[0]) and np.isfinite(scores.loss[0])
    assert np.isnan(scores.accuracy[1]) and np.isnan(scores.loss[1])
    pruned = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, [1]))
    assert np.isnan(sculpt.evaluate(pruned, images, labels).accuracy)


def test_sizes_of_a_plan_may_be_numpy_integers() -> None:
    assert sculpt.EvaluationPlan(images_per_batch=np.int64(4)) == sculpt.EvaluationPlan(images_per_batch=4)  # type: ignore[arg-type]

"""Scores inside a compiled function of the user's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt

X = jax.random.normal(jax.random.key(0), (12, 3))
LABELS = jnp.arange(12, dtype=jnp.int32) % 2


def _apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["a"]) @ params["b"]


PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (3, 8)),
    "b": jax.random.normal(jax.random.key(2), (8, 2)),
}
MODEL = sculpt.from_function(_apply, PARAMS)
SPACE = sculpt.make_space(sculpt.trace(MODEL, X))
POLICIES = jnp.asarray([[0], [4]], jnp.int32)


def test_evaluate_takes_traced_parameters_images_and_labels() -> None:
    def loss(params: dict[str, jax.Array], x: jax.Array, labels: jax.Array) -> jax.Array:
        return sculpt.evaluate(MODEL.replace(params=params), x, labels, images_per_batch=8).loss

    wanted = sculpt.evaluate(MODEL, X, LABELS).loss
    np.testing.assert_allclose(jax.jit(loss)(PARAMS, X, LABELS), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda p: loss(p, X, LABELS))(PARAMS), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda y: loss(PARAMS, X, y))(LABELS), wanted, rtol=1e-5)


@pytest.mark.parametrize("repair", ["recalibrate", "reconstruct"])
@pytest.mark.fast("recalibrate")
def test_evaluate_policies_takes_traced_arguments(repair: str) -> None:
    def scores(
        params: dict[str, jax.Array], policies: jax.Array, x: jax.Array, labels: jax.Array
    ) -> sculpt.Scores:
        model = MODEL.replace(params=params)
        return sculpt.evaluate_policies(model, SPACE, policies, x, labels, calibration=x, repair=repair)  # type: ignore[arg-type]

    arguments = (PARAMS, POLICIES, X, LABELS)
    wanted, found = scores(*arguments), jax.jit(scores)(*arguments)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-4)
    np.testing.assert_array_equal(found.accuracy, wanted.accuracy)

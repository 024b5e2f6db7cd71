"""Zeros stay zero in anybody's optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sculpt

PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.ones(4)}
MASKS = {"kernel": np.arange(12).reshape(3, 4) % 3 > 0, "bias": np.asarray([True, False, True, True])}
OPTIMIZERS = {
    "momentum and L2": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9, nesterov=True)),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01),
    "adafactor": optax.adafactor(0.01),
}


def loss(params: Any) -> jax.Array:
    return jnp.square(jnp.arange(3, dtype=jnp.float32) @ params["kernel"] + params["bias"] - 2.0).sum()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_exactly_zero_after_every_step_and_the_others_learn(name: str) -> None:
    optimizer = optax.chain(OPTIMIZERS[name], sculpt.hold_zeros(MASKS))
    params, state = PARAMS, optimizer.init(PARAMS)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # some of optax's own do not pass strict promotion
        losses = []
        for _ in range(8):
            params, state = step(params, state)
            losses.append(float(loss(params)))
            for leaf, mask in MASKS.items():
                assert not np.asarray(params[leaf])[~mask].any()
                assert np.asarray(params[leaf])[mask].all()
    assert losses[-1] < losses[0]


def test_updates_of_a_lower_precision_leave_exact_zeros() -> None:
    held = sculpt.hold_zeros(MASKS)
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 0.1, jnp.bfloat16), PARAMS)
    new = optax.apply_updates(PARAMS, held.update(updates, held.init(PARAMS), PARAMS)[0])
    assert not np.asarray(new["kernel"])[~MASKS["kernel"]].any()  # type: ignore[index]
    assert new["kernel"].dtype == jnp.float32  # type: ignore[index]


def test_what_does_not_fit_is_refused() -> None:
    held = sculpt.hold_zeros(MASKS)
    with pytest.raises(ValueError, match="masks must be a pytree like params"):
        held.init({"kernel": PARAMS["kernel"]})
    with pytest.raises(ValueError, match="expected a boolean mask"):
        sculpt.hold_zeros(jax.tree.map(lambda x: x.astype(float), MASKS)).init(PARAMS)
    with pytest.raises(ValueError, match="needs the parameters"):
        held.update(PARAMS, held.init(PARAMS))

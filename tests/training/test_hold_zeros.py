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


def _normalised(params: Any) -> jax.Array:
    """A loss whose gradient is NaN at columns of zeros."""
    kernel = params["kernel"] / (jnp.linalg.norm(params["kernel"], axis=0, keepdims=True) + 1e-6)
    return jnp.square(kernel.sum(0) + params["bias"] - 2.0).sum()


COLUMNS = {"kernel": np.ones((3, 4), bool) & (np.arange(4) > 1), "bias": np.arange(4) > 1}
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))


@pytest.mark.slow
def test_gradients_at_pruned_weights_stay_out_of_the_optimizer() -> None:
    pruned = jax.tree.map(lambda w, m: jnp.where(m, w, 0.0), PARAMS, COLUMNS)
    held = sculpt.hold_zeros(COLUMNS, CLIPPED)
    gradients = jax.grad(_normalised)(pruned)
    assert np.isnan(gradients["kernel"][:, :2]).all()
    updates, _ = jax.jit(held.update)(gradients, held.init(pruned), pruned)

    # The same step of the network without its pruned columns.
    small = jax.tree.map(lambda w: w[..., 2:], PARAMS)
    wanted: Any = CLIPPED.update(jax.grad(_normalised)(small), CLIPPED.init(small), small)[0]
    for leaf, update in updates.items():
        np.testing.assert_allclose(update[..., 2:], wanted[leaf], atol=1e-6)
        assert not np.asarray(update[..., :2]).any()


def test_pruned_weights_do_not_count_in_what_the_optimizer_does_with_weights() -> None:
    # LARS scales each array's update by the norm of its weights.
    updates = jax.tree.map(jnp.ones_like, PARAMS)
    held = sculpt.hold_zeros(COLUMNS, optax.scale_by_trust_ratio())
    found: Any = held.update(updates, held.init(PARAMS), PARAMS)[0]
    zeroed = jax.tree.map(lambda w, m: jnp.where(m, w, 0.0), PARAMS, COLUMNS)
    wanted: Any = held.update(updates, held.init(zeroed), zeroed)[0]
    np.testing.assert_allclose(found["kernel"][:, 2:], wanted["kernel"][:, 2:])
    np.testing.assert_array_equal(found["kernel"][:, :2], -PARAMS["kernel"][:, :2])


def test_a_last_link_skips_steps_that_are_not_finite_and_counts_them() -> None:
    optimizer = optax.chain(CLIPPED, sculpt.hold_zeros(COLUMNS))
    params = jax.tree.map(lambda w, m: jnp.where(m, w, 0.0), PARAMS, COLUMNS)
    state = optimizer.init(params)
    with pytest.warns(RuntimeWarning, match=r"hold_zeros\(masks, inner=optax.chain"):
        updates, state = optimizer.update(jax.grad(_normalised)(params), state, params)
    updates, state = jax.jit(optimizer.update)(jax.grad(_normalised)(params), state, params)
    assert all(not np.asarray(update).any() for update in updates.values())
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 2


def test_arguments_of_the_inner_optimizer_go_through() -> None:
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    held = sculpt.hold_zeros(COLUMNS, inner)
    with jax.numpy_dtype_promotion("standard"):
        held.update(PARAMS, held.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    with pytest.raises(ValueError, match="inner must be an optax optimizer"):
        sculpt.hold_zeros(COLUMNS, 0.1)  # type: ignore[arg-type]

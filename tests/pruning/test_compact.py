"""Compaction is checked as strictly as the network computes, and by the masks that it is given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.model import Model
from sculpt.pruning.compaction import plan as compact_plan
from tests.architectures import ARCHITECTURES


def dense(middle: Any = jax.nn.relu, scale: float = 1.0, **options: Any) -> Model:
    """Eight hidden units between three inputs and four logits."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "a": jax.random.normal(keys[0], (3, 8)),
        "b": jax.random.normal(keys[1], (8, 4)),
        "c": jnp.ones(8),
    }
    return sculpt.from_function(
        lambda p, x: scale * (middle(x @ p["a"] + p["c"][None]) @ p["b"]), params, **options
    )


def halved(model: Model, x: Any = None) -> tuple[sculpt.Space, np.ndarray, Model]:
    """Its space, a policy that keeps half of the units, and the masked model."""
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 3)) if x is None else x), ("channels",))
    policy = np.asarray([4] * space.num_sites)
    return space, policy, sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))


class Half(nn.Module):
    """Convolutions and BatchNorm in bfloat16."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for _ in range(3):
            x = nn.Conv(16, (3, 3), dtype=jnp.bfloat16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=jnp.bfloat16)(x))
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.mark.slow
def test_networks_in_half_precision_are_compared_by_its_roundings() -> None:
    network = Half()
    x = jnp.zeros((1, 8, 8, 3))
    with jax.numpy_dtype_promotion("standard"):
        model = sculpt.from_linen(network, jax.jit(network.init)(jax.random.key(0), x))
        space, policy, masked = halved(model, x)
        small = sculpt.compact(masked, space, policy)
    assert small.params["Conv_1"]["kernel"].shape[2] == 8


def test_small_outputs_are_compared_as_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(scale=1e-6)
    space, policy, masked = halved(model)
    sculpt.compact(masked, space, policy)
    right = compact_plan.sliced
    monkeypatch.setattr(compact_plan, "sliced", lambda leaf, keep: 1.001 * right(leaf, keep))
    with pytest.raises(ValueError, match=r"outputs differ by .* of the largest output"):
        sculpt.compact(masked, space, policy)


def test_equal_infinities_are_no_difference() -> None:
    model = dense()
    apply = model.apply

    def some_infinite(params: Any, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.arange(4)[None] < 2, apply(params, {}, x), -jnp.inf)

    space, policy, masked = halved(sculpt.from_function(some_infinite, model.params))
    small = sculpt.compact(masked, space, policy)
    assert small.params["a"].shape == (3, 4)


def test_masks_that_are_given_decide_where_training_silenced_a_unit() -> None:
    model = dense()
    space, policy, masked = halved(model)
    masks = sculpt.make_masks(space, model.params, policy)
    unit = int(np.flatnonzero(np.asarray(masks["c"]))[-1])
    params = {
        **masked.params,
        "a": masked.params["a"].at[:, unit].set(0),
        "b": masked.params["b"].at[unit].set(0),
    }
    tuned = masked.replace(params=params)
    small = sculpt.compact(tuned, space, policy, masks=masks)
    assert small.params["c"].shape == (4,)
    with pytest.raises(ValueError, match="masks must be a pytree like params"):
        sculpt.compact(tuned, space, policy, masks={})


def test_a_training_program_that_mixes_pruned_units_is_refused_when_it_is_run() -> None:
    def train(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ params["a"] + params["c"][None])
        weights = jnp.exp(hidden) * jnp.arange(hidden.shape[-1], dtype=hidden.dtype)[None]
        return (hidden @ params["b"]) / weights.mean(-1, keepdims=True)

    space, policy, masked = halved(dense(apply_train=train))
    small = sculpt.compact(masked, space, policy)
    x = jnp.ones((2, 3))
    small(x)
    with pytest.raises(ValueError, match=r"cannot do so in training mode: .*summed over while not zero"):
        small.apply_train(small.params, small.state, x, jax.random.key(0))


@pytest.mark.parametrize("round_to", [1, 2, 16, 24])
def test_kept_counts_are_multiples(round_to: int) -> None:
    params = {"a": jnp.ones((3, 64)), "b": jnp.ones((64, 2))}
    model = sculpt.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 3))), round_to=round_to)
    counts = [option.counts[0] for option in space.sites[0].options]
    assert counts[0] == 64 and len(counts) > 1 and all(count % round_to == 0 for count in counts[1:])


def test_policies_may_be_lists() -> None:
    model = dense()
    space, policy, _ = halved(model)
    from_list = sculpt.make_masks(space, model.params, policy.tolist())
    assert np.array_equal(from_list["c"], sculpt.make_masks(space, model.params, policy)["c"])
    assert float(sculpt.cost(space, policy.tolist()).macs) == float(sculpt.cost(space, policy).macs)


@pytest.mark.slow
def test_a_compact_network_that_starts_from_zeros_can_be_pruned_again() -> None:
    """Zeros of the dense width are a table, cut when the program runs: that they stay zero is to be seen."""
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (3, 8)), "b": jax.random.normal(keys[1], (8, 2))}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.zeros((x.shape[0], 8)) + x @ params["a"]
        return (hidden / jnp.sqrt(jnp.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)) @ params["b"]

    model = sculpt.from_function(apply, params)
    space, policy, masked = halved(model)
    small = sculpt.compact(masked, space, policy)
    again = sculpt.make_space(sculpt.trace(small, jnp.zeros((1, 3))), ("channels",))
    assert [group.size for group in again.trace.groups] == [4]
    last = [len(again.sites[0].options) - 1]
    smaller = sculpt.compact(
        sculpt.apply_masks(small, sculpt.make_masks(again, small.params, last)), again, last
    )
    assert smaller.params["a"].shape == (3, 1)


@pytest.mark.slow
def test_windows_of_a_kernel_whose_axis_of_size_one_moves_become_smaller() -> None:
    case = ARCHITECTURES["turned_depthwise"]
    model = case.build(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, case.example_input), ("rect",))
    assert [site.name for site in space.sites] == ["stem", "depthwise"]
    policy = space.num_options - 1
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy)
    kernel, before = small.params["depthwise"], model.params["depthwise"]
    assert kernel.size < before.size and kernel.shape[2:] == before.shape[2:] == (6, 1)
    x = case.inputs(3)
    assert jnp.allclose(small(x), masked(x), atol=1e-6) and not jnp.allclose(small(x), model(x), atol=1e-2)

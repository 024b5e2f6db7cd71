from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.ir.program import flatten
from sculpt.model import Model
from tests.architectures.architecture import from_linen
from tests.architectures.equality import distance, outputs
from tests.networks import NETWORKS, network

IMAGES = jax.random.normal(jax.random.key(11), (4, 8, 8, 3))


@functools.cache
def folded(name: str) -> Model:
    return sculpt.fold(network(name), IMAGES)


def operations(model: Model, x: jax.Array = IMAGES) -> list[str]:
    """Primitives of the evaluation program."""
    return [eqn.name for eqn in flatten(model.apply, model.params, model.state, x).equations]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.fast("plain", "concatenated", "dilated", "function")
def test_folded_equals_dense_at_any_batch(name: str) -> None:
    expected = outputs(network(name), IMAGES)
    for batch in (4, 1):
        assert distance(expected[:batch], outputs(folded(name), IMAGES[:batch])) <= 1e-5


def test_nothing_is_left_of_batch_norm() -> None:
    model = folded("plain")
    assert sorted(model.params) == sorted(
        f"{layer}/{part}" for layer in ("Conv_0", "Conv_1", "Dense_0") for part in ("bias", "kernel")
    )
    assert model.state == {}
    found = operations(model)
    assert not {"rsqrt", "mul", "sub"} & set(found)
    assert found.count("add") == 3  # a bias for each layer
    assert sum(w.size for w in jax.tree.leaves(model.params)) < sum(
        w.size for w in jax.tree.leaves((network("plain").params, network("plain").state))
    )


def test_the_arithmetic_of_one_layer() -> None:
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, epsilon=1e-3)(nn.Conv(6, (3, 3))(x)).mean(
                (1, 2)
            )

    model = from_linen(Normed())(jax.random.key(0))
    kernel, bias = (np.asarray(model.params["Conv_0"][n], np.float64) for n in ("kernel", "bias"))
    norm = {
        n: np.asarray(a, np.float64)
        for n, a in {**model.params["BatchNorm_0"], **model.state["batch_stats"]["BatchNorm_0"]}.items()
    }
    factor = norm["scale"] / np.sqrt(norm["var"] + 1e-3)
    found = sculpt.fold(model, IMAGES).params
    np.testing.assert_allclose(found["Conv_0/kernel"], kernel * factor, rtol=1e-6)
    expected = norm["bias"] + (bias - norm["mean"]) * factor
    np.testing.assert_allclose(np.ravel(found["Conv_0/bias"]), expected, rtol=1e-5, atol=1e-6)


def chain(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = jnp.einsum("nc,cok->nok", x, params["w"])
    y = 2.0 - (-(y / params["a"][None]) + params["b"][None, :, None]) * 3.0
    return y.reshape(x.shape[0], -1)


def test_kernels_of_half_precision_stay_where_sums_are_in_full() -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x.astype(jnp.bfloat16),
            params["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=layout,
            preferred_element_type=jnp.float32,
        )
        y = jax.nn.relu(y * params["scale"][None, None, None] + params["shift"][None, None, None])
        return y.mean((1, 2)) @ params["head"]

    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 3, 8), "scale": (8,), "shift": (8,), "head": (8, 5)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    model = sculpt.from_function(apply, params | {"kernel": params["kernel"].astype(jnp.bfloat16)})
    found = sculpt.fold(model, IMAGES)(IMAGES)
    np.testing.assert_allclose(found, model(IMAGES), rtol=1e-5, atol=1e-5)


def test_chains_of_any_scales_and_shifts() -> None:
    shapes = {"w": (5, 3, 4), "a": (3, 4), "b": (3,)}
    keys = jax.random.split(jax.random.key(3), 3)
    params = {n: 1.0 + 0.2 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    model, x = sculpt.from_function(chain, params), jax.random.normal(jax.random.key(4), (6, 5))
    small = sculpt.fold(model, x)
    assert operations(small, x) == ["dot_general", "add", "reshape"]
    assert distance(outputs(model, x), outputs(small, x)) <= 1e-6


def test_what_others_read_is_not_absorbed() -> None:
    def forked(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = x @ params["w"]
        return y * 3.0 + jnp.tanh(y)

    x = jax.random.normal(jax.random.key(4), (6, 5))
    model = sculpt.from_function(forked, {"w": jnp.ones((5, 4))})
    small = sculpt.fold(model, x)
    assert operations(small, x) == ["dot_general", "mul", "tanh", "add"]
    assert distance(outputs(model, x), outputs(small, x)) == 0.0


def test_scales_that_differ_along_other_axes_stay() -> None:
    def positional(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return ((x @ params["w"]) * params["p"][None]).sum(1)

    x = jax.random.normal(jax.random.key(4), (6, 3, 5))
    model = sculpt.from_function(positional, {"w": jnp.ones((5, 4)), "p": jnp.arange(12.0).reshape(3, 4)})
    assert "mul" in operations(sculpt.fold(model, x), x)


def test_half_precision_is_not_rounded_again() -> None:
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.Conv(6, (3, 3), dtype=jnp.bfloat16)(x)
            return nn.Dense(4, dtype=jnp.bfloat16)(nn.relu(x * jnp.bfloat16(1.7)).reshape(x.shape[0], -1))

    model = from_linen(Half())(jax.random.key(0))
    small = sculpt.fold(model, IMAGES)
    np.testing.assert_array_equal(outputs(model, IMAGES), outputs(small, IMAGES))


@pytest.mark.slow
def test_a_folded_network_is_exported_traced_and_pruned_like_any_other() -> None:
    model = folded("residual")
    space = sculpt.make_space(sculpt.trace(model, IMAGES))
    dense = sculpt.trace(network("residual"), IMAGES)
    assert space.trace.macs == dense.macs
    assert len(space.trace.groups) == len(dense.groups)
    policy = sculpt.random_policies(space, jax.random.key(1), 1, budget=0.6)[0]
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy)
    assert distance(outputs(masked, IMAGES), outputs(small, IMAGES)) <= 1e-5


@pytest.mark.slow
def test_compact_networks_fold_too() -> None:
    model = network("residual")
    space = sculpt.make_space(sculpt.trace(model, IMAGES))
    policy = sculpt.random_policies(space, jax.random.key(1), 1, budget=0.6)[0]
    small = sculpt.compact(
        sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy)), space, policy
    )
    assert distance(outputs(small, IMAGES), outputs(sculpt.fold(small, IMAGES), IMAGES)) <= 1e-5
    assert "rsqrt" not in operations(sculpt.fold(small, IMAGES))


def test_loops_and_the_batch_size_as_a_number() -> None:
    def looped(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def step(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(carry @ params["w"]) + jnp.zeros((carry.shape[0], 5)), None

        return jax.lax.scan(step, x, None, length=3)[0] / jnp.float32(x.shape[0])

    model = sculpt.from_function(looped, {"w": jax.random.normal(jax.random.key(1), (5, 5))})
    small = sculpt.fold(model, jnp.zeros((2, 5)))
    for batch in (1, 6):
        x = jax.random.normal(jax.random.key(4), (batch, 5))
        assert distance(outputs(model, x), outputs(small, x)) <= 1e-6


def test_the_folded_program_is_exported_with_an_open_batch(tmp_path: object) -> None:
    exported = sculpt.export_stablehlo(folded("plain"), f"{tmp_path}/folded.stablehlo", IMAGES)
    assert exported.batch is None


def test_keys_of_the_network_itself() -> None:
    def noisy(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x @ params["w"] + jax.random.normal(jax.random.key(3), (x.shape[0], 4))

    model, x = sculpt.from_function(noisy, {"w": jnp.ones((5, 4))}), jnp.ones((2, 5))
    assert distance(outputs(model, x), outputs(sculpt.fold(model, x), x)) <= 1e-6


def test_errors() -> None:
    model = folded("plain")
    with pytest.raises(ValueError, match="no training mode"):
        model.apply_train(model.params, model.state, IMAGES, jax.random.key(0))
    with pytest.raises(ValueError, match=r"takes float32\[batch, 8, 8, 3\], got float32\[4, 6, 6, 3\]"):
        model(IMAGES[:, :6, :6])
    with pytest.raises(ValueError, match="does not take the example input"):
        sculpt.fold(network("plain"), jnp.zeros((2, 8)))
    with pytest.raises(ValueError, match=r"\[batch, \.\.\.\]"):
        sculpt.fold(network("plain"), jnp.float32(1))
    two = sculpt.from_function(lambda p, x: (x @ p, x), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="returns one array"):
        sculpt.fold(two, jnp.ones((2, 3)))


class Blocks(nn.Module):
    """Two residual blocks of convolutions wide enough for groups."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def normed(x: jax.Array) -> jax.Array:
            x = nn.Conv(32, (3, 3), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

        x = normed(x)
        for _ in range(2):
            x = nn.relu(x + normed(nn.relu(normed(x))))
        return nn.Dense(5)(x.mean((1, 2)))


def in_groups(option: int) -> tuple[Model, Model]:
    """Masked and compact: an option of `rect_grouped` for all convolutions but the first."""
    model = from_linen(Blocks())(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, IMAGES), "rect_grouped")
    policy = np.asarray([0, *[option] * (space.num_sites - 1)], np.int32)
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    return masked, sculpt.compact(masked, space, policy)


@pytest.mark.slow
def test_batch_norm_behind_groups_of_filters() -> None:
    """It goes into each group. Channels stand in the order of the groups, where only the second block's sum has one already."""
    masked, small = in_groups(4)
    before = operations(small)
    assert before.count("concatenate") == before.count("conv_general_dilated") - 5 == 4
    after = sculpt.fold(small, IMAGES)
    found = operations(after)
    assert not {"rsqrt", "mul", "sub"} & set(found) and found.count("gather") == 1
    assert found.count("add") == 9 + 2 + 1  # a bias for each convolution, the sums, the head's
    assert distance(outputs(masked, IMAGES), outputs(after, IMAGES)) <= 1e-5


@pytest.mark.slow
def test_batch_norm_behind_filters_that_keep_nothing() -> None:
    masked, small = in_groups(5)
    after = sculpt.fold(small, IMAGES)
    for x in (IMAGES, IMAGES[:1]):
        assert distance(outputs(masked, x), outputs(after, x)) <= 1e-5
    program = flatten(after.apply, after.params, after.state, IMAGES)
    assert "mul" not in [eqn.name for eqn in program.equations]


def test_what_others_read_stays_behind_a_concatenation() -> None:
    """Scales go no further than they may: not into a layer whose output is read twice, nor into anything but a layer."""

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        first, second = x @ params["first"], x @ params["second"]
        joined = jnp.concatenate([first, second], 1) * params["scale"] + params["shift"]
        other = jnp.concatenate([x @ params["third"], jnp.tanh(x)], 1) * params["scale"]
        return joined + other + jnp.concatenate([first, x], 1)

    shapes = {"first": (6, 6), "second": (6, 6), "third": (6, 6), "scale": (1, 12), "shift": (1, 12)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    model, x = sculpt.from_function(apply, params), jax.random.normal(jax.random.key(1), (4, 6))
    after = sculpt.fold(model, x)
    assert operations(after, x).count("mul") == 2
    assert distance(outputs(model, x), outputs(after, x)) <= 1e-5

"""The contract over the CIFAR ResNets: everything between input and output can be pruned, exactly."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt import nets
from sculpt.model import Model
from tests.architectures.architecture import IMAGE, draw
from tests.architectures.equality import (
    Pruned,
    drawn_importance,
    drawn_policy,
    in_double,
    leanest_policy,
    prune,
)

WIDTHS = (4, 6, 8)
"""Narrow stages: the same program as at full width, and quick."""

small_nets = pytest.mark.parametrize("name", ["resnet8", pytest.param("resnet20", marks=pytest.mark.slow)])
NAMES = [name for name in nets.list_models() if isinstance(nets.create(name, 10), nets.CifarResNet)]
deep_nets = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in NAMES])


def abstract(name: str) -> Model:
    """The network at full width, its arrays shapes only."""
    module = nets.create(name, num_classes=10)
    return sculpt.from_linen(module, jax.eval_shape(module.init, jax.random.key(0), IMAGE))


@functools.cache
def narrow(name: str) -> Model:
    module = nets.create(name, num_classes=5, widths=WIDTHS)
    return sculpt.from_linen(
        module, draw(jax.eval_shape(module.init, jax.random.key(0), IMAGE), jax.random.key(3))
    )


@functools.cache
def space_of(name: str, families: tuple[str, ...] = ("channels",)) -> sculpt.Space:
    trace = sculpt.trace(narrow(name), IMAGE)
    return sculpt.make_space(trace, families, importance=drawn_importance(trace, 5))


def pruned(name: str, seed: int) -> Pruned:
    space = space_of(name, ("channels", "rect"))
    return prune(narrow(name), space, drawn_policy(space, seed))


def images(dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((3, *IMAGE.shape[1:])), dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.fast("resnet8", "resnet20", "resnet32")
def test_only_the_input_the_output_and_windows_stay_whole(name: str) -> None:
    trace = sculpt.trace(abstract(name), IMAGE)
    frozen = {row.name: row.reason for row in trace.frozen}
    windows = {f"{layer.name}/kernel:{axis}" for layer in trace.layers for axis in layer.window_axes}
    assert {n for n, reason in frozen.items() if reason.startswith("window of a convolution")} == windows
    # The list of all that cannot be pruned otherwise.
    assert {n: frozen[n] for n in frozen.keys() - windows} == {
        "stem_conv/kernel:2": "network input",
        "head/kernel:1": "network output",
        "head/bias:0": "network output",
    }
    free = {slot for group in trace.groups for slot in group.slots}
    for layer in trace.layers:
        *_, before, after = range(len(trace.leaves[layer.leaf].shape))
        assert (layer.leaf, before) in free or layer.name == "stem_conv"
        assert (layer.leaf, after) in free or layer.name == "head"
    blocks = (len(trace.layers) - 2) // 2
    assert len(trace.layers) == int(name.removeprefix("resnet"))
    # Inside each block one; the streams of the stages, of which two start with padding on either side.
    assert sorted(group.size for group in trace.groups) == sorted(
        [n for n in (16, 32, 64) for _ in range(blocks // 3)] + [16, 8, 8, 16, 16]
    )


@small_nets
@pytest.mark.slow
def test_masked_equals_compacted(name: str) -> None:
    both = pruned(name, 1)
    both.assert_same_outputs(images())
    both.assert_claimed_cost(images())
    prune(narrow(name), space_of(name), leanest_policy(space_of(name))).assert_same_outputs(images())


@deep_nets
def test_gradients_agree_on_what_survives(name: str) -> None:
    pruned(name, 1).assert_same_gradients(images(), training=True)


@deep_nets
def test_deep_networks_compact_exactly_in_double_precision(name: str) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model, space = in_double(narrow(name)), space_of(name)
        for policy in (drawn_policy(space, 3), leanest_policy(space)):
            both = prune(model, space, policy)
            assert both.assert_same_outputs(images("float64"), 1e-10).dtype == np.float64

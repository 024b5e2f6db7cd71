"""Every network can be pruned everywhere between its input and its output, and compaction is exact."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt import nets
from sculpt.model import Model
from sculpt.nets.mobilenet_v3 import BlockRow
from sculpt.pipeline.closing import theoretical_macs
from tests.architectures.architecture import draw
from tests.architectures.equality import (
    drawn_importance,
    drawn_policy,
    in_double,
    leanest_policy,
    prune,
)
from tests.nets.test_models import slow_where_only_the_size_differs
from tests.networks import slow_but

HEADS = ("head", "distillation_head")

# The same blocks, few and narrow: options and side of the image.
NARROW: dict[str, tuple[dict[str, Any], int]] = {
    "resnet8_mlperf": ({"widths": (4, 6)}, 8),
    "resnet18": ({"width": 4, "depths": (1, 1)}, 16),
    "resnet50": ({"width": 4, "depths": (1, 1)}, 16),
    "vgg16_bn": ({"widths": (4, 6), "depths": (1, 2), "hidden": (7, 6), "pool": 3, "dropout": 0.0}, 8),
    "vgg16_bn_cifar": ({"widths": (4, 6), "depths": (1, 2), "dropout": 0.0}, 4),
    "mobilenet_v1": (
        {"width_multiplier": 0.25, "blocks": ((16, 1), (32, 2), (32, 1)), "dropout": 0.0},
        8,
    ),
    "mobilenet_v2": (
        {
            "width_multiplier": 0.25,
            "stages": ((1, 3, 16, 1, 1), (2, 3, 24, 2, 2)),
            "last": 12,
            "dropout": 0.0,
        },
        8,
    ),
    "mobilenet_v3_small": (
        {
            "rows": (
                BlockRow(3, 16, 8, True, False, 2),
                BlockRow(5, 12, 8, True, True, 1),
                BlockRow(3, 10, 6, False, True, 1),
            ),
            "hidden": 10,
            "dropout": 0.0,
        },
        16,
    ),
    "efficientnet_lite0": ({"stages": ((1, 3, 8, 1, 1), (2, 5, 8, 2, 2)), "last": 12, "dropout": 0.0}, 8),
    "vit_tiny_patch4": ({"width": 12, "heads": 3, "depth": 2, "hidden": 10}, 8),
    "deit_tiny_distilled_patch16": ({"width": 12, "heads": 3, "depth": 1, "hidden": 10, "patch": 4}, 8),
}

each = pytest.mark.parametrize("name", NARROW)


@functools.cache
def narrow(name: str) -> Model:
    options, _ = NARROW[name]
    module = nets.create(name, num_classes=5, **options)
    return sculpt.from_linen(
        module, draw(jax.eval_shape(module.init, jax.random.key(0), image(name)), jax.random.key(3))
    )


def image(name: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, NARROW[name][1], NARROW[name][1], 3), jnp.float32)


def images(name: str, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((3, *image(name).shape[1:])), dtype)


@functools.cache
def space_of(name: str) -> sculpt.Space:
    trace = sculpt.trace(narrow(name), image(name))
    return sculpt.make_space(trace, ("channels", "rect"), importance=drawn_importance(trace, 5))


@pytest.mark.parametrize("name", slow_where_only_the_size_differs(nets.list_models()))
@pytest.mark.fast(
    "resnet8", "resnet20", "resnet18", "resnet8_mlperf", "vgg16_bn", "vgg16_bn_cifar", "mobilenet_v1"
)
def test_every_width_but_input_and_output_is_free(name: str) -> None:
    side = min(32, nets.image_size(name))
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    module = nets.create(name, num_classes=10)
    trace = sculpt.trace(sculpt.from_linen(module, jax.eval_shape(module.init, jax.random.key(0), x)), x)
    first = trace.layers[0]
    fixed = {(first.leaf, len(trace.leaves[first.leaf].shape) - 2): "network input"}
    for leaf in trace.leaves:
        owner, _, part = leaf.path.rpartition("/")
        if owner in HEADS:
            fixed[leaf.index, 1 if part == "kernel" else 0] = "network output"
    tokens = {leaf.index for leaf in trace.leaves if leaf.path == "position"}
    frozen = {(row.leaf, row.axis): row.reason for row in trace.frozen}
    others = {
        slot: reason
        for slot, reason in frozen.items()
        if not reason.startswith(("window of a convolution", "size one")) and slot[0] not in tokens
    }
    assert others == fixed
    free = {slot for group in trace.groups for slot in group.slots}
    for layer in trace.layers:
        shape = trace.leaves[layer.leaf].shape
        widths = [a for a in range(len(shape)) if a not in layer.window_axes and shape[a] > 1]
        assert len(widths) >= 1
        assert {(layer.leaf, axis) for axis in widths} <= free | set(fixed), layer.name
    assert sculpt.make_space(trace).num_sites >= len(trace.groups)


@slow_but("resnet50", "mobilenet_v2", "mobilenet_v3_small", "deit_tiny_distilled_patch16", among=NARROW)
@pytest.mark.slow
def test_masked_equals_compacted(name: str) -> None:
    same_in_double(name, drawn_policy(space_of(name), 1))


@pytest.mark.slow
@each
def test_masked_equals_compacted_when_little_is_left(name: str) -> None:
    same_in_double(name, leanest_policy(space_of(name)))


def same_in_double(name: str, policy: np.ndarray) -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = images(name, "float64")
        both = prune(in_double(narrow(name)), space_of(name), policy)
        assert both.assert_same_outputs(x, 1e-10).dtype == np.float64
        claimed = sculpt.cost(space_of(name), policy)
        macs, params = sculpt.count_cost(both.small, x)
    assert float(claimed.macs_realised) == pytest.approx(macs, rel=1e-5)
    assert float(claimed.macs) == pytest.approx(
        theoretical_macs(space_of(name), policy, both.masks), rel=1e-5
    )
    assert float(claimed.params) == pytest.approx(params, rel=1e-5)


@pytest.mark.slow
@each
def test_cost_and_gradients_agree_on_what_survives(name: str) -> None:
    both = prune(narrow(name), space_of(name), drawn_policy(space_of(name), 2))
    both.assert_claimed_cost(images(name))
    both.assert_counted_by_xla(images(name))
    both.assert_same_gradients(images(name), training=True)

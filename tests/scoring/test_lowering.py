"""Convolutions as matrix products, and in half precision, give what XLA's own convolutions give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import sculpt
from sculpt.scoring import precision_gap
from sculpt.scoring.lowering import lowered
from sculpt.tracing.program import flatten
from tests.networks import network, traced


def names(function: object, *arguments: object) -> list[str]:
    """Operations of a flattened function."""
    return [eqn.name for eqn in flatten(function, *arguments).equations]  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((1, 0), (-1, 2))]),
    layout=st.sampled_from([("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OHWI", "NCHW")]),
)
def test_im2col_is_the_same_convolution(
    size: tuple[int, int],
    window: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
    padding: object,
    layout: tuple[str, str, str],
) -> None:
    def permuted(shape: dict[str, int], letters: str) -> tuple[int, ...]:
        return tuple(shape[letter] for letter in letters)

    image = {"N": 2, "C": 3, "H": size[0], "W": size[1]}
    kernel = {"I": 3, "O": 4, "H": window[0], "W": window[1]}
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=permuted(image, layout[0])), jnp.float32)
    w = jnp.asarray(rng.normal(size=permuted(kernel, layout[1])), jnp.float32)

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, strides, padding, None, dilation, layout)  # type: ignore[arg-type]

    changed = lowered(convolve, "im2col", "float32")
    assert "conv_general_dilated" not in names(changed, x, w)
    np.testing.assert_allclose(changed(x, w), convolve(x, w), atol=1e-5, rtol=1e-5)


def test_what_is_no_matrix_product_stays_a_convolution() -> None:
    x, w = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 1, 4))

    def depthwise(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )

    assert "conv_general_dilated" in names(lowered(depthwise, "im2col", "float32"), x, w)


def test_nothing_to_change_is_the_function_itself() -> None:
    model = network("plain")
    assert lowered(model.apply, "lax", "float32") is model.apply


class Looped(nn.Module):
    """Convolutions under a scan over layers."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train

        def layer(module: nn.Conv, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return nn.relu(module(x)), None

        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(nn.Conv(3, (3, 3)), x, None)
        return nn.Dense(5)(x.mean((1, 2)))


def test_operations_inside_loops_change_too() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    model = sculpt.from_linen(Looped(), Looped().init(jax.random.key(1), x))
    for convolution, precision, tolerance in (("im2col", "float32", 1e-5), ("lax", "bfloat16", 3e-2)):
        changed = lowered(model.apply, convolution, precision)  # type: ignore[arg-type]
        text = str(jax.make_jaxpr(changed)(model.params, model.state, x))
        assert ("conv_general_dilated" in text) == (convolution == "lax")
        assert ("bf16" in text) == (precision == "bfloat16")
        np.testing.assert_allclose(
            changed(model.params, model.state, x), model(x), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("convolution", ["lax", "im2col"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_half_precision_changes_scores_a_little(convolution: str, chunk: int) -> None:
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    labels = jax.random.randint(jax.random.key(1), (64,), 0, 5)
    space = sculpt.make_space(traced("residual"))
    policies = sculpt.random_policies(space, jax.random.key(2), 4)
    plan = sculpt.EvaluationPlan(policies_per_chunk=chunk, convolution=convolution, precision="bfloat16")  # type: ignore[arg-type]
    gap = precision_gap(network("residual"), space, policies, images, labels, images, plan)
    assert 0 < gap.loss <= 0.05 and 0 <= gap.accuracy <= 0.1
    assert (gap.policies, gap.images) == (4, 64)

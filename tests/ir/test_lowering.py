"""Convolutions as matrix products, and in half precision, give what XLA's own convolutions give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import sculpt
from sculpt.ir import lowering
from sculpt.ir.lowering import lowered
from sculpt.ir.program import flatten
from sculpt.scoring.precision import precision_gap
from tests.networks import network, traced


def names(function: object, *arguments: object) -> list[str]:
    """Operations of a flattened function."""
    return [eqn.name for eqn in flatten(function, *arguments).equations]  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([("im2col", 1, 4), ("lax", 3, 3), ("lax", 3, 6)]),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((1, 0), (-1, 2))]),
    layout=st.sampled_from([("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OHWI", "NCHW")]),
)
@pytest.mark.slow
def test_matrix_products_and_sums_of_shifts_are_the_same_convolution(
    kind: tuple[lowering.Convolution, int, int],
    size: tuple[int, int],
    window: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
    padding: Any,
    layout: tuple[str, str, str],
) -> None:
    """Of three channels, together or (depthwise, on CPUs) each by itself."""
    convolution, groups, outputs = kind
    image = {"N": 2, "C": 3, "H": size[0], "W": size[1]}
    kernel = {"I": 3 // groups, "O": outputs, "H": window[0], "W": window[1]}
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=[image[letter] for letter in layout[0]]), jnp.float32)
    w = jnp.asarray(rng.normal(size=[kernel[letter] for letter in layout[1]]), jnp.float32)

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, None, dilation, layout, feature_group_count=groups
        )

    changed = lowered(convolve, convolution, "float32")
    assert "conv_general_dilated" not in names(changed, x, w)
    np.testing.assert_allclose(changed(x, w), convolve(x, w), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_gradients_of_a_mobile_network_are_those_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("separable")
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))

    def loss(params: object) -> jax.Array:
        apply = lowered(model.apply_train, "lax", "float32")
        logits, _ = apply(params, model.state, images, jax.random.key(1))
        return jnp.square(logits).sum()

    ours = jax.jit(jax.grad(loss))(model.params)
    monkeypatch.setattr(lowering, "_is_depthwise", lambda *_: False)
    xla = jax.jit(jax.grad(loss))(model.params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xla), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max() + 1e-6))


@jax.custom_vjp
def rounded(x: jax.Array) -> jax.Array:
    """Rounds; its derivative is that of the identity."""
    return jnp.round(x)


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


@jax.custom_vjp
def filtered(x: jax.Array, w: jax.Array) -> jax.Array:
    """A depthwise convolution that says its derivative is thrice what it is."""
    return depthwise(x, w)


def _thrice(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(3 * d for d in jax.vjp(depthwise, *kept)[1](g))


filtered.defvjp(lambda x, w: (depthwise(x, w), (x, w)), _thrice)


def depthwise(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize(
    ("convolution", "precision", "tolerance"),
    [("lax", "float32", 1e-4), ("im2col", "float32", 1e-4), ("lax", "bfloat16", 0.1)],
)
@pytest.mark.slow
def test_derivatives_that_functions_bring_along_are_kept(
    convolution: lowering.Convolution, precision: lowering.Precision, tolerance: float
) -> None:
    """Of relu at zero, of rounding with a straight-through gradient, of a convolution with a rule of its own."""
    x = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (1, 5, 5, 2)), jnp.float32)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 1, 2)), jnp.float32)

    def network(x: jax.Array, w: jax.Array) -> jax.Array:
        return filtered(jax.nn.relu(depthwise(jax.nn.relu(x), rounded(w))), w)

    def gradients(function: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda *a: jnp.square(function(*a)).sum(), (0, 1))(x, w)

    for ours, theirs in zip(
        gradients(lowered(network, convolution, precision)), gradients(network), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("int8", "int32"), ("bfloat16", "float32"), ("bfloat16", None), ("float32", None)]
)
@pytest.mark.fast("int8-int32", "float32-None")
def test_sums_of_shifts_are_as_exact_as_xla(dtype: str, wanted: str | None) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-99, 99, (2, 9, 3)), jnp.dtype(dtype))
    w = jnp.asarray(rng.integers(-99, 99, (5, 1, 3)), jnp.dtype(dtype))

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        preferred = None if wanted is None else jnp.dtype(wanted)
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x,
            w,
            (2,),
            "SAME",
            dimension_numbers=numbers,
            feature_group_count=3,
            preferred_element_type=preferred,
        )

    exact = convolve(x.astype(jnp.float32), w.astype(jnp.float32)) if wanted != "int32" else None
    found = lowered(convolve)(x, w)
    expected = convolve(x, w)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    reference = np.asarray(expected if exact is None else exact, np.float64)
    error, allowed = (np.abs(np.asarray(y, np.float64) - reference).max() for y in (found, expected))
    assert error <= allowed + 1e-6 * np.abs(reference).max()


def test_large_windows_are_left_to_xla() -> None:
    x = jnp.ones((1, 9, 9, 4))
    for side, replaced in ((5, True), (7, False)):
        w = jnp.ones((side, side, 1, 4))
        assert ("conv_general_dilated" not in names(lowered(depthwise), x, w)) == replaced


def test_what_is_no_matrix_product_stays_a_convolution() -> None:
    x, w = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 4))

    def grouped(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert "conv_general_dilated" in names(lowered(grouped, "im2col", "float32"), x, w)


def test_where_nothing_is_to_change_the_program_is_as_it_was() -> None:
    model = network("plain")
    arguments = model.params, model.state, jnp.zeros((2, 8, 8, 3))
    changed = lowered(model.apply, "lax", "float32")
    assert str(jax.make_jaxpr(changed)(*arguments)) == str(jax.make_jaxpr(model.apply)(*arguments))


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("convolution", "chunk"),
    [
        ("lax", 1),
        ("im2col", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lax", 2), ("im2col", 1))),
    ],
)
@pytest.mark.slow
def test_half_precision_changes_scores_a_little(convolution: str, chunk: int) -> None:
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    labels = jax.random.randint(jax.random.key(1), (64,), 0, 5)
    space = sculpt.make_space(traced("residual"))
    policies = sculpt.random_policies(space, jax.random.key(2), 4)
    plan = sculpt.EvaluationPlan(policies_per_chunk=chunk, convolution=convolution, precision="bfloat16")  # type: ignore[arg-type]
    gap = precision_gap(network("residual"), space, policies, images, labels, images, plan)
    assert 0 < gap.loss <= 0.05 and 0 <= gap.accuracy <= 0.1
    assert (gap.policies, gap.images) == (4, 64)

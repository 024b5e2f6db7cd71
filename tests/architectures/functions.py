"""Plain JAX functions: gradients of the user's own, parameters read twice, odd layouts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tests.architectures.architecture import CLASSES, SEQUENCE, Architecture, from_function


def _convolved(
    x: jax.Array, kernel: jax.Array, layout: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC")
) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _perceptron(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Dense layers on the flattened image, one kernel stored transposed."""
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["first"] + params["bias"][None])
    return jax.nn.tanh(x @ params["second"].T) @ params["head"]


def _channels_first(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Layouts NCHW and OIHW, flattened as channels x height x width."""
    layout = ("NCHW", "OIHW", "NCHW")
    y = x.transpose(0, 3, 1, 2)
    y = jax.nn.relu(_convolved(y, params["first"], layout) + params["bias"][None, :, None, None])
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 1, 4, 4), (1, 1, 4, 4), "VALID")
    y = jnp.tanh(_convolved(y, params["second"], layout))
    return jnp.einsum("nf,kf->nk", y.reshape(y.shape[0], -1), params["head"])


def _turned_depthwise(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A depthwise convolution whose kernel is kept as `[height, width, channels, 1]`, which Keras does."""
    x, kernel = jax.nn.relu(_convolved(x, params["stem"])), params["depthwise"]
    x = jax.lax.conv_general_dilated(
        x,
        kernel.reshape(3, 3, 1, kernel.shape[2]),
        (1, 1),
        "SAME",
        feature_group_count=kernel.shape[2],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jnp.tanh(x + params["bias"][None, None, None]).mean((1, 2)) @ params["head"]


@jax.custom_jvp
def leaky(x: jax.Array) -> jax.Array:
    """Relu with a slope below zero in its derivative only."""
    return jnp.maximum(x, 0.0)


@leaky.defjvp
def _leaky_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return leaky(x), jnp.where(x > 0.0, dx, 0.3 * dx)


@jax.custom_vjp
def quantised(x: jax.Array) -> jax.Array:
    """Rounded to quarters; gradients go straight through where the value is small."""
    return jnp.round(4.0 * x) / 4.0


def _quantised_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return quantised(x), x


def _quantised_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(jnp.abs(x) < 2.0, gradient, jnp.zeros_like(gradient)),)


quantised.defvjp(_quantised_forward, _quantised_backward)


def _custom_jvp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = leaky(_convolved(x, params["first"]) + params["bias"][None, None, None])
    return leaky(_convolved(x, params["second"])).mean((1, 2)) @ params["head"]


def _custom_vjp(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Weights and activations quantised, trained straight through."""
    x = quantised(_convolved(x, quantised(params["first"])) + params["bias"][None, None, None])
    return jnp.tanh(_convolved(x, quantised(params["second"]))).mean((1, 2)) @ params["head"]


def _binarised(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Signs of the weights, zero counted as positive: a masked weight becomes one, which must not reach the sum."""
    first = jnp.where(params["first"] >= 0.0, 1.0, -1.0).astype(x.dtype)
    second = jnp.where(params["second"] >= 0.0, 1.0, -1.0).astype(x.dtype)
    return jnp.tanh(jax.nn.relu(x @ first) @ second).mean(1) @ params["head"]


def _regularised(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A kernel that is convolved with and, beside that, counted: exp(0) is one at every weight that is masked."""
    y = jax.nn.relu(_convolved(x, params["first"]))
    y = _convolved(y, params["second"]) * jnp.exp(params["second"]).mean()
    return jax.nn.relu(y).mean((1, 2)) @ params["head"]


def _shared_kernel(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """One kernel as a convolution with and without dilation, and once as a matrix."""
    y = jax.nn.relu(_convolved(x, params["first"]))
    wide = jax.lax.conv_general_dilated(
        y, params["second"], (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    dense = jnp.einsum("nhwi,uvio->nhwo", y, params["second"])
    y = jax.nn.relu(_convolved(y, params["second"]) + wide + dense)
    return y.mean((1, 2)) @ params["head"]


def _low_rank(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A kernel composed of two factors, an adapter beside it, and a bias made of a product of parameters."""
    kernel = params["left"] @ params["right"] + params["full"]
    y = jax.nn.relu(x @ kernel + (params["bias"] * params["gain"])[None, None])
    return y.mean(1) @ params["head"]


def _outer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Bilinear pooling: the outer product of two feature vectors, flattened."""
    first, second = jnp.tanh(x @ params["first"]).mean(1), jnp.tanh(x @ params["second"]).mean(1)
    return (first[:, :, None] * second[:, None, :]).reshape(x.shape[0], -1) @ params["head"]


def _maxout(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Pieces of a linear layer compete: the largest of three goes on."""
    y = (x @ params["first"] + params["bias"][None, None]).reshape(*x.shape[:2], 8, 3).max(-1)
    return y.mean(1) @ params["head"]


def _normalised_kernel(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Every unit's weights of length one, without a guard against zero: a masked unit would be 0 / 0."""
    kernel = params["first"] / jnp.linalg.norm(params["first"], axis=0, keepdims=True)
    y = jax.nn.relu(x @ kernel + params["bias"][None, None])
    return jnp.tanh(y.mean(1) @ params["second"]) @ params["head"]


def _reciprocal(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The same by a reciprocal root: a masked unit would be 0 * infinity."""
    kernel = params["first"] * jax.lax.rsqrt(jnp.square(params["first"]).sum(0, keepdims=True))
    y = jax.nn.relu(x @ kernel + params["bias"][None, None])
    return jnp.tanh(y.mean(1) @ params["second"]) @ params["head"]


def _tiled(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A class token repeated for every image, and a gate of one channel repeated for all, as `jnp.tile` does it."""
    y = x @ params["embed"]
    y = jnp.concatenate([jnp.tile(params["token"][None, None], (x.shape[0], 1, 1)), y], axis=1)
    gate = jax.nn.sigmoid(y @ params["gate"])
    y = y + (jax.nn.relu(y @ params["first"]) * jnp.tile(gate, (1, 1, 10))) @ params["second"]
    return y[:, 0] @ params["head"]


class Affine(NamedTuple):
    """Weights of a layer as an object with attributes."""

    weight: Any
    bias: Any


def _attributes(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Layers whose arrays are attributes, in a list and by name."""
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer.weight + layer.bias[None, None])
    return x.mean(1) @ params["head"].weight + params["head"].bias[None]


def _shapes(**changes: tuple[int, ...]) -> dict[str, Any]:
    return {"first": (3, 3, 3, 8), "bias": (8,), "second": (3, 3, 8, 6), "head": (6, CLASSES), **changes}


ATTRIBUTES = {
    "layers": [Affine((3, 8), (8,)), Affine((8, 6), (6,))],
    "head": Affine((6, CLASSES), (CLASSES,)),
}
UNBIASED = {name: shape for name, shape in _shapes().items() if name != "bias"}
TWO_LAYERS = {"first": (3, 8), "bias": (8,), "second": (8, 6), "head": (6, CLASSES)}
UNDEFINED: dict[str, str] = dict.fromkeys(("first:1", "bias:0", "second:0"), "must not be zero")
ARCHITECTURES = {
    "perceptron": Architecture(
        from_function(
            _perceptron, {"first": (192, 8), "bias": (8,), "second": (10, 8), "head": (10, CLASSES)}
        ),
        groups=(8, 10),
    ),
    "channels_first": Architecture(
        from_function(
            _channels_first,
            {"first": (8, 3, 3, 3), "bias": (8,), "second": (6, 8, 3, 3), "head": (CLASSES, 24)},
        ),
        groups=(6, 8),
    ),
    "turned_depthwise": Architecture(
        from_function(
            _turned_depthwise,
            {"stem": (3, 3, 3, 6), "depthwise": (3, 3, 6, 1), "bias": (6,), "head": (6, CLASSES)},
        ),
        groups=(6,),
    ),
    "custom_jvp": Architecture(from_function(_custom_jvp, _shapes()), groups=(6, 8)),
    "custom_vjp": Architecture(from_function(_custom_vjp, _shapes()), groups=(6, 8)),
    "binarised": Architecture(
        from_function(_binarised, {"first": (3, 8), "second": (8, 6), "head": (6, CLASSES)}),
        groups=(6,),
        example_input=SEQUENCE,
        frozen={
            "first:1": "contracted over while not zero",
            "second:0": "contracted over while not zero",
        },
    ),
    "regularised": Architecture(
        from_function(_regularised, UNBIASED),
        groups=(6, 8),
    ),
    "shared_kernel": Architecture(from_function(_shared_kernel, UNBIASED), groups=(6, 8)),
    "low_rank": Architecture(
        from_function(
            _low_rank,
            {
                "left": (3, 4),
                "right": (4, 8),
                "full": (3, 8),
                "bias": (8,),
                "gain": (8,),
                "head": (8, CLASSES),
            },
        ),
        groups=(4, 8),
        example_input=SEQUENCE,
    ),
    "outer": Architecture(
        from_function(_outer, {"first": (3, 6), "second": (3, 8), "head": (48, CLASSES)}),
        groups=(6, 8),
        example_input=SEQUENCE,
    ),
    "maxout": Architecture(
        from_function(_maxout, {"first": (3, 24), "bias": (24,), "head": (8, CLASSES)}),
        groups=(8,),
        example_input=SEQUENCE,
    ),
    "normalised_kernel": Architecture(
        from_function(_normalised_kernel, TWO_LAYERS),
        groups=(6,),
        example_input=SEQUENCE,
        frozen=UNDEFINED,
    ),
    "tiled": Architecture(
        from_function(
            _tiled,
            {
                "embed": (3, 6),
                "token": (6,),
                "gate": (6, 1),
                "first": (6, 10),
                "second": (10, 6),
                "head": (6, CLASSES),
            },
        ),
        groups=(6, 10),
        example_input=SEQUENCE,
    ),
    "attributes": Architecture(from_function(_attributes, ATTRIBUTES), groups=(6, 8), example_input=SEQUENCE),
    "reciprocal": Architecture(
        from_function(_reciprocal, TWO_LAYERS), groups=(6,), example_input=SEQUENCE, frozen=UNDEFINED
    ),
}

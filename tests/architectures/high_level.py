"""High-level operations (`jax.experimental.hijax`): JAX's new rematerialisation, and primitives of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import hijax

from tests.architectures.architecture import CLASSES, SEQUENCE, Architecture, from_function


@contextmanager
def new_rematerialisation() -> Iterator[None]:
    """What `JAX_REMAT3=1` does for a whole process."""
    before = jax.config.jax_remat3  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_remat3", True)
    try:
        yield
    finally:
        jax.config.update("jax_remat3", before)


HighLevel: Any = getattr(hijax, "VJPHiPrimitive", None) or getattr(hijax, "HiPrim")  # noqa: B009
"""The base class, by its name in JAX 0.10 or 0.12."""


class Elementwise(HighLevel):
    """An operation on one array, element by element, without a derivative."""

    def __init__(self, x: jax.Array) -> None:
        self.in_avals = (jax.typeof(x),)
        self.out_aval = jax.typeof(x)
        self.params = {}
        super().__init__()

    def batch_dim_rule(self, axis_data: Any, dims: Any, /) -> Any:
        return dims[0]

    def batch(self, axis_data: Any, args: Any, dims: Any) -> Any:  # the same, as of JAX 0.12
        return type(self)(*args)(*args), dims[0]


class Rounded(Elementwise):
    """Rounded to quarters; gradients go straight through where the value is small."""

    def expand(self, x: jax.Array) -> jax.Array:
        return jnp.round(4.0 * x) / 4.0

    def vjp_fwd(self, nzs_in: Any, /, x: jax.Array) -> tuple[Any, Any]:
        return Rounded(x)(x), x

    def vjp_bwd_retval(self, res: jax.Array, outgrad: jax.Array, /) -> tuple[jax.Array]:
        return (jnp.where(jnp.abs(res) < 2.0, outgrad, jnp.zeros_like(outgrad)),)


class Softsign(Elementwise):
    """x / (1 + |x|)."""

    def expand(self, x: jax.Array) -> jax.Array:
        return x / (1.0 + jnp.abs(x))


def _rounded(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Weights and activations rounded, trained straight through."""
    x = jnp.tanh(x @ Rounded(params["first"])(params["first"]))
    return Rounded(x)(x).mean(1) @ params["head"]


def _forward_alone(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x @ params["first"]
    return Softsign(x)(x).mean(1) @ params["head"]


def _rematerialised(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A residual block whose hidden values are computed anew in the backward pass, rounded."""

    def block(x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ params["up"])
        return x + Rounded(hidden)(hidden) @ params["down"]

    with new_rematerialisation():
        return jax.checkpoint(block)(x @ params["embed"]).mean(1) @ params["head"]


ARCHITECTURES = {
    "high_level_vjp": Architecture(
        from_function(_rounded, {"first": (3, 8), "head": (8, CLASSES)}),
        groups=(8,),
        example_input=SEQUENCE,
    ),
    "high_level_forward": Architecture(
        from_function(_forward_alone, {"first": (3, 8), "head": (8, CLASSES)}),
        groups=(8,),
        example_input=SEQUENCE,
        differentiable=False,
    ),
    "high_level_rematerialised": Architecture(
        from_function(
            _rematerialised, {"embed": (3, 8), "up": (8, 10), "down": (10, 8), "head": (8, CLASSES)}
        ),
        groups=(8, 10),
        example_input=SEQUENCE,
    ),
}

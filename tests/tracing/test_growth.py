"""Tracing costs in proportion to the equations of a network, whatever the size of its arrays."""

from __future__ import annotations

import sys
import tracemalloc
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import sculpt
from sculpt.model import Model


def residual_chain(blocks: int, width: int = 8) -> Model:
    """A stream with `blocks` normalised residual branches; its arrays are shapes only."""

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        x = x @ params["stem"]
        for up, down in params["blocks"]:
            y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)
            x = x + jax.nn.relu(y @ up) @ down
        return x @ params["head"]

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    inner = [(array(width, 2 * width), array(2 * width, width)) for _ in range(blocks)]
    return sculpt.from_function(apply, {"stem": array(3, width), "blocks": inner, "head": array(width, 5)})


IMAGE = jax.ShapeDtypeStruct((1, 3), jnp.float32)


def calls_and_bytes(blocks: int) -> tuple[int, int]:
    """Python calls made, and the most bytes held, while tracing."""
    model, calls = residual_chain(blocks), 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        sculpt.trace(model, IMAGE)
    finally:
        sys.setprofile(None)
    model = residual_chain(blocks)
    tracemalloc.start()
    try:
        sculpt.trace(model, IMAGE)
        return calls, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_time_and_memory_grow_linearly_with_the_equations() -> None:
    # What JAX remembers of operations that it has seen is not counted.
    calls_and_bytes(2)
    (few, little), (many, much) = calls_and_bytes(16), calls_and_bytes(64)
    assert many / few == pytest.approx(4.0, rel=0.15)
    assert much / little < 4.5


def test_a_network_larger_than_any_memory_is_traced() -> None:
    width = 2**20
    trace = sculpt.trace(residual_chain(2, width), IMAGE)
    assert sorted(group.size for group in trace.groups) == [width, 2 * width, 2 * width]
    # That is 32 tebibytes of weights.
    assert trace.num_params == 2 * 4 * width**2 + 8 * width

"""Two networks have one digest where they are the same, and another where anything of them differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.digest import digest_of
from sculpt.ir.identity import add_model
from sculpt.model import Model


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["a"]) @ params["b"] * 0.5


def model(function: Callable[..., Any] = apply, scale: float = 1.0, **others: Any) -> Model:
    params = {"a": scale * jnp.ones((4, 6)), "b": jnp.ones((6, 3))}
    return sculpt.from_function(function, params, **others)


def digest(network: Model) -> str:
    found = hashlib.sha256()
    add_model(found, network, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    return found.hexdigest()


def test_a_network_written_twice_is_the_same() -> None:
    def again(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["a"]) @ params["b"] * 0.5

    assert digest(model()) == digest(model(again))


@pytest.mark.parametrize(
    "other",
    [
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] * 0.25,
        lambda p, x: jax.nn.tanh(x @ p["a"]) @ p["b"] * 0.5,
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] * 0.5 + jnp.asarray(np.arange(3.0), jnp.float32)[None],
        lambda p, x: jax.nn.relu(x @ p["a"] + (x @ p["a"])) @ p["b"] * 0.5,
    ],
    ids=["number", "operation", "table", "wiring"],
)
def test_another_function_of_the_same_arrays_is_another(other: Callable[..., Any]) -> None:
    assert digest(model()) != digest(model(other))
    trained = model(apply_train=lambda params, x, key: other(params, x))
    assert digest(model()) != digest(trained)


def test_arrays_that_a_function_closes_over_count() -> None:
    tables = [jnp.asarray(np.random.default_rng(seed).normal(size=3), jnp.float32) for seed in (0, 1)]
    found = [digest(model(lambda p, x, t=t: apply(p, x) + t[None])) for t in tables]
    assert found[0] != found[1]


def test_arrays_are_told_apart_by_place_shape_dtype_and_value() -> None:
    trees: list[Any] = [
        {"a": jnp.zeros(4)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.zeros(4, jnp.bfloat16)},
        {"a": jnp.zeros((0, 4))},
        {"a": jnp.zeros(())},
        {"a": jnp.ones(4)},
        {"a": jax.random.key(0)},
        {"a": jax.random.key(1)},
    ]
    assert len({digest_of(tree) for tree in trees}) == len(trees)
    assert digest_of({"a": np.zeros(4, np.float32)}) == digest_of({"a": jnp.zeros(4)})
    assert digest(model()) != digest(model(scale=2.0))

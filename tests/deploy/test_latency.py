from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import sculpt


def chain(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for _ in range(4):
        x = jnp.tanh(x @ params["w"])
    return x


def square(size: int) -> sculpt.Model:
    return sculpt.from_function(chain, {"w": jnp.eye(size)})


def test_a_measurement_says_what_where_and_how_often() -> None:
    latency = sculpt.measure_latency(square(16), jnp.ones((3, 16)), repeats=7)
    assert 0 < latency.spread[0] <= latency.median <= latency.spread[1] < 1
    assert (latency.n, latency.batch) == (7, 3)
    assert (latency.engine, latency.precision) == ("xla", "float32")
    assert latency.device.startswith(jax.devices()[0].platform)
    assert latency.versions["jax"] == jax.__version__


def test_the_bigger_model_takes_longer() -> None:
    # Both take the same input; one does a thousand times the work.
    def wide(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return chain(params, jnp.pad(x, ((0, 0), (0, 496))))

    models = {"small": square(16), "big": sculpt.from_function(wide, {"w": jnp.eye(512)})}
    found = sculpt.compare_latency(models, jnp.ones((64, 16)), repeats=9)
    assert list(found) == ["small", "big"]
    assert found["small"].spread[1] < found["big"].spread[0]


@pytest.mark.parametrize(
    ("models", "x", "repeats", "message"),
    [
        ({}, jnp.ones((1, 4)), 3, "at least one model"),
        ({"a": square(4)}, jnp.ones((1, 4)), 0, "repeats"),
        ({"a": square(4)}, jnp.float32(1), 3, "scalar"),
    ],
)
def test_bad_input(models: dict[str, sculpt.Model], x: jax.Array, repeats: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.compare_latency(models, x, repeats)

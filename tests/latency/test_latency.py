from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt


def chain(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for _ in range(4):
        x = jnp.tanh(x @ params["w"])
    return x


def square(size: int) -> sculpt.Model:
    return sculpt.from_function(chain, {"w": jnp.eye(size)})


@pytest.mark.slow
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
        ({}, jnp.ones((1, 4)), 3, "expected models by their names, such as .*got none"),
        (square(4), jnp.ones((1, 4)), 3, "expected models by their names, such as .*got Model"),
        ({"a": square(4)}, jnp.ones((1, 5)), 3, r"does not take the input float32\[1, 5\]"),
        ({"a": square(4)}, jnp.ones((1, 4)), 2.5, "repeats must be a whole number of at least 1, got 2.5"),
        ({"a": square(4)}, jnp.ones((1, 4)), 0, "repeats"),
        ({"a": square(4)}, jnp.float32(1), 3, r"one image or more, got float32\[\]"),
        ({"a": square(4)}, jnp.ones((0, 4)), 3, r"one image or more, got float32\[0, 4\]"),
    ],
)
def test_bad_input(models: Any, x: jax.Array, repeats: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.compare_latency(models, x, repeats)


@pytest.mark.parametrize("threads", [0, "1", 1.0])
def test_threads_are_a_whole_number(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be a whole number from 1 to"):
        sculpt.measure_latency(square(4), jnp.ones((1, 4)), 3, threads=threads)


def test_images_of_64_bits_are_measured_in_32() -> None:
    wide = np.ones((1, 4), np.float64)
    for engine in ("xla", "onnxruntime"):
        assert sculpt.measure_latency(square(4), wide, 2, engine=engine).precision == "float32"

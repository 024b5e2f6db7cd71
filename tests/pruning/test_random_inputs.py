"""The inputs on which compaction compares two networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.pruning.compaction import plan as compact_plan
from sculpt.pruning.compaction.random_inputs import draw_inputs, telling_inputs

PAIR = (jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32))
PARAMS = {"a": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.ones((4, 2), np.float32)}


def hidden(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def halved(apply: Any, example: Any) -> tuple[Any, ...]:
    """What `compact` takes for a network of four hidden units, two of which go."""
    model = sculpt.from_function(apply, jax.tree.map(jnp.asarray, PARAMS))
    space = sculpt.make_space(sculpt.trace(model, example), "channels")
    policy = np.asarray([2])
    masks = sculpt.make_masks(space, model.params, policy)
    return sculpt.apply_masks(model, masks), space, policy


def test_inputs_of_equal_shape_are_drawn_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    ints = (jax.ShapeDtypeStruct((2, 30), jnp.int32),) * 2
    first, second = draw_inputs(ints)
    assert not np.array_equal(first, second)
    arguments = halved(lambda p, x: hidden(p, x[0]) - hidden(p, x[1]), PAIR)
    sculpt.compact(*arguments)
    right = compact_plan.sliced
    monkeypatch.setattr(compact_plan, "sliced", lambda leaf, keep: 1.01 * right(leaf, keep))
    with pytest.raises(ValueError, match="outputs differ by"):
        sculpt.compact(*arguments)


@pytest.mark.parametrize("domain", [jnp.log, jnp.sqrt, jnp.arcsin])
def test_inputs_are_in_the_domain_of_the_network(domain: Any) -> None:
    x, fault = telling_inputs(lambda x: hidden(PARAMS, domain(x[0])) - x[1].sum(), PAIR)
    assert not fault and all((leaf > 0).all() for leaf in jax.tree.leaves(x))


def test_inputs_are_drawn_again_where_an_output_is_all_zero() -> None:
    draws: list[float] = []

    def outputs(x: Any) -> Any:
        draws.append(float(x[0].sum()))
        return {
            "logits": x[0],
            "second": jnp.zeros(3) if len(draws) < 4 else x[1],
            "count": jnp.zeros(2, int),
        }

    _, fault = telling_inputs(outputs, PAIR)
    assert not fault and len(set(draws)) == 4


def test_compact_says_where_its_check_says_little() -> None:
    for apply, fault in (
        (lambda p, x: 0.0 * hidden(p, x), "all zero"),
        (lambda p, x: jnp.nan * hidden(p, x), "not finite"),
    ):
        arguments = halved(apply, PAIR[0])
        with pytest.warns(UserWarning, match=f"an output is {fault}, which says little") as record:
            sculpt.compact(*arguments)
        assert [w.filename for w in record if w.category is UserWarning] == [__file__]


def test_complex_numbers_and_keys_are_drawn_too() -> None:
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    keys, numbers = draw_inputs((key, jax.ShapeDtypeStruct((2, 3), jnp.complex64)))
    assert keys.dtype == key.dtype and bool(numbers.imag.any())

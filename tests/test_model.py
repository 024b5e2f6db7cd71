"""The three adapters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import InvalidRngError

import sculpt
from tests.networks import NnxResidual, Plain, network

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


@pytest.mark.parametrize("name", ["plain", "nnx", "function"])
def test_evaluation_is_pure_and_training_returns_a_state_of_the_same_structure(name: str) -> None:
    model = network(name)
    assert np.array_equal(model(IMAGES), model.apply(model.params, model.state, IMAGES))
    logits, state = model.apply_train(model.params, model.state, IMAGES, jax.random.key(1))
    assert logits.shape == (4, 5)
    assert jax.tree.structure(state) == jax.tree.structure(model.state)
    same_logits, _ = model.apply_train(model.params, model.state, IMAGES, jax.random.key(1))
    assert np.array_equal(logits, same_logits)


def test_a_model_is_shown_by_its_sizes() -> None:
    model = sculpt.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 300))})
    assert repr(model) == "Model(params: 1,200 numbers in 1 array, state: 0 numbers in 0 arrays)"
    assert repr(jax.eval_shape(lambda: model)) == repr(model)
    assert repr(jax.tree.map(lambda _: object(), model)).startswith("Model(params: 1 numbers")


def test_adapting_the_same_module_twice_shares_compiled_programs() -> None:
    module, key = Plain(), jax.random.key(0)
    variables = module.init(key, IMAGES)
    first, second = sculpt.from_linen(module, variables), sculpt.from_linen(Plain(), variables)
    assert first.apply == second.apply and hash(first.apply_train) == hash(second.apply_train)
    network_module = NnxResidual(nnx.Rngs(0))
    assert sculpt.from_nnx(network_module).apply == sculpt.from_nnx(network_module).apply


def test_training_moves_batch_statistics_and_draws_dropout_from_the_key() -> None:
    model = network("nnx")
    _, state = model.apply_train(model.params, model.state, IMAGES, jax.random.key(1))
    moved = [not np.array_equal(a, b) for a, b in zip(_floats(state), _floats(model.state))]
    assert any(moved)
    dilated = network("dilated")
    draws = [dilated.apply_train(dilated.params, dilated.state, IMAGES, jax.random.key(k))[0] for k in (1, 2)]
    assert not np.array_equal(draws[0], draws[1])


def _floats(tree: object) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


class Switched(nnx.Module):
    """An NNX module that is told its mode when it is called."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return self.last(self.norm(self.first(x), use_running_average=not train))


def test_the_keyword_of_an_nnx_module_switches_its_mode() -> None:
    with pytest.raises(ValueError, match=r"Switched.__call__ takes 'train', .* pass train_argument='train'"):
        sculpt.from_nnx(Switched(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"takes \['x', 'train'\], not 'training'"):
        sculpt.from_nnx(Switched(nnx.Rngs(0)), train_argument="training")
    model, x = sculpt.from_nnx(Switched(nnx.Rngs(0)), train_argument="train"), jnp.ones((4, 8))
    _, state = model.apply_train(model.params, model.state, x, jax.random.key(0))
    before, after = (jax.tree.leaves(tree)[0] for tree in (model.state, state))
    assert float(jnp.abs(after - before).max()) > 0.01
    np.testing.assert_array_equal(model(x), Switched(nnx.Rngs(0))(x))


def test_nnx_module_is_left_as_it_was() -> None:
    module = NnxResidual(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    model = sculpt.from_nnx(module)
    model.apply_train(model.params, model.state, IMAGES, jax.random.key(1))
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after))))


def test_functions_with_a_state_and_a_training_mode() -> None:
    def apply(params: jax.Array, state: jax.Array, x: jax.Array) -> jax.Array:
        return x @ params + state

    def apply_train(
        params: jax.Array, state: jax.Array, x: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return x @ params, state + 1.0

    model = sculpt.from_function(apply, jnp.ones((3, 5)), jnp.zeros(()), apply_train)
    logits, state = model.apply_train(model.params, model.state, jnp.ones((2, 3)), jax.random.key(0))
    assert logits.shape == (2, 5) and float(state) == 1.0


def test_a_model_is_a_pytree_whose_functions_are_static() -> None:
    model = network("plain")
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2.0 * x, m))(model)
    assert doubled.apply == model.apply
    assert np.array_equal(doubled.params["Dense_0"]["bias"], 2.0 * model.params["Dense_0"]["bias"])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="'params' collection"):
        sculpt.from_linen(Plain(), {"weights": {}})
    with pytest.raises(ValueError, match="at least one array"):
        sculpt.from_function(lambda p, x: x, {})

    class Empty(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x

    with pytest.raises(ValueError, match=r"no nnx\.Param"):
        sculpt.from_nnx(Empty())

    class Deterministic(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
            return nn.Dense(5)(x)

    module = Deterministic()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="train_argument="):
        sculpt.from_linen(module, variables)
    assert sculpt.from_linen(module, variables, train_argument=None)(jnp.zeros((2, 3))).shape == (2, 5)


def test_a_training_mode_that_cannot_be_switched_on_is_refused() -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, is_train: bool = False) -> jax.Array:
            return nn.BatchNorm(use_running_average=not is_train)(nn.Dense(5)(x))

    module = Network()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="pass train_argument="):
        sculpt.from_linen(module, variables)
    assert sculpt.from_linen(module, variables, "is_train").state


def test_switches_that_are_off_in_training_and_other_random_streams() -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
            if not deterministic:
                x = x + jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(5)(x))

    x = jnp.ones((2, 3))
    variables = Noisy().init(jax.random.key(0), x)
    model = sculpt.from_linen(Noisy(), variables, "deterministic", rngs=("dropout", "noise"))
    expected: Any = Noisy().apply(variables, x)
    assert jnp.array_equal(model(x), expected)
    first, _ = model.apply_train(model.params, model.state, x, jax.random.key(1))
    other, _ = model.apply_train(model.params, model.state, x, jax.random.key(2))
    assert not jnp.array_equal(first, model(x))
    assert not jnp.array_equal(first, other)
    with_one_stream = sculpt.from_linen(Noisy(), variables, "deterministic")
    with pytest.raises(InvalidRngError, match="noise"):
        with_one_stream.apply_train(model.params, model.state, x, jax.random.key(1))


def test_a_sequential_of_a_list_is_a_network_too() -> None:
    layers = [
        nn.Conv(4, (3, 3)),
        nn.Sequential([nn.gelu, nn.Conv(6, (1, 1))]),
        lambda x: x.mean((1, 2)),
        nn.Dense(5),
    ]
    module = nn.Sequential(layers)
    x = jnp.ones((2, 8, 8, 3))
    model = sculpt.from_linen(module, module.init(jax.random.key(0), x))
    run = jax.jit(lambda m, x: m(x))
    expected: Any = module.apply({"params": model.params}, x)
    np.testing.assert_allclose(run(model, x), expected, atol=1e-5)
    run(model.replace(params=jax.tree.map(jnp.zeros_like, model.params)), x)
    assert getattr(run, "_cache_size")() == 1  # noqa: B009
    assert len(sculpt.trace(model, x).groups) == 2


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"from_linen expected a flax.linen.Module, got Linear: NNX modules go to from_nnx"
    ):
        sculpt.from_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"params": {}})
    with pytest.raises(ValueError, match=r"from_function expected a function .* first, got dict"):
        sculpt.from_function({"a": jnp.ones(2)}, lambda p, x: x)  # type: ignore[arg-type]


def test_example_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"the model does not take the example input float32\[batch, 8, 8, 4\]: "
    ):
        sculpt.trace(network("plain"), jnp.zeros((1, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"or jax.ShapeDtypeStruct\(shape, dtype\), got 1"):
        sculpt.trace(network("plain"), (1, 8, 8, 3))
    scaled = sculpt.from_function(
        lambda p, x: p["s"] * (x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "s": 2.0}
    )
    assert [group.size for group in sculpt.trace(scaled, jnp.zeros((1, 3))).groups] == [4]
    assert sculpt.make_space(sculpt.trace(scaled, jnp.zeros((1, 3))), families="channels").num_sites == 1

"""The three adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.errors import InvalidRngError

import sculpt
from tests.networks import NnxResidual, Plain, network

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


@pytest.mark.parametrize("name", ["plain", "nnx", "function"])
@pytest.mark.fast("nnx", "function")
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


@pytest.mark.slow
def test_the_keyword_of_an_nnx_module_switches_its_mode() -> None:
    with pytest.raises(ValueError, match=r"Switched.__call__ takes \['x', 'train'\], not 'training'"):
        sculpt.from_nnx(Switched(nnx.Rngs(0)), train_argument="training")
    model, x = sculpt.from_nnx(Switched(nnx.Rngs(0))), jnp.ones((4, 8))
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


def test_a_training_mode_that_cannot_be_switched_on_is_refused() -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, learning: bool = False) -> jax.Array:
            return nn.BatchNorm(use_running_average=not learning)(nn.Dense(5)(x))

    module = Network()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="pass train_argument="):
        sculpt.from_linen(module, variables)
    assert sculpt.from_linen(module, variables, "learning").state


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


class Unhashable(nnx.Module):
    """An NNX module with a dict and a list among its static attributes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.options, self.widths = {"scale": 2.0}, [8, 6, 5]
        self.first, self.last = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.first(x) * self.options["scale"])


class UnhashableLinen(nn.Module):
    """A Linen module of a dict of a list."""

    options: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(5)(nn.Dense(self.options["widths"][0])(x))


@dataclasses.dataclass
class UnhashableFunction:
    """Compares by value, and so does not hash."""

    options: dict[str, float]

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["a"]) @ params["b"] * self.options["scale"]

    def train(self, params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return self(params, x)


def _unhashable(name: str) -> sculpt.model.Model:
    if name == "nnx":
        return sculpt.from_nnx(Unhashable(nnx.Rngs(0)))
    if name == "linen":
        module = UnhashableLinen({"widths": [6]})
        return sculpt.from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 8))))
    function = UnhashableFunction({"scale": 2.0})
    return sculpt.from_function(
        function, {"a": jnp.ones((8, 6)), "b": jnp.ones((6, 5))}, apply_train=function.train
    )


@pytest.mark.parametrize("name", ["nnx", "linen", "function"])
def test_modules_that_do_not_hash(name: str) -> None:
    model, x = _unhashable(name), jnp.ones((2, 8))
    run = jax.jit(lambda m, x: m.apply_train(m.params, m.state, x, jax.random.key(0))[0] - m(x))
    np.testing.assert_allclose(run(model, x), 0.0, atol=1e-5)
    run(model.replace(params=jax.tree.map(jnp.zeros_like, model.params)), x)
    assert getattr(run, "_cache_size")() == 1  # noqa: B009
    assert [group.size for group in sculpt.trace(model, x).groups] == [6]


class Deterministic(nn.Module):
    """A Linen module of one input, a mask, and a keyword of training that is off there."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None, deterministic: bool = True) -> jax.Array:
        x = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4)(x))
        return x if mask is None else jnp.where(jnp.asarray(mask)[None], x, 0.0)

    def twice(self, x: jax.Array, training: bool = False) -> jax.Array:
        return 2.0 * self(x, deterministic=not training)


def test_the_keyword_of_the_training_mode_and_fixed_keywords_of_a_linen_call() -> None:
    x, key = jnp.ones((2, 3)), jax.random.key(1)
    module = Deterministic()
    variables = module.init(jax.random.key(0), x)
    plain = sculpt.from_linen(module, variables)
    assert not jnp.array_equal(plain.apply_train(plain.params, plain.state, x, key)[0], plain(x))
    masked = sculpt.from_linen(module, variables, call_arguments={"mask": np.asarray([1, 1, 0, 0])})
    assert not masked(x)[:, 2:].any() and jnp.array_equal(masked(x)[:, :2], plain(x)[:, :2])
    twice = sculpt.from_linen(module, variables, call_arguments={"method": "twice"})
    assert jnp.array_equal(twice(x), 2.0 * plain(x))
    assert not jnp.array_equal(twice.apply_train(twice.params, twice.state, x, key)[0], twice(x))
    fixed = sculpt.from_linen(module, variables, call_arguments={"deterministic": True})
    assert jnp.array_equal(fixed.apply_train(fixed.params, fixed.state, x, key)[0], fixed(x))
    mutable = sculpt.from_linen(module, variables, call_arguments={"mutable": ["cache"]})
    assert jnp.array_equal(mutable(x), plain(x)) and mutable(x).shape == (2, 4)
    with pytest.raises(
        ValueError, match=r"takes \['x', 'mask', 'deterministic'\], not 'maks' of .*did you mean 'mask'"
    ):
        sculpt.from_linen(module, variables, call_arguments={"maks": None})


def test_adapters_ask_where_several_keywords_or_none_may_switch_the_mode() -> None:
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False, deterministic: bool = True) -> jax.Array:
            return nn.Dropout(0.5, deterministic=deterministic and not train)(nn.Dense(4)(x))

    class AnyKeyword(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, **options: bool) -> jax.Array:
            return Both()(x, **options)

    x = jnp.ones((2, 3))
    variables = Both().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"takes 'train' and 'deterministic': pass train_argument="):
        sculpt.from_linen(Both(), variables)
    for names in ("train", ("train", "deterministic")):
        model = sculpt.from_linen(Both(), variables, names)
        assert not jnp.array_equal(model.apply_train(model.params, {}, x, jax.random.key(0))[0], model(x))
    variables = AnyKeyword().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"none of which is known .* or \(\) if there is none"):
        sculpt.from_linen(AnyKeyword(), variables)
    assert sculpt.from_linen(AnyKeyword(), variables, ())(x).shape == (2, 4)


class Sowing(nn.Module):
    """Sows in two collections, one before and one after "batch_stats" by name."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Dense(6)(x))
        for collection in ("aux", "intermediates", "losses"):
            self.sow(collection, "hidden", x)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))


class SowingNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x))
        self.sow(nnx.Intermediate, "hidden", x)
        return self.last(self.norm(x))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("name", ["linen", "frozen", "nnx"])
@pytest.mark.fast("frozen", "nnx")
def test_a_state_that_grows_in_training_keeps_its_structure(name: str) -> None:
    x, key = jnp.ones((4, 5)), jax.random.key(0)
    if name == "nnx":
        module = SowingNnx(nnx.Rngs(0))
        module(x)
        model = sculpt.from_nnx(module)
    else:
        variables = jax.jit(Sowing().init)(key, jnp.ones((1, 5)))
        model = sculpt.from_linen(Sowing(), variables if name == "linen" else freeze(variables))
        assert sorted(model.state) == ["aux", "batch_stats", "losses"]
    shapes = jax.tree.map(jnp.shape, model.state)
    state, train = model.state, jax.jit(model.apply_train)
    for _ in range(2):
        _, state = train(model.params, state, x, key)
        assert jax.tree.structure(state) == jax.tree.structure(model.state)
        assert jax.tree.map(jnp.shape, state) == shapes
    norm = jax.tree.leaves(state["rest"]["norm"] if name == "nnx" else state["batch_stats"])
    assert all(jnp.abs(leaf - start).max() > 0.001 for leaf, start in zip(norm, (0.0, 1.0)))
    traced = sculpt.trace(model, x)
    assert [group.size for group in traced.groups] == [6]
    space = sculpt.make_space(traced, "channels")
    policy = space.num_options - 1
    masks = sculpt.make_masks(space, model.params, policy)
    small = sculpt.compact(sculpt.apply_masks(model, masks), space, policy, check=False, masks=masks)
    jax.eval_shape(small.apply_train, small.params, small.state, x, key)


def test_a_function_that_returns_another_state_is_refused_by_name() -> None:
    def train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> Any:
        return x @ params, {**state, "seen": x}

    model = sculpt.from_function(lambda p, s, x: x @ p, jnp.ones((3, 5)), {"count": 0.0}, train)
    with pytest.raises(
        ValueError, match=r"a state of the arrays that it was given: with \['seen'\] \[2, 3\]"
    ):
        model.apply_train(model.params, model.state, jnp.ones((2, 3)), jax.random.key(0))

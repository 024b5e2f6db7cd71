"""Networks that say where their values lie: `shard_map` and sharding constraints, on one device and on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sculpt
from sculpt.model import Model
from tests.architectures.equality import drawn_importance, drawn_policy, leanest_policy, prune

X = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)


def mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("d",))


def layer(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = x @ kernel
    return jax.nn.relu(y) - 0.1 * jnp.tanh(y)


def network(between: Callable[[jax.Array, jax.Array], jax.Array]) -> Model:
    generator = np.random.default_rng(1)
    shapes = {"a": (3, 8), "b": (8, 6), "c": (6, 3)}
    params = {name: jnp.asarray(generator.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return between(layer(x, params["a"]), params["b"]) @ params["c"]

    return sculpt.from_function(apply, params)


def over_batch(devices: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return jax.shard_map(layer, mesh=mesh(devices), in_specs=(P("d"), P()), out_specs=P("d"))


def looped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    step = lambda carry, _: (jax.nn.tanh(carry), None)  # noqa: E731
    return jax.lax.scan(step, layer(x, kernel), length=2)[0]


def both(devices: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return jax.shard_map(looped, mesh=mesh(devices), in_specs=(P("d", None), P(None)), out_specs=P("d"))


def constrained(devices: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    sharding = NamedSharding(mesh(devices), P(None, "d"))
    return lambda x, kernel: layer(jax.lax.with_sharding_constraint(x, sharding), kernel)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("between", [over_batch, both, constrained])
@pytest.mark.fast("both-1", "constrained-1")
def test_compact_equals_masked(between: Callable[[int], Any], devices: int) -> None:
    model = network(between(devices))
    trace = sculpt.trace(model, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    assert sorted(group.size for group in trace.groups) == [6, 8]
    assert trace.macs == 3 * 8 + 8 * 6 + 6 * 3
    space = sculpt.make_space(trace, ("channels",), importance=drawn_importance(trace, 3))
    for policy in (drawn_policy(space, 1), leanest_policy(space)):
        pruned = prune(model, space, policy, check=True)
        pruned.assert_same_outputs(jnp.asarray(X))
    pruned.assert_same_gradients(jnp.asarray(X), False)
    assert sculpt.count_cost(pruned.small, jnp.asarray(X))[0] == int(
        sculpt.cost(space, pruned.policy).macs_realised
    )


def summed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.psum(x @ kernel, "d")


def test_devices_that_exchange_values_freeze_what_they_read() -> None:
    specs = {"in_specs": (P(None, "d"), P("d")), "out_specs": P()}
    model = network(jax.shard_map(summed, mesh=mesh(2), **specs))
    trace = sculpt.trace(model, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    assert not trace.groups
    reason = "more than a map over the parts of a batch (shard_map at"
    assert {row.reason.startswith(reason) for row in trace.frozen if row.name == "b:0"} == {True}
    outputs = jax.jit(model.apply)(model.params, model.state, X)
    space = sculpt.make_space(trace, ("unstructured",))
    pruned = prune(model, space, np.zeros(space.num_sites, np.int32))
    np.testing.assert_allclose(pruned.assert_same_outputs(jnp.asarray(X)), outputs, rtol=1e-5)


def test_a_model_file_says_nothing_of_devices(tmp_path: Any) -> None:
    model = network(constrained(2))
    sculpt.save_model(model, tmp_path / "net", jnp.asarray(X))
    loaded = sculpt.load_model(tmp_path / "net")
    expected, found = (jax.jit(m.apply)(m.params, m.state, X) for m in (model, loaded))
    np.testing.assert_allclose(expected, found, rtol=1e-5)


@pytest.mark.parametrize("spec", [P(), P(None, "d"), P("d", None)])
@pytest.mark.fast("spec1", "spec2")
def test_parameters_keep_their_sharding(spec: P) -> None:
    model = network(constrained(2))
    sharding = NamedSharding(mesh(2), spec)
    kernel = jax.device_put(model.params["b"], sharding)
    rest = {name: jax.device_put(model.params[name], NamedSharding(mesh(2), P())) for name in ("a", "c")}
    model = model.replace(params={**rest, "b": kernel})
    trace = sculpt.trace(model, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    space = sculpt.make_space(trace, ("channels",))
    policy = space.num_options // 2
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy).params["b"]
    assert small.shape == (4, 3) and len(small.sharding.device_set) == 2
    # Two devices cannot share three columns.
    assert [part for part in small.sharding.spec if part] == (["d"] if spec == P("d", None) else [])

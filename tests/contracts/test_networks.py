"""One suite for every network: masks, costs and compaction agree with each other and with independent counts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from sculpt.pipeline.closing import theoretical_macs
from sculpt.pruning.budget import random_policies
from sculpt.pruning.compaction.compactor import max_difference
from tests.networks import NETWORKS, network, slow_but, traced

IMAGES = jax.random.normal(jax.random.key(11), (4, 8, 8, 3))


@pytest.fixture(params=NETWORKS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def space_of(name: str) -> sculpt.Space:
    """One space for each network: compiled programs are kept by its identity."""
    return sculpt.make_space(traced(name))


def pruned(name: str, policy: object) -> tuple[Model, Model]:
    space = space_of(name)
    masks = sculpt.make_masks(space, network(name).params, policy)
    masked = sculpt.apply_masks(network(name), masks)
    return masked, sculpt.compact(masked, space, policy)


def smallest_policy(space: sculpt.Space) -> np.ndarray:
    return space.num_options - 1


def mixed_policy(space: sculpt.Space) -> jax.Array:
    return random_policies(space, jax.random.key(3), 1)[0]


@pytest.mark.fast("function")
def test_correctness_03_masked_equals_compacted(name: str) -> None:
    space = space_of(name)
    for policy in (mixed_policy(space), smallest_policy(space)):
        masked, small = pruned(name, policy)
        assert max_difference(masked, small, IMAGES) <= 1e-5


@pytest.mark.fast("plain", "dilated", "function")
def test_whole_numbers_of_macs_are_those_of_the_cost(name: str) -> None:
    space = space_of(name)
    for policy in (np.zeros(space.num_sites, np.int32), mixed_policy(space), smallest_policy(space)):
        masks = sculpt.make_masks(space, network(name).params, policy)
        assert theoretical_macs(space, policy, masks) == pytest.approx(
            float(sculpt.cost(space, policy).macs), rel=1e-6
        )
        assert policy.any() or theoretical_macs(space, policy, masks) == traced(name).macs


@pytest.mark.fast("dilated", "nnx", "function")
def test_correctness_08_claimed_macs_equal_counted_zeros_and_the_compact_program(name: str) -> None:
    space = space_of(name)
    policy = mixed_policy(space)
    masked, small = pruned(name, policy)
    costs = sculpt.cost(space, policy)
    trace = traced(name)
    weights = [np.asarray(w) for w in jax.tree.leaves(masked.params)]
    for layer in trace.layers:
        kept = np.asarray(jax.tree.leaves(sculpt.make_masks(space, network(name).params, policy))[layer.leaf])
        dense = layer.macs / kept.size
        # Claimed sparsity == counted zeros, layer by layer (points 8 and 9).
        claimed = sculpt.layer_macs(space, policy)[layer.index]
        grouped = layer.kind == "conv" and weights[layer.leaf].shape[2] != layer.in_channels
        if not grouped:
            assert claimed == pytest.approx(dense * kept.sum(), rel=1e-5)
    macs, params = sculpt.count_cost(small, IMAGES)
    assert float(costs.macs) == pytest.approx(macs, rel=1e-5)
    assert float(costs.macs_realised) == pytest.approx(macs, rel=1e-5)
    assert float(costs.params) == pytest.approx(params, rel=1e-5)
    assert params == sum(w.size for w in jax.tree.leaves(small.params))


@pytest.mark.fast("plain", "biased", "residual", "dilated", "nnx", "function")
def test_correctness_09_every_convolution_and_dense_layer_is_a_site(name: str) -> None:
    space = space_of(name)
    masks = sculpt.make_masks(space, network(name).params, smallest_policy(space))
    dense_head = max(layer.index for layer in traced(name).layers)
    for layer in traced(name).layers:
        mask = np.asarray(jax.tree.leaves(masks)[layer.leaf])
        assert mask.any() and (not mask.all()), layer.name
        if layer.index != dense_head:
            assert mask.mean() < 0.8, layer.name


def test_correctness_16_coupled_layers_lose_the_same_units(name: str) -> None:
    space = sculpt.make_space(traced(name), families=("channels",))
    masks = sculpt.make_masks(space, network(name).params, mixed_policy(space))
    leaves = [np.asarray(m) for m in jax.tree.leaves(masks)]
    for group in traced(name).groups:
        found = []
        for leaf, dim in group.slots:
            others = tuple(d for d in range(leaves[leaf].ndim) if d != dim)
            units = np.asarray(leaves[leaf].any(axis=others))
            labels = traced(name).axes.labels(traced(name).leaf_term(leaf)[dim], group.atom)
            found.append({int(u) for u, kept in zip(labels, units) if u >= 0 and kept})
        assert all(f == found[0] for f in found), group.name


@pytest.mark.fast("plain", "biased", "dilated", "function")
def test_each_site_alone_is_masked_and_compacted_exactly(name: str) -> None:
    space = space_of(name)
    apply = jax.jit(network(name).apply)
    dense = apply(network(name).params, network(name).state, IMAGES)
    for site in space.sites:
        policy = np.zeros(space.num_sites, np.int32)
        policy[site.index] = len(site.options) - 1
        masked, small = pruned(name, policy)
        cut = apply(masked.params, masked.state, IMAGES)
        assert float(jnp.abs(cut - dense).max()) > 0, f"{site.name} {site.family} changes nothing"
        assert sculpt.count_cost(small, IMAGES)[0] < traced(name).macs


def test_dense_policy_changes_nothing(name: str) -> None:
    space = space_of(name)
    masked, small = pruned(name, np.zeros(space.num_sites, np.int32))
    assert all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (masked.params, network(name).params)))
    )
    assert sculpt.count_cost(small, IMAGES) == (traced(name).macs, traced(name).num_params)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in ("dilated", "nnx")])
@pytest.mark.fast("function")
def test_training_mode_and_gradients_agree_on_what_survives(name: str) -> None:
    """Networks with dropout are left out: its draws differ between shapes, as they must."""
    space = space_of(name)
    policy = mixed_policy(space)
    masked, small = pruned(name, policy)
    masks = sculpt.make_masks(space, network(name).params, policy)

    def loss(model: Model, params: object) -> tuple[jax.Array, object]:
        logits, state = model.apply_train(params, model.state, IMAGES, jax.random.key(0))
        return jnp.square(logits).sum(), state

    (value, state), gradient = jax.jit(jax.value_and_grad(lambda p: loss(masked, p), has_aux=True))(
        masked.params
    )
    (small_value, small_state), small_gradient = jax.jit(
        jax.value_and_grad(lambda p: loss(small, p), has_aux=True)
    )(small.params)
    assert float(small_value) == pytest.approx(float(value), rel=1e-4)
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, small.state)
    for big, mask, cut in zip(*map(jax.tree.leaves, (gradient, masks, small_gradient))):
        np.testing.assert_allclose(np.asarray(big)[np.asarray(mask)], np.ravel(cut), rtol=2e-3, atol=2e-3)
    assert jax.tree.structure(state) == jax.tree.structure(small_state)


@slow_but("residual", "concatenated", "nnx", "function")
@pytest.mark.slow
def test_compact_model_can_be_traced_and_pruned_again(name: str) -> None:
    _, small = pruned(name, mixed_policy(space_of(name)))
    trace = sculpt.trace(small, IMAGES)
    assert trace.macs == sculpt.count_cost(small, IMAGES)[0]
    space = sculpt.make_space(trace)
    masks = sculpt.make_masks(space, small.params, smallest_policy(space))
    masked = sculpt.apply_masks(small, masks)
    smaller = sculpt.compact(masked, space, smallest_policy(space))
    assert max_difference(masked, smaller, IMAGES) <= 1e-5


def test_macs_equal_what_xla_counts(name: str) -> None:
    """XLA counts no products with padding, so each convolution is counted on an input that is padded beforehand."""
    trace = traced(name)
    for layer in trace.layers:
        eqn = layer.equation
        shapes = [jax.ShapeDtypeStruct(trace.program.shape(i), jnp.float32) for i in eqn.inputs]
        params = dict(eqn.params)
        if layer.kind == "conv":
            numbers = params["dimension_numbers"]
            padded = list(shapes[0].shape)
            for dim, (low, high) in zip(numbers.lhs_spec[2:], params["padding"]):
                padded[dim] += low + high
            shapes[0] = jax.ShapeDtypeStruct(tuple(padded), jnp.float32)
            params["padding"] = ((0, 0),) * len(params["padding"])
        compiled = jax.jit(lambda *xs, e=eqn, p=params: e.primitive.bind(*xs, **p)).lower(*shapes).compile()
        analysis = compiled.cost_analysis()
        assert analysis is not None and analysis["flops"] == 2 * 2 * layer.macs, layer.name

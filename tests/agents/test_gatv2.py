"""Graph attention against its formula, and where graphs are awkward."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.agents.gatv2 import GATv2Layer, segment_softmax, take_rows

NODES, EDGES, TYPES, WIDTH = 6, 9, 3, 8


@pytest.fixture(scope="module")
def layer() -> GATv2Layer:
    return GATv2Layer(width=WIDTH, heads=2)


@pytest.fixture(scope="module")
def apply(layer: GATv2Layer) -> Callable[..., jax.Array]:
    return jax.jit(layer.apply)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def graph() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "nodes": jnp.asarray(rng.normal(size=(NODES, WIDTH)), jnp.float32),
        "edges": jnp.asarray(np.eye(TYPES)[rng.integers(0, TYPES, EDGES)], jnp.float32),
        "senders": jnp.asarray(rng.integers(0, NODES, EDGES), jnp.int32),
        "receivers": jnp.asarray(rng.integers(0, NODES - 2, EDGES), jnp.int32),  # two nodes receive nothing
    }


@pytest.fixture(scope="module")
def variables(layer: GATv2Layer, graph: dict[str, jax.Array]) -> dict:
    return jax.jit(layer.init)(jax.random.key(0), **graph)


def test_matches_the_formula_of_the_paper(
    apply: Callable[..., jax.Array], graph: dict[str, jax.Array], variables: dict
) -> None:
    p = jax.tree.map(np.asarray, variables["params"])
    x = np.asarray(graph["nodes"])
    source = x @ p["source"]["kernel"] + p["source"]["bias"]
    target = x @ p["target"]["kernel"]
    typed = np.asarray(graph["edges"]) @ p["edge"]["kernel"]
    incoming = list(zip(np.asarray(graph["senders"]), np.asarray(graph["receivers"]), typed))
    incoming += [(i, i, p["loop"][0]) for i in range(NODES)]
    attended = np.zeros((NODES, WIDTH))
    for i in range(NODES):
        edges = [(j, feature) for j, receiver, feature in incoming if receiver == i]
        mixed = np.stack([source[j] + target[i] + feature for j, feature in edges])
        mixed = np.where(mixed > 0, mixed, 0.2 * mixed).reshape(len(edges), 2, WIDTH // 2)
        scores = (mixed * p["attention"][None]).sum(-1)
        weights = np.exp(scores) / np.exp(scores).sum(0)
        for (j, _), weight in zip(edges, weights):
            attended[i] += np.repeat(weight, WIDTH // 2) * source[j]
    summed = x + np.asarray(jax.jit(jax.nn.gelu)(jnp.asarray(attended, jnp.float32)))
    expected = (summed - summed.mean(1, keepdims=True)) / np.sqrt(summed.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(apply(variables, **graph), expected, atol=2e-5)


def test_correctness_14_relabelling_nodes_permutes_outputs_alike(
    apply: Callable[..., jax.Array], graph: dict[str, jax.Array], variables: dict
) -> None:
    new = np.asarray([3, 0, 5, 1, 4, 2])  # node i becomes new[i]
    relabelled = {
        "nodes": jnp.zeros_like(graph["nodes"]).at[new].set(graph["nodes"]),
        "edges": graph["edges"][::-1],
        "senders": jnp.asarray(new, jnp.int32)[graph["senders"]][::-1],
        "receivers": jnp.asarray(new, jnp.int32)[graph["receivers"]][::-1],
    }
    before, after = apply(variables, **graph), apply(variables, **relabelled)
    np.testing.assert_allclose(np.asarray(after)[new], before, atol=1e-5)
    assert not np.allclose(after, before, atol=1e-2)


def test_edge_types_matter(
    apply: Callable[..., jax.Array], graph: dict[str, jax.Array], variables: dict
) -> None:
    retyped = graph | {"edges": jnp.roll(graph["edges"], 1, axis=1)}
    assert not np.allclose(apply(variables, **graph), apply(variables, **retyped), atol=1e-3)


def test_nodes_without_edges_stay_finite(
    apply: Callable[..., jax.Array], graph: dict[str, jax.Array], variables: dict
) -> None:
    lonely = graph | {
        "edges": graph["edges"][:0], "senders": graph["senders"][:0], "receivers": graph["receivers"][:0]
    }  # fmt: skip

    def total(variables: dict) -> jax.Array:
        return jnp.sum(apply(variables, **lonely) ** 3)

    value, gradients = jax.jit(jax.value_and_grad(total))(variables)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_padding_changes_nothing(
    apply: Callable[..., jax.Array], graph: dict[str, jax.Array], variables: dict
) -> None:
    padded = {
        "nodes": jnp.concatenate([graph["nodes"], jnp.full((2, WIDTH), 7.0)]),
        "edges": jnp.concatenate([graph["edges"], jnp.ones((3, TYPES))]),
        "senders": jnp.concatenate([graph["senders"], jnp.asarray([NODES, NODES + 1, 0], jnp.int32)]),
        "receivers": jnp.concatenate([graph["receivers"], jnp.asarray([0, NODES, NODES], jnp.int32)]),
        "node_mask": jnp.arange(NODES + 2) < NODES,
    }
    result = apply(variables, **padded)
    np.testing.assert_allclose(result[:NODES], apply(variables, **graph), atol=1e-6)
    assert not np.asarray(result[NODES:]).any()


def test_segment_softmax_sums_to_one_or_to_nothing() -> None:
    scores = jnp.asarray([[1.0], [900.0], [-900.0], [5.0], [2.0]])
    segments = jnp.asarray([0, 0, 1, 2, 2], jnp.int32)
    mask = jnp.asarray([True, True, False, True, True])
    weights = np.asarray(jax.jit(segment_softmax, static_argnums=2)(scores, segments, 5, mask))[:, 0]
    totals = np.bincount(np.asarray(segments), weights, minlength=5)
    np.testing.assert_allclose(totals, [1, 0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(weights[3], 1 / (1 + np.exp(-3)), rtol=1e-5)


def test_take_rows_and_its_gradient() -> None:
    rows, index = jnp.arange(8.0).reshape(4, 2), jnp.asarray([2, 2, 0], jnp.int32)
    np.testing.assert_array_equal(take_rows(rows, index), np.asarray(rows)[[2, 2, 0]])
    gradient = jax.grad(lambda r: jnp.sum(take_rows(r, index)))(rows)
    np.testing.assert_array_equal(gradient[:, 0], [1, 0, 2, 0])

"""The agent sees its state, site by site, and nothing but its state."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sculpt.agents.actor_critic import SiteInputs, forward
from sculpt.agents.observation import to_graph
from sculpt.pruning.budget import INVALID, energy_logits
from tests.agents.toys import SMALL, batched, free_sites, toy_model, toy_space, toy_state


@functools.cache
def compiled():
    """Logits `[sites, options]` and value of one state."""
    agent = toy_state()[0]
    return jax.jit(lambda params, graph, sites: agent.apply({"params": params}, graph, sites))


@pytest.mark.slow
def test_correctness_11_a_sites_logits_depend_on_its_own_features() -> None:
    agent, params, graph, sites = toy_state()

    @jax.jit
    def slopes(site_node: jax.Array, direction: jax.Array) -> jax.Array:
        def logits(nodes: jax.Array) -> jax.Array:
            return agent.apply({"params": params}, graph._replace(nodes=nodes), sites)[0]  # type: ignore[index]

        tangent = jnp.zeros_like(graph.nodes).at[site_node].set(direction)
        return jax.jvp(logits, (graph.nodes,), (tangent,))[1]  # [sites, options]

    direction = jax.random.normal(jax.random.key(0), graph.nodes.shape[1:])
    for site in free_sites(sites):
        own = np.asarray(slopes(sites.nodes[site], direction))[site, np.asarray(sites.valid[site])]
        assert np.abs(own - own.mean()).max() > 1e-4  # a shift that all options share would change nothing


def test_correctness_11_changing_one_sites_features_moves_its_choice() -> None:
    _, params, graph, sites = toy_state()
    before = np.asarray(compiled()(params, graph, sites)[0]).argmax(axis=1)
    for site in free_sites(sites)[:4]:
        other = int(sites.valid[site].sum()) - 1
        liked = sites.retained.at[site].set(jnp.where(jnp.arange(sites.valid.shape[1]) == other, 1.0, 1e-4))
        changed = dataclasses.replace(sites, retained=liked, prior=3.0 * jnp.log(jnp.maximum(liked, 1e-6)))
        after = np.asarray(compiled()(params, graph, changed)[0]).argmax(axis=1)
        assert after[site] == other != before[site]
        np.testing.assert_array_equal(np.delete(after, site), np.delete(before, site))


def test_every_site_has_its_own_distribution() -> None:
    _, params, graph, sites = toy_state()
    probabilities = np.asarray(jax.nn.softmax(compiled()(params, graph, sites)[0]))
    for a in range(len(probabilities)):
        for b in range(a):
            assert np.abs(probabilities[a] - probabilities[b]).max() > 1e-4


def test_correctness_13_same_state_same_bits_other_state_other_choice() -> None:
    _, params, graph, sites = toy_state()
    first, again = (compiled()(params, graph, sites) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    order = np.random.default_rng(0).permutation(len(graph.nodes))
    shuffled = compiled()(params, graph._replace(nodes=graph.nodes[order]), sites)
    real = np.asarray(sites.valid)
    assert np.abs(np.asarray(shuffled[0] - first[0])[real]).max() > 1e-2


@pytest.mark.slow
def test_correctness_13_what_is_learned_from_features_carries_over_and_is_lost_where_they_are_shuffled() -> (
    None
):
    """Layers with large weights are to stay whole, the others to lose most: only the node features tell which is which."""
    agent, params, _, sites = toy_state()
    space, model = toy_space(), toy_model()
    windows = np.asarray(
        [site.index for site in space.sites if site.family == "rect" and len(site.options) > 1]
    )
    layers = [space.trace.layers[space.sites[i].owner].leaf for i in windows]
    leaves, treedef = jax.tree.flatten(model.params)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
        """Node features `[n, nodes, features]` of other networks, and what is to be chosen `[n, windows]`."""

        def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights, large = jax.random.split(key)
            big = jax.random.bernoulli(large, shape=(len(leaves),))
            drawn = [
                jax.random.normal(k, leaf.shape) * jnp.where(b, 1.0, 0.1)
                for k, leaf, b in zip(jax.random.split(weights, len(leaves)), leaves, big)
            ]
            wanted = jnp.where(big[np.asarray(layers)], 0, space.num_options[windows] - 1)
            return to_graph(space, jax.tree.unflatten(treedef, drawn), None, 0.5).nodes, wanted

        return jax.vmap(one)(jax.random.split(key, number))

    def logits(params: dict, nodes: jax.Array) -> jax.Array:
        graph = toy_state()[2]
        return jax.vmap(lambda n: agent.apply({"params": params}, graph._replace(nodes=n), sites)[0])(nodes)  # type: ignore[index]

    def loss(params: dict, nodes: jax.Array, wanted: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, nodes)[:, windows], wanted
        ).mean()

    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params: dict, state: optax.OptState, key: jax.Array) -> tuple[dict, optax.OptState]:
        gradient = jax.grad(loss)(params, *draw(key, 16))
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes Python floats with an integer count
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state  # type: ignore[return-value]

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), 100):
        params, state = step(params, state, key)
    nodes, wanted = draw(jax.random.key(1), 64)
    order = np.random.default_rng(0).permutation(nodes.shape[1])
    right, shuffled = (
        float((jnp.argmax(logits(params, seen)[:, windows], axis=2) == wanted).mean())
        for seen in (nodes, nodes[:, order])
    )
    assert right > 0.95 and shuffled < right - 0.2


def test_correctness_14_relabelling_nodes_leaves_each_site_its_logits() -> None:
    _, params, graph, sites = toy_state()
    new = np.random.default_rng(1).permutation(len(graph.nodes))  # node i becomes new[i]
    relabelled = graph._replace(
        nodes=jnp.zeros_like(graph.nodes).at[new].set(graph.nodes),
        senders=jnp.asarray(new, jnp.int32)[graph.senders],
        receivers=jnp.asarray(new, jnp.int32)[graph.receivers],
    )
    moved = dataclasses.replace(sites, nodes=jnp.asarray(new, jnp.int32)[sites.nodes])
    before, after = compiled()(params, graph, sites), compiled()(params, relabelled, moved)
    np.testing.assert_allclose(after[0], before[0], atol=1e-4)
    np.testing.assert_allclose(after[1], before[1], atol=1e-4)


def test_the_untrained_agent_starts_from_the_energy_prior() -> None:
    agent, _, graph, sites = toy_state()
    params = jax.jit(agent.init)(jax.random.key(1), graph, sites)["params"]
    logits = np.asarray(compiled()(params, graph, sites)[0])
    real = np.asarray(sites.valid)
    prior = np.asarray(energy_logits(toy_space(), toy_model().params))
    assert np.abs(logits - prior)[real].max() < 0.5
    assert np.abs(logits - prior)[real].max() > 0
    assert (logits[~real] == INVALID).all()


def test_the_budget_is_part_of_the_state() -> None:
    _, params, graph, sites = toy_state()
    tight = graph._replace(globals=graph.globals.at[0, 0].set(0.1))
    real = np.asarray(sites.valid)
    shift = compiled()(params, tight, sites)[0] - compiled()(params, graph, sites)[0]
    assert np.abs(np.asarray(shift)[real]).max() > 1e-4


def test_a_batch_is_the_single_state_many_times() -> None:
    agent, params, graph, sites = toy_state()
    logits, values = jax.jit(functools.partial(forward, agent))(params, batched(graph, 3), sites)
    single = compiled()(params, graph, sites)
    real = np.asarray(sites.valid)
    for row in range(3):
        np.testing.assert_allclose(np.asarray(logits[row])[real], np.asarray(single[0])[real], atol=1e-4)
        np.testing.assert_allclose(values[row], single[1], atol=1e-4)


@pytest.mark.parametrize("change", [{"hidden": 8}, {"layers": 2}, {"heads": 4}, {"own_logits": False}])
def test_every_size_changes_the_agent(change: dict) -> None:
    from sculpt.agents.actor_critic import ActorCritic

    _, _, graph, sites = toy_state()

    def shapes(config: object) -> list[tuple[int, ...]]:
        agent = ActorCritic(config)  # type: ignore[arg-type]
        return [
            leaf.shape
            for leaf in jax.tree.leaves(jax.eval_shape(agent.init, jax.random.key(0), graph, sites))
        ]

    assert shapes(SMALL) != shapes(dataclasses.replace(SMALL, **change))


def test_site_inputs_agree_with_the_space() -> None:
    space, (_, _, _, sites) = toy_space(), toy_state()
    assert isinstance(sites, SiteInputs)
    np.testing.assert_array_equal(sites.valid, space.valid)
    np.testing.assert_array_equal(sites.nodes, space.site_nodes)
    np.testing.assert_allclose(np.where(space.valid, sites.cost, 1.0), space.option_cost)
    assert (np.asarray(sites.family).sum(axis=1) == 1).all()

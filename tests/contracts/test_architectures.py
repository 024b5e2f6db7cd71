"""The contract over the whole zoo: what is found, that compaction is exact, what it costs.

The default run takes each network once and broadly; `-m slow` is the full product of networks, groups and ratios.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict, deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from tests import networks
from tests.architectures import ARCHITECTURES
from tests.architectures.equality import (
    Pruned,
    distance,
    drawn_importance,
    drawn_policy,
    gradients,
    in_double,
    leanest_policy,
    outputs,
    prune,
    single_site_policy,
)

EVERYWHERE = ("network input", "network output", "window of a convolution", "size one")
"""Reasons that need no mention in the zoo."""

BOTH = ("channels", "rect")

WITH_GROUPS = [n for n in ARCHITECTURES if ARCHITECTURES[n].groups]
WITH_GRADIENTS = [n for n in WITH_GROUPS if ARCHITECTURES[n].differentiable]
IN_DOUBLE = [n for n in WITH_GROUPS if not ARCHITECTURES[n].single]

each = pytest.mark.parametrize("name", ARCHITECTURES)
each_with_groups = pytest.mark.parametrize("name", WITH_GROUPS)


ALIKE = (
    *("bottlenecks", "preactivation", "pooled", "stacked_einsum", "tied_embedding", "densenet"),
    *("deit", "vit_nnx", "layer_norm_fast", "mixer_without_bias", "feature_pyramid"),
)
"""Networks whose operations are those of another one that the fast tier compiles."""
slow_but = functools.partial(networks.slow_but, among=WITH_GROUPS)


@functools.cache
def built(name: str) -> Model:
    return ARCHITECTURES[name].build(jax.random.key(7))


@functools.cache
def traced(name: str) -> sculpt.Trace:
    return sculpt.trace(built(name), ARCHITECTURES[name].example_input)


@functools.cache
def space_of(name: str, seed: int | None = 5, families: tuple[str, ...] = ("channels",)) -> sculpt.Space:
    """The sites of a network; channels ranked at random by `seed`, or by energy."""
    importance = None if seed is None else drawn_importance(traced(name), seed)
    return sculpt.make_space(traced(name), families, importance=importance)


@functools.cache
def pruned(name: str, seed: int) -> Pruned:
    """The network under a random policy."""
    return prune(built(name), space_of(name), drawn_policy(space_of(name), seed))


@functools.cache
def inputs(name: str, batch: int = 3) -> jax.Array:
    return ARCHITECTURES[name].inputs(batch)


@each
def test_groups_have_the_sizes_that_follow_from_the_architecture(name: str) -> None:
    assert sorted(group.size for group in traced(name).groups) == sorted(ARCHITECTURES[name].groups)


@each
def test_every_axis_is_prunable_or_named_with_its_reason(name: str) -> None:
    trace, expected = traced(name), ARCHITECTURES[name].frozen
    free = {slot for group in trace.groups for slot in group.slots}
    reasons = {(row.leaf, row.axis): row.reason for row in trace.frozen}
    unprunable = {}
    for leaf in trace.leaves:
        for axis in range(len(leaf.shape)):
            slot = (leaf.index, axis)
            assert slot in free or reasons[slot], f"{leaf.path}:{axis} is neither prunable nor explained"
            if slot not in free and not reasons[slot].startswith(EVERYWHERE):
                unprunable[f"{leaf.path}:{axis}"] = reasons[slot]
    assert set(unprunable) == set(expected)
    for axis, reason in unprunable.items():
        assert expected[axis] in reason, axis


@slow_but(*(name for name in WITH_GROUPS if name not in ALIKE))
def test_masked_equals_compacted_at_random_and_costs_what_is_claimed(name: str) -> None:
    pruned(name, 1).assert_same_outputs(inputs(name))
    pruned(name, 1).assert_claimed_cost(inputs(name))


@slow_but(
    "plain", "option_a", "shufflenet", "unet", "group_norm", "grouped_queries", "scanned_layers", "cond"
)
@pytest.mark.fast("plain", "shufflenet", "group_norm", "grouped_queries", "cond")
def test_masked_equals_compacted_with_one_unit_left(name: str) -> None:
    space, x = space_of(name), inputs(name)
    lean = prune(built(name), space, leanest_policy(space))
    assert distance(outputs(built(name), x), lean.assert_same_outputs(x)) > 1e-3


@slow_but("plain", "inverted_residual", "wavenet", "vit", "scanned_layers")
def test_xla_counts_the_claimed_operations(name: str) -> None:
    pruned(name, 1).assert_counted_by_xla(inputs(name))


@slow_but("channels_first", "regularised", "wavenet", among=ARCHITECTURES)
@pytest.mark.fast("wavenet", "channels_first")
def test_channels_and_windows_together(name: str) -> None:
    try:
        space = space_of(name, families=BOTH)
    except ValueError:
        assert not ARCHITECTURES[name].groups
        return
    both = prune(built(name), space, drawn_policy(space, seed=2))
    both.assert_same_outputs(inputs(name))
    both.assert_claimed_cost(inputs(name))
    both.assert_counted_by_xla(inputs(name))


@slow_but("plain", "vgg", "resnext", "fused_split")
@pytest.mark.fast("plain", "vgg", "resnext")
def test_each_group_alone(name: str) -> None:
    space = space_of(name)
    for site in space.sites:
        alone = prune(built(name), space, single_site_policy(space, site.index))
        alone.assert_same_outputs(inputs(name))
        # A unit may be silent, or a branch not taken, for one batch.
        batches = (inputs(name) + jnp.asarray(shift, inputs(name).dtype) for shift in (0, 1, -1, 5, -5))
        assert any(distance(outputs(built(name), x), outputs(alone.masked, x)) > 0 for x in batches), (
            site.name
        )


@pytest.mark.slow
@each
def test_every_option_of_every_site(name: str) -> None:
    try:
        space = space_of(name, families=BOTH)
    except ValueError:
        assert not ARCHITECTURES[name].groups
        return
    for site in space.sites:
        for option in range(1, len(site.options)):
            one = prune(built(name), space, single_site_policy(space, site.index, option))
            one.assert_same_outputs(inputs(name))
            one.assert_claimed_cost(inputs(name))


@pytest.mark.slow
@each_with_groups
@pytest.mark.parametrize("seed", range(2))
def test_many_random_policies(name: str, seed: int) -> None:
    space = space_of(name, seed)
    drawn = prune(built(name), space, drawn_policy(space, seed))
    drawn.assert_same_outputs(inputs(name))
    drawn.assert_claimed_cost(inputs(name))
    drawn.assert_counted_by_xla(inputs(name))


@slow_but(
    "basic_blocks",
    "vit",
    "lstm_function",
    "scanned_layers",
    "custom_jvp",
    "custom_vjp",
    "mapped_batch_norm",
    among=WITH_GRADIENTS,
)
@pytest.mark.fast("custom_jvp", "custom_vjp")
def test_gradients_agree_on_what_survives(name: str) -> None:
    # Without a state training runs the same program; with dropout its draws differ.
    training = bool(built(name).state) and not ARCHITECTURES[name].dropout
    pruned(name, 1).assert_same_gradients(inputs(name), training)


@pytest.mark.parametrize("name", [n for n in WITH_GROUPS if ARCHITECTURES[n].dropout])
@pytest.mark.fast("plain_nnx", "mapped_dropout")
def test_dropout_draws_for_what_is_left(name: str) -> None:
    """Draws differ between shapes, so nothing is compared."""
    (found, _), gradient = gradients(pruned(name, 1).small, inputs(name), training=True)
    assert found.shape == outputs(built(name), inputs(name)).shape
    for leaf, small in zip(*map(jax.tree.leaves, (gradient, pruned(name, 1).small.params)), strict=True):
        assert leaf.shape == small.shape and np.isfinite(leaf).all()


@slow_but(among=WITH_GRADIENTS)
def test_gradients_in_evaluation_mode(name: str) -> None:
    pruned(name, 1).assert_same_gradients(inputs(name), training=False)


@slow_but("shufflenet", "lstm_function", "group_norm", among=IN_DOUBLE)
@pytest.mark.fast("lstm_function")
def test_masked_equals_compacted_in_double_precision(name: str) -> None:
    # Flax promotes to at least float32 by rules that strict promotion forbids.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model, x = in_double(built(name)), np.asarray(inputs(name))
        if np.issubdtype(x.dtype, np.floating):
            x = x.astype(np.float64)
        double = prune(model, space_of(name), drawn_policy(space_of(name), seed=4))
        assert double.assert_same_outputs(jnp.asarray(x), 1e-10).dtype == np.float64


@slow_but("option_a", "grouped_queries")
@pytest.mark.slow
def test_compacting_twice_equals_compacting_once(name: str) -> None:
    space, x = space_of(name, None), inputs(name)
    first = prune(built(name), space, (space.num_options // 2).astype(np.int32), check=True)
    once = prune(first.masked, space, leanest_policy(space))
    trace = sculpt.trace(first.small, ARCHITECTURES[name].example_input)
    again = sculpt.make_space(trace, space.families)
    twice = prune(first.small, again, leanest_policy(again))
    assert distance(outputs(once.masked, x), outputs(twice.small, x)) <= 1e-4
    for one, other in zip(*(jax.tree.leaves(m.params) for m in (once.small, twice.small)), strict=True):
        np.testing.assert_array_equal(one, other)


@slow_but("plain_nnx", "swin", "lstm_function")
@pytest.mark.fast("plain_nnx")
def test_other_batch_sizes_and_transformations(name: str) -> None:
    masked, small = pruned(name, 1).masked, pruned(name, 1).small
    x = inputs(name, 5)
    expected = outputs(masked, x)

    def one_by_one(model: Model) -> jax.Array:
        apply = jax.vmap(lambda params, image: model.apply(params, model.state, image[None])[0], (None, 0))
        return jax.jit(apply)(model.params, x)

    assert distance(one_by_one(masked), one_by_one(small)) <= 1e-4
    assert distance(outputs(masked, x[:1]), outputs(small, x[:1])) <= 1e-4
    # As many images as there are pixels in a row, or channels.
    assert distance(outputs(masked, inputs(name, 8)), outputs(small, inputs(name, 8))) <= 1e-4
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), jax.device_get(small.params))
    several = jax.vmap(lambda params: small.apply(params, small.state, x))
    assert distance(expected, jax.jit(several)(stacked)[0]) <= 1e-4


def relabelled(model: Model, order: np.ndarray) -> Model:
    """The same network with its parameters under other names, in another order, nested differently."""
    leaves, structure = jax.tree.flatten(model.params)

    def restored(params: Any) -> Any:
        flat: list[Any] = [None] * len(leaves)
        for leaf, value in zip(order, jax.tree.leaves(params), strict=True):
            flat[leaf] = value
        return jax.tree.unflatten(structure, flat)

    params: dict[str, Any] = {"inner": {}}
    for place, leaf in enumerate(order):
        # "inner" sorts before "outer": the first half is nested one level deeper.
        if place < len(order) // 2:
            params["inner"][f"part{place:03}"] = leaves[leaf]
        else:
            params[f"outer{place:03}"] = leaves[leaf]
    return Model(
        lambda params, state, x: model.apply(restored(params), state, x),
        lambda params, state, x, key: model.apply_train(restored(params), state, x, key),
        params,
        model.state,
    )


def slots_of(space: sculpt.Space, order: np.ndarray) -> list[tuple[Any, ...]]:
    """What tells the sites of a space apart but for names: their family and the leaves and axes they act on."""
    groups, layers = space.trace.groups, space.trace.layers
    return [
        (s.family, s.sizes, frozenset((int(order[leaf]), axis) for leaf, axis in groups[s.owner].slots))
        if s.family == "channels"
        else (s.family, s.sizes, int(order[layers[s.owner].leaf]))
        for s in space.sites
    ]


@slow_but("plain", "densenet", "shufflenet", "unet", "vit", "lstm_function", "scanned_layers")
def test_relabelling_changes_nothing_but_names(name: str) -> None:
    space, model = space_of(name, None, BOTH), built(name)
    same = np.arange(len(space.trace.leaves))
    order = np.random.default_rng(9).permutation(len(same))
    renamed = sculpt.make_space(sculpt.trace(relabelled(model, order), ARCHITECTURES[name].example_input))
    assert Counter(slots_of(space, same)) == Counter(slots_of(renamed, order))
    assert space.trace.macs == renamed.trace.macs
    assert space.trace.num_params == renamed.trace.num_params


@slow_but("film", "squeeze_excitation", "scan_function")
@pytest.mark.slow
def test_relabelled_networks_compact_alike(name: str) -> None:
    space, model, x = space_of(name, None), built(name), inputs(name)
    same = np.arange(len(space.trace.leaves))
    order = np.random.default_rng(9).permutation(len(same))
    other = relabelled(model, order)
    renamed = sculpt.make_space(sculpt.trace(other, ARCHITECTURES[name].example_input), ("channels",))
    policy = drawn_policy(space, seed=6)
    choices: dict[Any, deque[int]] = defaultdict(deque)
    for slots, choice in zip(slots_of(space, same), policy):
        choices[slots].append(int(choice))
    mapped = np.asarray([choices[slots].popleft() for slots in slots_of(renamed, order)], np.int32)
    one, two = prune(model, space, policy), prune(other, renamed, mapped)
    assert distance(outputs(one.small, x), outputs(two.small, x)) <= 1e-5
    shapes = [leaf.shape for leaf in jax.tree.leaves(one.small.params)]
    assert [leaf.shape for leaf in jax.tree.leaves(two.small.params)] == [shapes[leaf] for leaf in order]

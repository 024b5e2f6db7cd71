"""Sites, options and the policies that choose among them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.pruning import space as space_module
from sculpt.pruning.families.patterns import window_shapes
from sculpt.pruning.importance import weights as importance_weights
from sculpt.pruning.space import make_choices
from tests.networks import network, traced


def test_windows_of_a_three_by_three_kernel() -> None:
    assert window_shapes((3, 3)) == [(3, 3), (2, 3), (3, 2), (2, 2), (1, 3), (3, 1), (1, 1)]
    assert (5, 5) in window_shapes((5, 5)) and (2, 2) in window_shapes((5, 5))
    assert window_shapes((5,)) == [(5,), (4,), (2,)]


def test_option_zero_keeps_everything_and_options_shrink() -> None:
    space = sculpt.make_space(traced("residual"))
    for site in space.sites:
        kept = [option.kept for option in site.options]
        assert kept[0] == 1.0 and kept == sorted(kept, reverse=True) and kept[-1] > 0
    assert space.option_cost[:, 0] == pytest.approx(1.0)
    assert (space.option_cost <= 1.0 + 1e-6).all()


def test_round_to_and_min_keep_bound_the_counts() -> None:
    space = sculpt.make_space(traced("residual"), families=("channels",), round_to=4, min_keep=4)
    for site in space.sites:
        for option in site.options[1:]:
            assert option.counts[0] % 4 == 0 and option.counts[0] >= 4


def test_a_device_names_its_multiple() -> None:
    by_name, by_number = (
        sculpt.make_space(traced("residual"), ("channels",), round_to=n) for n in ("cpu", 8)
    )
    assert [site.options for site in by_name.sites] == [site.options for site in by_number.sites]


def test_groups_of_no_more_than_min_keep_stay_whole() -> None:
    sizes = sorted(group.size for group in traced("residual").groups)
    space = sculpt.make_space(traced("residual"), ("channels",), min_keep=sizes[-1] - 1)
    assert all(site.sizes[0] == sizes[-1] and len(site.options) == 2 for site in space.sites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"families": ("channels",), "min_keep": 999},
            "min_keep 999 leave every group whole, the largest has",
        ),
        ({"families": ("chanels",)}, "did you mean 'channels'"),
        ({"families": ()}, "distinct names"),
        ({"families": ("rect", "rect")}, "distinct names"),
        ({"round_to": 0}, "round_to must be a whole number of at least 1"),
        ({"round_to": "tpus"}, "one of cpu, gpu, tpu, got 'tpus'; did you mean 'tpu'"),
        ({"min_keep": -1}, "min_keep must be a whole number of at least 0"),
    ],
)
def test_bad_spaces_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.make_space(traced("plain"), **options)


def test_kernels_that_something_else_reads_too_keep_their_windows() -> None:
    """Also where both read a copy in another dtype."""

    def apply(params: dict[str, jax.Array], x: jax.Array, twice: bool = True) -> jax.Array:
        kernel = params["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y * jnp.exp(kernel).mean() if twice else y).mean((1, 2)) @ params["head"]

    params = {"kernel": jnp.ones((3, 3, 3, 4)), "head": jnp.ones((4, 5))}
    traces = [
        sculpt.trace(
            sculpt.from_function(functools.partial(apply, twice=twice), params), jnp.zeros((1, 8, 8, 3))
        )
        for twice in (True, False)
    ]
    with pytest.raises(ValueError, match="nothing to prune"):
        sculpt.make_space(traces[0], "rect")
    assert [site.name for site in sculpt.make_space(traces[1], "rect").sites] == ["kernel"]


def test_nothing_to_prune_is_said_with_the_reasons() -> None:
    model = sculpt.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))})
    with pytest.raises(ValueError, match="every axis is frozen"):
        sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 3))))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (np.zeros(3, np.int32), r"integers \[\.\.\., "),
        (np.zeros(100, np.float32), r"integers \[\.\.\., "),
        ("high", "has options 0"),
        ("negative", "has options 0"),
    ],
)
def test_policies_that_do_not_fit_are_refused(policy: object, message: str) -> None:
    space = sculpt.make_space(traced("plain"))
    if isinstance(policy, str):
        policy = np.full(space.num_sites, 99 if policy == "high" else -1)
    with pytest.raises(ValueError, match=message):
        sculpt.make_masks(space, network("plain").params, policy)


def test_parameters_of_another_network_are_refused() -> None:
    space = sculpt.make_space(traced("plain"))
    with pytest.raises(ValueError, match="do not fit the traced network"):
        sculpt.make_masks(space, network("biased").params, np.zeros(space.num_sites, np.int32))


def test_masks_keep_the_strongest_units_and_windows() -> None:
    model = network("function")
    space = sculpt.make_space(traced("function"))
    channels = next(s for s in space.sites if s.family == "channels" and s.sizes == (8,))
    rect = next(s for s in space.sites if s.family == "rect")
    policy = np.zeros(space.num_sites, np.int32)
    policy[channels.index] = 4
    masks = sculpt.make_masks(space, model.params, policy)
    first, second = (np.square(np.asarray(model.params[n])) for n in ("first", "second"))
    importance = first.sum((0, 1, 2)) / first.sum() + second.sum((0, 1, 3)) / second.sum()
    strongest = np.sort(np.argsort(-importance)[: channels.options[4].counts[0]])
    assert np.flatnonzero(np.asarray(masks["bias"])).tolist() == strongest.tolist()
    policy = np.zeros(space.num_sites, np.int32)
    policy[rect.index] = len(rect.options) - 1
    kernel = space.trace.leaves[space.trace.layers[rect.owner].leaf].path
    mask = np.asarray(sculpt.make_masks(space, model.params, policy)[kernel])
    energy = np.square(np.asarray(model.params[kernel])).sum((2, 3))
    assert np.argwhere(mask.any((2, 3))).tolist() == [list(np.unravel_index(energy.argmax(), energy.shape))]


@pytest.mark.slow
def test_masks_are_found_again_on_masked_parameters_and_under_vmap() -> None:
    model = network("residual")
    space = sculpt.make_space(traced("residual"))
    policies = sculpt.random_policies(space, jax.random.key(0), 3)
    batched = jax.jit(jax.vmap(lambda p: sculpt.make_masks(space, model.params, p)))(policies)
    for i, policy in enumerate(policies):
        masks = sculpt.make_masks(space, model.params, policy)
        again = sculpt.make_masks(space, sculpt.apply_masks(model, masks).params, policy)
        for a, b, c in zip(*map(jax.tree.leaves, (masks, again, batched))):
            assert np.array_equal(a, b) and np.array_equal(a, c[i])


def test_compact_refuses_a_model_without_the_zeros() -> None:
    space = sculpt.make_space(traced("plain"))
    with pytest.raises(ValueError, match="zeros in place"):
        sculpt.compact(network("plain"), space, space.num_options - 1)


def test_compact_describes_old_and_new_shapes() -> None:
    model, space = network("plain"), sculpt.make_space(traced("plain"), families=("channels",))
    policy = space.num_options - 1
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy)
    assert "Conv_1/kernel [3, 3, 8, 12] -> [3, 3, 1, 2]" in small.apply.describe()


@pytest.mark.slow
def test_an_axis_of_which_only_whole_groups_can_go_stays_in_part() -> None:
    def norm(x: jax.Array) -> jax.Array:
        return nn.softmax(x.reshape(*x.shape[:-1], 2, 4)).reshape(x.shape)

    module, example = nn.Sequential([nn.Conv(8, (3, 3)), norm, nn.Conv(4, (1, 1))]), jnp.zeros((1, 4, 4, 3))
    model = sculpt.from_linen(module, module.init(jax.random.key(0), example), train_argument=None)
    space = sculpt.make_space(sculpt.trace(model, example), families=("channels",))
    first, last = sculpt.compact(model, space, np.zeros(space.num_sites, np.int32)).describe()
    assert "axis 2 stays: network input" in first and "axis 3 stays in part: " in first
    assert "axis 2 stays in part: " in last and "axis 3 stays: network output" in last


def test_apply_masks_refuses_what_is_no_mask() -> None:
    model = network("plain")
    with pytest.raises(ValueError, match="boolean mask"):
        sculpt.apply_masks(model, model.params)
    with pytest.raises(ValueError, match="pytree like params"):
        sculpt.apply_masks(model, {})


@pytest.mark.slow
def test_graph_follows_the_policy_and_the_budget_and_nothing_random() -> None:
    model, space = network("residual"), sculpt.make_space(traced("residual"))
    dense = sculpt.to_graph(space, model.params)
    again = sculpt.to_graph(space, model.params)
    assert np.array_equal(dense.nodes, again.nodes)
    pruned = sculpt.to_graph(space, model.params, space.num_options - 1, 0.5)
    assert not np.array_equal(dense.nodes, pruned.nodes) and np.isfinite(pruned.nodes).all()
    assert dense.nodes.shape[0] == int(dense.n_node[0]) and dense.edges.shape[0] == int(dense.n_edge[0])
    batched = jax.vmap(lambda p: sculpt.to_graph(space, model.params, p, 0.5).nodes)(
        sculpt.random_policies(space, jax.random.key(0), 2)
    )
    assert batched.shape == (2, *dense.nodes.shape)
    at_hand = sculpt.to_graph(space, model.params, choices=make_choices(space, model.params))
    assert np.array_equal(dense.nodes, at_hand.nodes)


@pytest.mark.slow
def test_sites_alike_are_compiled_once() -> None:
    """Whatever the space, and whatever the parameters."""
    model, space = network("residual"), sculpt.make_space(traced("residual"))
    choices = make_choices(space, model.params)
    parts = (space_module._choose, space_module._row, importance_weights._energy_share)
    compiled = [getattr(part, "_cache_size")() for part in parts]  # noqa: B009
    other = make_choices(sculpt.make_space(traced("residual")), jax.tree.map(jnp.negative, model.params))
    assert [getattr(part, "_cache_size")() for part in parts] == compiled and min(compiled) > 0  # noqa: B009
    for one, two in zip(jax.tree.leaves(choices), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_was_traced_is_shown_by_what_matters_of_it() -> None:
    trace = traced("residual")
    shown = f"{len(trace.layers)} layers, {len(trace.groups)} groups of coupled axes, {trace.macs:,} MACs"
    assert repr(trace).startswith(f"Trace({shown}, ") and len(repr(trace)) < 120
    space = sculpt.make_space(trace)
    assert repr(space) == f"Space({space.num_sites} sites of channels, rect, in {trace!r})"

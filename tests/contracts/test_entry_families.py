"""One suite for the families that choose single entries, alone and in one space with channels."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.pipeline.closing import theoretical_macs
from sculpt.pruning.compaction.compactor import max_difference
from sculpt.pruning.families.patterns import FAMILIES
from sculpt.pruning.space import make_choices
from tests.networks import network, slow_but, traced
from tests.scoring.test_evaluate import IMAGES, LABELS, one_by_one
from tests.training.tiny import BASE, KEY, largest_masked, tiny_model, tiny_splits

ENTRIES = tuple(name for name, family in FAMILIES.items() if not family.compacts)
MIXED = ("channels", "entries4", "nm", "unstructured")
"""Every kernel of every network is thinned out by one of the last three."""


@functools.cache
def space_of(name: str, families: tuple[str, ...] = MIXED) -> sculpt.Space:
    return sculpt.make_space(traced(name), families)


def drawn(space: sculpt.Space, seed: int = 3) -> np.ndarray:
    return np.asarray(sculpt.random_policies(space, jax.random.key(seed), 1)[0])


@pytest.mark.parametrize("name", ["residual", "separable"])
@pytest.mark.parametrize("family", ENTRIES)
@pytest.mark.fast("block-separable")
def test_every_option_keeps_as_many_entries_as_it_says(family: str, name: str) -> None:
    space = space_of(name, (family,))
    choices = jax.device_get(make_choices(space, network(name).params))
    for site, choice in zip(space.sites, choices):
        assert site.kernel is not None and len(choice.retained) == len(site.options)
        leaf = traced(name).leaves[site.kernel.leaf]
        assert choice.entries.shape == leaf.shape and choice.entries.dtype == np.uint8
        masks = [(choice.entries >> o) & 1 == 1 for o in range(len(site.options))]
        assert masks[0].all()
        energy = np.square(np.asarray(jax.tree.leaves(network(name).params)[site.kernel.leaf], np.float64))
        for option, mask, retained in zip(site.options, masks, choice.retained):
            assert (mask.sum(),) == option.counts and option.kept == pytest.approx(mask.mean())
            assert retained == pytest.approx(energy[mask].sum() / energy.sum(), rel=1e-5)
        # 4:8 and 2:4 keep as many, of other groups; the best row need not lie in the two best columns.
        nested = [m for o, m in zip(site.options, masks) if o.label != "4:8" and family != "rect_grouped"]
        assert all((more | less == more).all() for more, less in itertools.pairwise(nested))


@pytest.mark.parametrize("name", ["residual", "separable"])
@pytest.mark.parametrize("family", ENTRIES)
@pytest.mark.fast("nm-separable", "block-separable")
def test_costs_are_those_of_the_entries_that_stay(family: str, name: str) -> None:
    space, trace = space_of(name, (family,)), traced(name)
    policy = drawn(space)
    masks = sculpt.make_masks(space, network(name).params, policy)
    kept = [np.asarray(mask) for mask in jax.tree.leaves(masks)]
    macs = [layer.macs * kept[layer.leaf].mean() for layer in trace.layers]
    np.testing.assert_allclose(sculpt.layer_macs(space, policy), macs, rtol=1e-5)
    costs = sculpt.cost(space, policy)
    assert float(costs.macs) == pytest.approx(sum(macs), rel=1e-5)
    assert theoretical_macs(space, policy, masks) == pytest.approx(sum(macs), rel=1e-12)
    assert float(costs.params) == pytest.approx(sum(mask.sum() for mask in kept), rel=1e-5)
    assert float(costs.macs_realised) == pytest.approx(trace.macs, rel=1e-5)


@slow_but("residual", "separable", "nnx")
@pytest.mark.slow
def test_masked_equals_compacted_together_with_channels(name: str) -> None:
    """Channels go, the other zeros stay in place."""
    space, trace = space_of(name), traced(name)
    policy = drawn(space)
    masks = sculpt.make_masks(space, network(name).params, policy)
    masked = sculpt.apply_masks(network(name), masks)
    small = sculpt.compact(masked, space, policy, masks=masks)
    assert max_difference(masked, small, jnp.asarray(IMAGES[:4])) <= 1e-5
    macs, _ = sculpt.count_cost(small, IMAGES)
    assert float(sculpt.cost(space, policy).macs_realised) == pytest.approx(macs, rel=1e-5)
    channels = sculpt.make_space(trace, "channels")
    removed = sculpt.make_masks(channels, network(name).params, policy[: channels.num_sites])
    for path, zeros, whole, cut in zip(
        trace.leaves, *map(jax.tree.leaves, (masked.params, removed, small.params))
    ):
        inside = np.asarray(zeros)[np.asarray(whole)].reshape(np.shape(cut))
        np.testing.assert_array_equal(inside, cut, err_msg=path.path)
    again = sculpt.make_masks(space, masked.params, policy)
    assert all(
        np.array_equal(np.where(mask, weight, 0), weight)
        for mask, weight in zip(*map(jax.tree.leaves, (again, masked.params)))
    )


@pytest.mark.slow
def test_scores_equal_a_plain_loop_and_budgets_are_met() -> None:
    space = space_of("residual")
    policies = sculpt.random_policies(space, jax.random.key(2), 4, budget=0.3)
    assert (np.asarray(sculpt.cost(space, policies).macs_ratio) <= 0.3 + 1e-5).all()
    plan = sculpt.EvaluationPlan(policies_per_chunk=4, images_per_batch=25)
    scores = sculpt.evaluate_policies(network("residual"), space, policies, IMAGES, LABELS, None, plan)
    for i, policy in enumerate(policies[:2]):
        accuracy, loss = one_by_one("residual", space, policy, None)
        assert float(scores.accuracy[i]) == pytest.approx(accuracy, abs=1e-6)
        assert float(scores.loss[i]) == pytest.approx(loss, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_search_and_fine_tuning_hold_the_zeros() -> None:
    model, splits = tiny_model(), tiny_splits()
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 8, 8, 1))), "2:4")
    config = sculpt.SearchConfig(
        budget=0.6,
        evaluations=8,
        batch_size=4,
        method="random",
        score_images=64,
        calibration_images=64,
        rerank=0,
    )
    found = sculpt.search(model, space, splits, config, KEY)
    assert float(sculpt.cost(space, found.policy).macs_ratio) <= 0.6
    masks = sculpt.make_masks(space, model.params, found.policy)
    tuned = sculpt.finetune(model, masks, splits, BASE, KEY)
    assert largest_masked(tuned.params, masks) == 0.0
    assert (
        max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (tuned.params, model.params))))
        > 0
    )
    small = sculpt.compact(tuned, space, found.policy, masks=masks)
    assert sculpt.count_cost(small, jnp.zeros((1, 8, 8, 1))) == (space.trace.macs, space.trace.num_params)


@pytest.mark.slow
def test_gradients_are_zero_where_entries_are_gone() -> None:
    model, space = network("residual"), space_of("residual")
    masks = sculpt.make_masks(space, model.params, space.num_options - 1)

    def loss(params: object) -> jax.Array:
        masked = sculpt.apply_masks(model.replace(params=params), masks)
        return jnp.square(masked(IMAGES[:4])).sum()

    gradient = jax.jit(jax.grad(loss))(model.params)
    assert largest_masked(gradient, masks) == 0.0
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_units_that_one_array_lost_by_chance_stay() -> None:
    """All entries of hidden unit 0 are the smallest of `a`, not those of `b`."""
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (4, 8)) + 3.0, "b": jax.random.normal(keys[1], (8, 4))}
    params["a"] = params["a"].at[:, 0].set(1e-3)
    model = sculpt.from_function(lambda p, x: jnp.cos(x @ p["a"]) @ p["b"], params)
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 4))), "unstructured")
    policy = [1, 0]
    masks = sculpt.make_masks(space, params, policy)
    assert not masks["a"][:, 0].any()
    small = sculpt.compact(sculpt.apply_masks(model, masks), space, policy)
    assert jax.tree.map(jnp.shape, small.params) == jax.tree.map(jnp.shape, params)

"""One contract for every kind of importance on every structure, what a space makes of it, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.agents.observation import site_features
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import max_difference
from sculpt.pruning.importance.scores import KINDS, Importance
from sculpt.pruning.space import make_choices
from sculpt.tracing.tracer import Group, Trace
from tests.networks import network, traced

NAMES = ("biased", "residual", "concatenated", "separable", "nnx", "function")
IMAGES = jax.random.normal(jax.random.key(11), (7, 8, 8, 3))
LABELS = np.asarray([0, 3, 1, 4, 2, 0, 1])
SAMPLES: dict[str, Any] = {
    "images": IMAGES,
    "labels": LABELS,
    "key": jax.random.key(2),
    "images_per_batch": 4,
}
DETERMINED = [kind for kind in KINDS if kind != "random"]
ZERO_IS_LOWEST = [kind for kind in DETERMINED if kind != "geometric_median"]


@functools.cache
def varied(name: str) -> Model:
    """The network with parameters away from the ones and zeros that some start from."""
    model = network(name)
    noise = np.random.default_rng(5)
    # By numpy, here and below: operation by operation every shape would be compiled anew.
    params = jax.tree.map(
        lambda w: jax.device_put(np.asarray(w + 0.1 * noise.standard_normal(w.shape), w.dtype)),
        jax.device_get(model.params),
    )
    return model.replace(params=params)


@functools.cache
def scored(name: str, kind: str) -> Importance:
    return sculpt.importance(varied(name), traced(name), kind, **SAMPLES)


def units_along(trace: Trace, group: Group, term: Any) -> list[np.ndarray]:
    """For each axis of an array `[group size, indices per unit]`: the indices of each unit (no column: not in the group)."""
    found = []
    for axis in term:
        labels = trace.axes.labels(axis, group.atom)
        found.append(np.stack([np.flatnonzero(labels == unit) for unit in range(group.size)]))
    return found


def permuted(model: Model, trace: Trace, orders: dict[int, np.ndarray]) -> Model:
    """The same function with the units of each group in another order: unit `order[i]` comes to stand at place i."""
    leaves, treedef = jax.tree.flatten(jax.device_get((model.params, model.state)))
    terms = [trace.flow.terms[value] for value in trace.program.inputs[:-1]]
    for group in trace.groups:
        for i, (leaf, term) in enumerate(zip(leaves, terms, strict=True)):
            for axis, units in enumerate(units_along(trace, group, term)):
                index = np.arange(leaf.shape[axis])
                index[units] = units[orders[group.index]]
                if units.size:
                    leaf = np.take(leaf, index, axis=axis)
            leaves[i] = leaf
    params, state = jax.device_put(jax.tree.unflatten(treedef, leaves))
    return model.replace(params=params, state=state)


def without_units(model: Model, trace: Trace, gone: dict[int, int]) -> Model:
    """All weights of one unit of each group set to zero."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(np.array, model.params))
    for group in trace.groups:
        for leaf, axis in group.slots:
            units = units_along(trace, group, trace.leaf_term(leaf))[axis]
            index = (slice(None),) * axis + (units[gone[group.index]],)
            leaves[leaf][index] = 0
    return model.replace(params=jax.device_put(jax.tree.unflatten(treedef, leaves)))


def pairs(kinds: Sequence[str]) -> list[Any]:
    """Every kind on every network; in the default run each kind on one, and each network with one."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(kind, name, marks=[] if kind == kinds[0] or name == "residual" else slow)
        for kind in kinds
        for name in NAMES
    ]


@pytest.mark.parametrize(("kind", "name"), pairs(KINDS))
@pytest.mark.fast(
    "energy-biased", "energy-function", "l1-residual", "l2-residual", "batch_norm-residual", "random-residual"
)
def test_scores_are_one_finite_number_per_unit_of_every_group(kind: str, name: str) -> None:
    result = scored(name, kind)
    assert result.kind == kind
    assert result.groups == tuple(group.name for group in traced(name).groups)
    for group, score in zip(traced(name).groups, result.scores, strict=True):
        assert isinstance(score, np.ndarray) and score.dtype == np.float32 and score.shape == (group.size,)
        assert np.isfinite(score).all() and (score >= 0).all() and not score.flags.writeable
        # Of two units neither is nearer to the other.
        assert np.ptp(score) > 0 or (kind, group.size) == ("geometric_median", 2)


@pytest.mark.parametrize(("kind", "name"), pairs(DETERMINED))
@pytest.mark.fast(
    "energy-concatenated",
    "energy-nnx",
    "energy-function",
    "l2-residual",
    "batch_norm-residual",
    "energy-biased",
)
def test_permuting_units_permutes_their_scores(kind: str, name: str) -> None:
    trace, model = traced(name), varied(name)
    rng = np.random.default_rng(0)
    orders = {group.index: np.roll(rng.permutation(group.size), 1) for group in trace.groups}
    other = permuted(model, trace, orders)
    np.testing.assert_allclose(other(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)
    scores = sculpt.importance(other, trace, kind, **SAMPLES).scores
    for group, before, after in zip(trace.groups, scored(name, kind).scores, scores):
        np.testing.assert_allclose(after, before[orders[group.index]], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), pairs(ZERO_IS_LOWEST))
def test_a_unit_of_zeros_scores_lowest(kind: str, name: str) -> None:
    trace = traced(name)
    gone = {group.index: group.size - 1 - group.index % 2 for group in trace.groups}
    model = without_units(varied(name), trace, gone)
    for group, score in zip(trace.groups, sculpt.importance(model, trace, kind, **SAMPLES).scores):
        others = np.delete(score, gone[group.index])
        assert score[gone[group.index]] == 0 and others.max() > 0 and others.min() >= 0


@pytest.mark.parametrize(("kind", "name"), pairs(KINDS))
@pytest.mark.slow
def test_masks_drop_the_lowest_before_and_after_fine_tuning_and_compaction_agrees(
    kind: str, name: str
) -> None:
    trace, model, result = traced(name), varied(name), scored(name, kind)
    space = sculpt.make_space(trace, importance=result)
    policy = np.asarray(sculpt.random_policies(space, jax.random.key(3), 1)[0])
    masks = sculpt.make_masks(space, model.params, policy)
    leaves = [np.asarray(mask) for mask in jax.tree.leaves(masks)]
    for site in (site for site in space.sites if site.family == "channels"):
        group = trace.groups[site.owner]
        count = site.options[policy[site.index]].counts[0]
        lowest = np.sort(np.argsort(result.scores[group.index])[: group.size - count])
        for leaf, axis in group.slots:
            mask = np.moveaxis(leaves[leaf], axis, 0)
            kept = mask[units_along(trace, group, trace.leaf_term(leaf))[axis]]
            kept = kept.reshape(group.size, -1).any(axis=1)
            assert np.flatnonzero(~kept).tolist() == lowest.tolist()
    # Fine-tuning moves every weight that is left, far enough to change any ranking by weights.
    moved = jax.tree.map(lambda w: (w + 2.0 * jnp.cos(7.0 * w)).astype(w.dtype), model.params)
    tuned = sculpt.apply_masks(model.replace(params=moved), masks)
    again = jax.jit(lambda params: sculpt.make_masks(space, params, policy))(tuned.params)
    for leaf, before, after in zip(trace.leaves, leaves, jax.tree.leaves(again), strict=True):
        assert np.array_equal(before, after), leaf.path
    assert max_difference(tuned, sculpt.compact(tuned, space, policy), IMAGES) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_retained_shares_are_those_of_the_scores(kind: str) -> None:
    model, result = varied("residual"), scored("residual", kind)
    space = sculpt.make_space(traced("residual"), ("channels",), importance=result)
    table = np.asarray(jax.jit(lambda params: site_features(space, params))(model.params).retained)
    for site in space.sites:
        ranked = np.sort(result.scores[site.owner].astype(np.float64))[::-1]
        for i, option in enumerate(site.options):
            assert table[site.index, i] == pytest.approx(
                ranked[: option.counts[0]].sum() / ranked.sum(), rel=1e-5
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fast("energy", "l1", "l2", "batch_norm", "random")
def test_narrow_parameters_are_scored_in_float32(kind: str) -> None:
    wide = varied("function")
    narrow = wide.replace(params=jax.tree.map(lambda w: w.astype(jnp.bfloat16), wide.params))
    trace = sculpt.trace(narrow, jnp.zeros((1, 8, 8, 3), jnp.bfloat16))
    result = sculpt.importance(narrow, trace, kind, **SAMPLES)
    for score, expected in zip(result.scores, scored("function", kind).scores):
        assert score.dtype == np.float32
        np.testing.assert_allclose(score, expected, rtol=0.1)


def test_without_importance_a_space_ranks_by_energy() -> None:
    model, trace = varied("residual"), traced("residual")
    default = make_choices(sculpt.make_space(trace), model.params)
    named = make_choices(sculpt.make_space(trace, importance=scored("residual", "energy")), model.params)
    for a, b in zip(jax.tree.leaves(default), jax.tree.leaves(named), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_random_scores_follow_the_key() -> None:
    first, again, other = (
        sculpt.importance(varied("plain"), traced("plain"), "random", key=jax.random.key(seed)).scores
        for seed in (0, 0, 1)
    )
    for a, b, c in zip(first, again, other):
        assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert not np.array_equal(first[0], first[1][: len(first[0])])


@pytest.mark.parametrize("kind", ["taylor", "activation"])
@pytest.mark.slow
def test_all_images_count(kind: str) -> None:
    """The last, incomplete micro-batch too."""
    model, trace = varied("plain"), traced("plain")
    changed = IMAGES.at[-1].multiply(3.0)
    other = sculpt.importance(model, trace, kind, **{**SAMPLES, "images": changed}).scores
    for a, b in zip(scored("plain", kind).scores, other):
        assert np.abs(a - b).max() > 1e-4


def test_own_scores_may_be_negative_and_equal() -> None:
    trace = traced("plain")
    scores = (np.arange(trace.groups[0].size) - 6.0, np.zeros(trace.groups[1].size))
    own = Importance("own", tuple(group.name for group in trace.groups), scores)
    space = sculpt.make_space(trace, ("channels",), importance=own)
    first, second = (choice for choice in make_choices(space, varied("plain").params))
    assert np.flatnonzero(np.asarray(first.keeps[0][4])).tolist() == [4, 5, 6, 7]
    # Only the last unit is worth more than nothing, so every option retains it all.
    np.testing.assert_allclose(first.retained, 1.0)
    np.testing.assert_allclose(second.retained, [o.kept for o in space.sites[1].options], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tailor"}, "unknown kind of importance 'tailor', expected one of .*did you mean 'taylor'"),
        ({"kind": "zzz"}, r"expected one of \[.*'taylor'\]$"),
        ({"kind": "taylor"}, "needs images and labels, got no images and no labels: pass images="),
        ({"kind": "taylor", "images": IMAGES}, "got no labels: pass labels="),
        ({"kind": "activation"}, "'activation' needs images, got no images"),
        ({"kind": "random"}, "'random' needs key, got no key"),
        (
            {"kind": "activation", "images": IMAGES[0]},
            r"images float32\[n, 8, 8, 3\], as in the trace, got float32\[8, 8, 3\]",
        ),
        (
            {"kind": "activation", "images": IMAGES[:, :4]},
            r"images float32\[n, 8, 8, 3\].*got float32\[7, 4, 8, 3\]",
        ),
        ({"kind": "activation", "images": IMAGES[:0]}, r"got float32\[0, 8, 8, 3\]"),
        (
            {"kind": "activation", "images": np.zeros((2, 8, 8, 3), np.uint8)},
            "got uint8: normalise them first",
        ),
        (
            {"kind": "activation", "images": IMAGES, "images_per_batch": 0},
            "images_per_batch must be at least 1",
        ),
        ({"kind": "taylor", "images": IMAGES, "labels": LABELS[:3]}, r"integer labels \[7\].*got int32\[3\]"),
        ({"kind": "taylor", "images": IMAGES, "labels": np.ones(7)}, r"integer labels \[7\].*got float32"),
        ({"kind": "taylor", "images": IMAGES, "labels": LABELS + 1}, "labels from 0 to 4 .*, got 1 to 5"),
        ({"kind": "activation", "images": IMAGES * np.inf}, "not finite"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.importance(varied("plain"), traced("plain"), **options)


def test_scores_and_models_of_another_trace_are_refused() -> None:
    with pytest.raises(ValueError, match=r"belongs to another trace: 2 groups expected, got 3"):
        sculpt.make_space(traced("plain"), importance=scored("biased", "l1"))
    own = Importance("own", ("Conv_0", "Conv_1"), (np.ones(8), np.ones(8)))
    with pytest.raises(ValueError, match=r"\('Conv_1', 12\) expected, got \('Conv_1', 8\)"):
        sculpt.make_space(traced("plain"), importance=own)
    with pytest.raises(ValueError, match="do not fit the traced network"):
        sculpt.importance(varied("biased"), traced("plain"), "l1")


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'own' of group 'a' .* 1 that are not finite"):
        Importance("own", ("a",), (np.asarray([1.0, np.nan]),))
    with pytest.raises(ValueError, match="one array of scores for each of the 2 groups, got 1"):
        Importance("own", ("a", "b"), (np.ones(2),))


def test_taylor_wants_a_label_for_each_prediction() -> None:
    model = sculpt.from_function(
        lambda p, x: (x @ p["a"])[:, None, :] @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 5))}
    )
    trace = sculpt.trace(model, jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"integer labels \[2, 1\] for logits \[2, 1, 5\]"):
        sculpt.importance(model, trace, "taylor", images=np.ones((2, 3)), labels=np.zeros(2, int))

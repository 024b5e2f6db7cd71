"""`exclude`: layers that stay as they are, whoever proposes the policy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.pruning.families.patterns import FAMILIES

IMAGE = jnp.zeros((1, 6, 6, 3))


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        y = nn.relu(nn.Conv(8, (3, 3), name="second")(y))
        return x + nn.Conv(8, (3, 3), name="third")(y)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = Branch(name="block")(x)
        return nn.Dense(4, name="head")(x.mean((1, 2)))


@functools.cache
def model() -> sculpt.Model:
    return sculpt.from_linen(Net(), jax.jit(Net().init)(jax.random.key(0), IMAGE))


@functools.cache
def trace() -> sculpt.Trace:
    return sculpt.trace(model(), IMAGE)


def space(*patterns: str, families: tuple[str, ...] = ("channels", "rect"), **options: Any) -> sculpt.Space:
    return sculpt.make_space(trace(), families, exclude=patterns, **options)


def pruned_leaves(found: sculpt.Space, policies: np.ndarray) -> set[str]:
    """The arrays of which some policy takes something."""
    touched = set()
    for policy in policies:
        masks = sculpt.make_masks(found, model().params, policy)
        touched |= {
            leaf.path
            for leaf, mask in zip(trace().leaves, jax.tree.leaves(masks))
            if not np.asarray(mask).all()
        }
    return touched


def all_policies(found: sculpt.Space) -> np.ndarray:
    return np.stack([(found.num_options - 1).astype(np.int32), np.minimum(found.num_options - 1, 1)]).astype(
        np.int32
    )


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("head",), {"head/kernel", "head/bias"}),
        (("stem/kernel",), {"stem/kernel"}),
        (("*/second",), {"block/second/kernel", "block/second/bias"}),
        (("block",), {"block/first/kernel", "block/second/kernel", "block/third/kernel", "block/third/bias"}),
        (("*/first/bias", "stem"), {"block/first/bias", "stem/kernel"}),
    ],
)
@pytest.mark.fast("patterns1-names1", "patterns2-names2", "patterns3-names3", "patterns4-names4")
def test_what_is_excluded_stays_as_it_is_in_every_array(patterns: tuple[str, ...], names: set[str]) -> None:
    found = space(*patterns)
    touched = pruned_leaves(found, all_policies(found))
    assert touched and not touched & names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast("channels", "rect", "2:4", "nm", "block", "entries4", "unstructured")
def test_families_leave_an_excluded_kernel_alone(family: str) -> None:
    found = space("block/second", families=(family,))
    assert {site.name for site in found.sites} <= {"stem", "block/first", "block/third", "head"}
    assert "block/second/kernel" not in pruned_leaves(found, all_policies(found))


def test_a_residual_stream_stays_whole_if_one_layer_of_it_is_excluded() -> None:
    found = space("block/third:outputs", families=("channels",))
    assert {site.name for site in found.sites} == {"block/first", "block/second"}
    assert [site.name for site in found.excluded] == ["stem"]


def test_sides_of_a_layer_apart() -> None:
    inputs, outputs = (
        space(f"block/second:{side}", families=("channels",)) for side in ("inputs", "outputs")
    )
    assert {site.name for site in inputs.sites} == {"stem", "block/second"}
    assert {site.name for site in outputs.sites} == {"stem", "block/first"}
    # The window is neither.
    assert "block/second" in {site.name for site in space("block/second:inputs", families=("rect",)).sites}


def test_a_branch_does_not_go_as_a_whole_if_a_layer_in_it_is_excluded() -> None:
    free, held = (
        space(*patterns, families=("channels",), min_keep=0) for patterns in ((), ("block/third:inputs",))
    )
    assert 0 in {site.options[-1].counts[0] for site in free.sites if site.name == "block/first"}
    assert min(o.counts[0] for site in held.sites for o in site.options) > 0


def test_descriptions_say_so() -> None:
    found = space("block/second")
    policy = np.zeros(found.num_sites, np.int32)
    lines = found.describe(policy)
    assert "block/second rect excluded by you" in lines and "block/first channels excluded by you" in lines
    small = sculpt.compact(model(), found, policy, check=False)
    (row,) = [row for row in small.describe() if row.startswith("block/second/kernel")]
    assert "axis 2 stays: excluded by you" in row
    assert not any("excluded" in line for line in space().describe([0] * space().num_sites))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("haed",), "exclude names no layer or array of the network: 'haed'; did you mean 'head'"),
        (("block/secnd",), "did you mean 'block/second'"),
        (("head", "*/attention/*"), "names no layer or array of the network: '\\*/attention/\\*'"),
        (("*",), "all sites are excluded by you"),
    ],
)
def test_misspelt_names_are_refused_with_the_nearest(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(*patterns)


def test_one_pattern_may_stand_alone_and_policies_name_no_excluded_layer() -> None:
    found = sculpt.make_space(trace(), exclude="block/second")
    assert found.excluded == space("block/second").excluded
    with pytest.raises(ValueError, match="'block/second', which is excluded by you"):
        sculpt.policy_from(found, {"block/second": 0.5})


@pytest.mark.slow
def test_rules_and_random_policies_respect_it() -> None:
    found = space("block/second", families=("channels", "rect"))
    rules = [
        sculpt.uniform_policy(found, 0.7),
        sculpt.magnitude_policy(found, model().params, 0.7),
        sculpt.lamp_policy(found, model().params, 0.7),
        *sculpt.random_policies(found, jax.random.key(0), 4, 0.7),
    ]
    touched = pruned_leaves(found, np.stack([np.asarray(policy) for policy in rules]))
    assert touched and not touched & {"block/second/kernel", "block/second/bias"}

"""`round_to` and `min_keep`: columns of every array, not units; `levels` and `keep_at_least`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt

HEADS, FEATURES, WIDTH = 6, 16, 32


def attend(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x @ p["i"]
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], HEADS, FEATURES) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*x.shape[:2], -1) @ p["o"]


def traced(apply: Any, shapes: dict[str, tuple[int, ...]], image: tuple[int, ...]) -> sculpt.Trace:
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return sculpt.trace(sculpt.from_function(apply, params), jax.ShapeDtypeStruct(image, jnp.float32))


@functools.cache
def attention() -> sculpt.Trace:
    inner = HEADS * FEATURES
    shapes = {"i": (5, WIDTH), **dict.fromkeys("qkv", (WIDTH, inner)), "o": (inner, 3)}
    return traced(attend, shapes, (1, 4, 5))


@functools.cache
def chain() -> sculpt.Trace:
    shapes = {"a": (3, 24), "b": (24, 12), "c": (12, 2)}
    return traced(lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"], shapes, (1, 3))


def widths(space: sculpt.Space, policy: np.ndarray) -> list[int]:
    """Widths of all axes that change."""
    trace = space.trace
    kept = {
        atom: np.arange(size) < count
        for site in space.sites
        for atom, size, count in zip(site.atoms, site.sizes, site.options[policy[site.index]].counts)
    }
    found = []
    for leaf in trace.leaves:
        for axis in trace.leaf_term(leaf.index):
            keep = trace.axes.keep(axis, kept)
            found += [int(keep.sum())] if not keep.all() else []
    return found


def counts(space: sculpt.Space, size: int) -> list[int]:
    """The counts that sites of so many units offer."""
    return sorted(
        {option.counts[0] for site in space.sites if site.sizes == (size,) for option in site.options}
    )


@pytest.mark.parametrize("multiple", [1, 2, 4, 8, 16, 32])
def test_widths_are_multiples_in_every_array(multiple: int) -> None:
    space = sculpt.make_space(attention(), ("channels",), multiple)
    generator = np.random.default_rng(0)
    for _ in range(30):
        policy = generator.integers(0, space.num_options).astype(np.int32)
        assert all(width % multiple == 0 for width in widths(space, policy))


def test_heads_are_columns_already() -> None:
    space = sculpt.make_space(attention(), ("channels",), 8)
    assert counts(space, HEADS) == [1, 2, 3, 4, 5, 6] and counts(space, FEATURES) == [8, 16]
    # Sixteen columns of a head are half of what is asked for: two heads at a time.
    assert counts(sculpt.make_space(attention(), ("channels",), 32), HEADS) == [2, 4, 6]


def test_fewest_columns_are_those_of_the_heads_that_stay() -> None:
    space = sculpt.make_space(attention(), ("channels",), min_keep=24)
    least = (space.num_options - 1).astype(np.int32)
    assert min(widths(space, least)) >= 24
    assert counts(space, HEADS)[0] < HEADS


def test_channels_that_are_flattened_are_single_columns_of_their_kernel() -> None:
    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return (x @ p["a"]).reshape(x.shape[0], -1) @ p["b"]

    space = sculpt.make_space(traced(apply, {"a": (3, 24), "b": (4 * 24, 2)}, (1, 4, 3)), round_to=8)
    assert counts(space, 24) == [8, 16, 24]


@pytest.mark.parametrize(("levels", "expected"), [(8, 8), (16, 16), (3, 3), ("all", 24)])
def test_levels(levels: int | str, expected: int) -> None:
    space = sculpt.make_space(chain(), ("channels",), levels=levels)
    site = next(site for site in space.sites if site.sizes == (24,))
    assert len(site.options) == expected and site.options[0].kept == 1.0
    label = "23/24" if levels == "all" else f"{expected - 1}/{levels}"
    assert site.options[1].label == label


def test_all_levels_are_multiples_too() -> None:
    space = sculpt.make_space(chain(), ("channels",), 4, 8, levels="all")
    assert counts(space, 24) == [8, 12, 16, 20, 24] and counts(space, 12) == [8, 12]


@pytest.mark.parametrize("levels", [1, 0, "some", 2.5, True])
def test_levels_that_are_none_are_refused(levels: Any) -> None:
    with pytest.raises(ValueError, match="levels must be a whole number of at least 2"):
        sculpt.make_space(chain(), levels=levels)


def test_bounds_hold_for_the_sites_named() -> None:
    space = sculpt.make_space(chain(), ("channels",), keep_at_least={"a*": 0.5})
    least = {site.name: min(option.kept for option in site.options) for site in space.sites}
    assert least["a"] == 0.5 and least["b"] < 0.25
    assert space.num_options[0] == 5
    whole = sculpt.make_space(chain(), ("channels",), keep_at_least={"a": 1.0})
    assert [site.name for site in whole.sites] == ["b"]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"aa": 0.5}, "keep_at_least names no site: 'aa'; did you mean 'a'"),
        ({"a": 1.5}, r"keep_at_least\['a'\] must be a share in \(0, 1\], got 1.5"),
        ({"a": 0.0}, "must be a share"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.make_space(chain(), keep_at_least=bounds)


def test_a_policy_by_names() -> None:
    space = sculpt.make_space(chain(), ("channels",), levels="all")
    policy = sculpt.policy_from(space, {"a": 13, "b": 0.5})
    assert policy.dtype == np.int32
    assert [s.options[o].counts[0] for s, o in zip(space.sites, policy)] == [13, 6]
    assert not sculpt.policy_from(space, {}).any()
    # The last of names that meet counts.
    both = sculpt.policy_from(space, {"*": 0.5, "b": np.int64(3)})
    assert [s.options[o].counts[0] for s, o in zip(space.sites, both)] == [12, 3]
    assert sculpt.cost(space, policy).params == 3 * 13 + 13 * 6 + 6 * 2


def test_a_layer_of_another_name_is_that_of_its_group() -> None:
    def apply(p: dict[str, Any], x: jax.Array) -> jax.Array:
        y = x @ p["first"]
        return (y + jax.nn.relu(y) @ p["second"]) @ p["head"]

    space = sculpt.make_space(traced(apply, {"first": (3, 8), "second": (8, 8), "head": (8, 2)}, (1, 3)))
    assert [site.name for site in space.sites] == ["first"]
    policy = sculpt.policy_from(space, {"second": 4})
    assert space.sites[0].options[policy[0]].counts == (4,)
    with pytest.raises(ValueError, match="policy_from names no site: 'head'; there are 'first'"):
        sculpt.policy_from(space, {"head": 4})


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"a": 13}, r'a can keep 24, 21, .* 3 units, got 13: .* levels="all"'),
        ({"a": 1.2}, r"expected for a a share in \[0, 1\] or a whole number of units, got 1.2"),
        ({"a": True}, "expected for a a share"),
        ({"aa": 0.5}, "policy_from names no site: 'aa'; did you mean 'a'"),
    ],
)
def test_policies_that_are_none_are_refused(kept: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.policy_from(sculpt.make_space(chain(), ("channels",)), kept)


def test_windows_are_named_by_shares_where_there_are_no_channels() -> None:
    def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["c"], (1, 1), "SAME", dimension_numbers=numbers)

    space = sculpt.make_space(traced(apply, {"c": (3, 3, 2, 2)}, (1, 4, 4, 2)), ("rect",))
    policy = sculpt.policy_from(space, {"c": 0.45})
    assert space.sites[0].options[policy[0]].label == "2x2"

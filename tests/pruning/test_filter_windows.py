"""Filters with windows of their own: which windows, which groups, and that convolutions in groups are the same function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from sculpt.pruning.compact import max_difference
from sculpt.pruning.filter_groups import MIN_GROUP, OVERHEAD, group_filters
from tests.networks import network, traced

LINES = {2: [(0, 1), (1, 2)], 1: [(0,), (1,), (2,)]}
WHOLE = ((0, 3), (0, 3))
IMAGES = jax.random.normal(jax.random.key(11), (4, 8, 8, 3))


def lines(count: int) -> list[np.ndarray]:
    """Windows of so many neighbouring rows or columns."""
    found = []
    for line in LINES[count]:
        window = np.zeros((3, 3), bool)
        window[list(line)] = True
        found += [window, window.T]
    return found


def used(*groups: tuple[int, np.ndarray | None]) -> np.ndarray:
    """The windows of so many filters each."""
    return np.concatenate([np.stack([np.zeros((3, 3), bool) if w is None else w] * n) for n, w in groups])


ROW, COLUMN, TWO_ROWS, ALL = lines(1)[0], lines(1)[1], lines(2)[0], np.ones((3, 3), bool)


def test_every_filter_keeps_the_window_that_holds_most() -> None:
    model = network("function")
    space = sculpt.make_space(traced("function"), "rect_grouped")
    energy = np.square(np.asarray(model.params["second"])).sum(2)
    classes = {9: [ALL], 6: lines(2), 3: lines(1), 0: [~ALL]}
    best = {
        entries: [max(windows, key=lambda w, f=f: energy[..., f][w].sum()) for f in range(6)]
        for entries, windows in classes.items()
    }
    assert [option.label for option in space.sites[1].options] == ["6/6", "5/6", "4/6", "3/6", "2/6", "1/6"]
    for index, (large, small) in enumerate([(9, 9), (9, 6), (6, 6), (6, 3), (3, 3), (3, 0)]):
        lost = [energy[..., f][best[large][f]].sum() - energy[..., f][best[small][f]].sum() for f in range(6)]
        first = set(range(6)) if large == small else set(np.argsort(lost)[-3:].tolist())
        mask = np.asarray(sculpt.make_masks(space, model.params, [0, index])["second"])
        for f in range(6):
            expected = best[large if f in first else small][f]
            assert (mask[..., f] == expected[:, :, None]).all()


def test_convolutions_in_groups_and_other_kernels_have_no_site() -> None:
    space = sculpt.make_space(traced("separable"), "rect_grouped")
    layers = [traced("separable").layers[site.owner] for site in space.sites]
    assert [(layer.kernel_size, layer.in_channels) for layer in layers] == [((3, 3), 3)]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (used((64, ALL)), []),
        (used((64, ROW), (64, COLUMN)), [(64, (3, 1)), (64, (1, 3))]),
        # Nothing is computed of what keeps nothing, of however many filters.
        (used((5, None), (59, ALL)), [(5, (0, 0)), (59, (3, 3))]),
        (used((64, None)), [(64, (0, 0))]),
        # Four rows that are left over join the two rows around them, five columns the whole kernel.
        (
            used((68, ROW), (124, TWO_ROWS), (5, COLUMN), (59, ALL)),
            [(64, (1, 3)), (128, (2, 3)), (64, (3, 3))],
        ),
        # One group more is dearer than what these sixteen save.
        (used((16, ROW), (48, ALL)), []),
        (used((8, ROW), (8, COLUMN)), []),
    ],
)
def test_groups(filters: np.ndarray, expected: list[tuple[int, tuple[int, int]]]) -> None:
    groups = group_filters(filters)
    found = [(len(g.filters), tuple(stop - start for start, stop in g.window)) for g in groups]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_every_filter_once_and_never_cost_more(seed: int) -> None:
    random = np.random.default_rng(seed)
    windows = [ALL, ~ALL, *lines(2), *lines(1)]
    shares = random.dirichlet(np.full(len(windows), 0.3))
    filters = np.stack([windows[i] for i in random.choice(len(windows), random.integers(8, 400), p=shares)])
    dense = 9 * (len(filters) + OVERHEAD)
    for overhead in (0, OVERHEAD):
        groups = group_filters(filters, overhead)
        assert groups == group_filters(filters, overhead)
        if groups:
            assert sorted(f for g in groups for f in g.filters) == list(range(len(filters)))
        cost = 0
        for group in groups:
            (top, bottom), (left, right) = group.window
            assert all(filters[f].sum() == filters[f, top:bottom, left:right].sum() for f in group.filters)
            area = (bottom - top) * (right - left)
            assert area in (0, 9) or len(group.filters) % MIN_GROUP == 0
            cost += area * (len(group.filters) + OVERHEAD)
        assert overhead == 0 or not groups or cost < dense


def convolutions(dtype: Any, params: Any, x: jax.Array) -> jax.Array:
    """Uneven padding with stride, outputs first, dilation; the last convolution in a dtype of its own."""
    conv, usual = jax.lax.conv_general_dilated, ("NHWC", "HWIO", "NHWC")
    x = jax.nn.relu(conv(x, params["a"], (1, 1), "SAME", dimension_numbers=usual))
    x = conv(x, params["b"], (2, 1), ((0, 1), (1, 2)), dimension_numbers=("NHWC", "OIHW", "NCHW"))
    x = jax.nn.relu(x + params["bias"][None, :, None, None])
    x = conv(x, params["c"], (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=("NCHW", "HWIO", "NHWC"))
    last = conv(x.astype(dtype), params["d"].astype(dtype), (1, 1), "VALID", dimension_numbers=usual)
    return last.astype(jnp.float32).mean((1, 2)) @ params["head"]


def with_windows(dtype: Any = jnp.float32) -> Model:
    """A network whose filters have most of their energy in a row, a column or two rows."""
    shapes = {"a": (3, 3, 3, 128), "b": (128, 128, 3, 3), "c": (3, 3, 128, 128), "d": (3, 3, 128, 128)}
    windows = np.stack([ROW, ROW[::-1], COLUMN, COLUMN[:, ::-1]] * 32).astype(np.float32)
    params: dict[str, Any] = {"bias": jnp.linspace(-0.1, 0.1, 128), "head": jnp.eye(128)[:, :5]}
    for key, (name, shape) in zip(jax.random.split(jax.random.key(0), 4), shapes.items()):
        last = np.transpose(windows, (1, 2, 0))[:, :, None, :]
        strong = windows[:, None] if name == "b" else last
        params[name] = 0.05 * jax.random.normal(key, shape) * (0.1 + strong)
    return sculpt.from_function(functools.partial(convolutions, dtype), params)


@pytest.mark.parametrize("families", [("rect_grouped",), ("channels", "rect_grouped")], ids="+".join)
def test_convolutions_in_groups_are_the_same_function(families: tuple[str, ...]) -> None:
    model = with_windows()
    space = sculpt.make_space(sculpt.trace(model, IMAGES), families, round_to=16)
    # A third of every filter, a sixth in `c`: half of its filters keep nothing.
    policy = [{"rect_grouped": 5 if s.name == "c" else 4, "channels": 2}[s.family] for s in space.sites]
    masks = sculpt.make_masks(space, model.params, policy)
    masked = sculpt.apply_masks(model, masks)
    small = sculpt.compact(masked, space, policy)
    assert max_difference(masked, small, IMAGES) <= 1e-5
    if families != ("rect_grouped",):
        return
    rows = {row.split(" ")[0]: row for row in small.apply.describe()}  # type: ignore[attr-defined]
    for name in "abd":
        assert rows[name].count("32 filters of 3x1") == rows[name].count("32 filters of 1x3") == 2
    assert "64 filters of 0x0" in rows["c"]
    costs, macs = sculpt.cost(space, policy), sculpt.count_cost(small, IMAGES)[0]
    assert float(costs.macs) * (1 - 1e-5) <= macs < 0.5 * float(costs.macs_realised)

    def loss(model: Model, params: Any) -> jax.Array:
        return jnp.square(model.apply_train(params, {}, IMAGES, jax.random.key(0))[0]).sum()

    gradient = jax.jit(jax.grad(lambda p: loss(masked, p)))(masked.params)
    in_groups = jax.jit(jax.grad(lambda p: loss(small, p)))(small.params)
    for name, mask in masks.items():
        largest = float(jnp.abs(gradient[name]).max())
        np.testing.assert_allclose(
            np.where(mask, in_groups[name], 0), np.where(mask, gradient[name], 0), atol=1e-4 * largest
        )


def test_a_network_in_groups_can_be_traced_and_pruned_again() -> None:
    """The last convolution in half precision, whose kernel is read through a cast."""
    model = with_windows(jnp.bfloat16)
    space = sculpt.make_space(sculpt.trace(model, IMAGES), "rect_grouped")
    policy = np.full(space.num_sites, 4)
    small = sculpt.compact(
        sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy)), space, policy
    )
    macs, _ = sculpt.count_cost(small, IMAGES)
    assert macs == pytest.approx(float(sculpt.cost(space, policy).macs), rel=1e-5)
    again = sculpt.make_space(sculpt.trace(small, IMAGES), "channels")
    last = again.num_options // 2
    masked = sculpt.apply_masks(small, sculpt.make_masks(again, small.params, last))
    assert max_difference(masked, sculpt.compact(masked, again, last), IMAGES) <= 1e-2


@pytest.mark.parametrize("name", ["residual", "nnx"])
def test_small_networks_together_with_channels(name: str) -> None:
    space = sculpt.make_space(traced(name), ("channels", "rect_grouped"))
    policy = space.num_options - 1
    masked = sculpt.apply_masks(network(name), sculpt.make_masks(space, network(name).params, policy))
    small = sculpt.compact(masked, space, policy)
    assert max_difference(masked, small, IMAGES) <= 1e-5
    macs, _ = sculpt.count_cost(small, IMAGES)
    assert macs <= float(sculpt.cost(space, policy).macs_realised) * (1 + 1e-5)

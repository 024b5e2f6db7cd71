"""Filters with windows of their own: which windows, which groups, and that convolutions in groups are the same function."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import max_difference
from sculpt.pruning.compaction.filter_groups import MIN_GROUP, OVERHEAD, group_filters
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


@functools.cache
def one_convolution(inputs: int, filters: int) -> sculpt.Space:
    """Of one kernel `[3, 3, inputs, filters]`."""

    def apply(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).mean((1, 2))

    model = sculpt.from_function(apply, jnp.zeros((3, 3, inputs, filters)))
    return sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 4, 4, inputs))), "rect_grouped")


def of_one_convolution(kernel: np.ndarray, option: int) -> np.ndarray:
    """The masks `[filters, 3, 3]` of the filters of a kernel `[3, 3, inputs, filters]`."""
    mask = np.asarray(sculpt.make_masks(one_convolution(*kernel.shape[2:]), kernel, [option]))
    assert (mask == mask[:, :, :1]).all()
    return np.moveaxis(mask[:, :, 0], -1, 0)


def is_one_of(mask: np.ndarray, windows: list[np.ndarray]) -> np.ndarray:
    """bool `[filters]`."""
    return (mask[:, None] == np.stack(windows)).all((2, 3)).any(1)


@pytest.mark.parametrize("filters", [64, 48, 6])
@pytest.mark.fast("6")
def test_windows_come_in_multiples_of_sixteen(filters: int) -> None:
    kernel = np.random.default_rng(filters).normal(size=(3, 3, 4, filters)).astype(np.float32)
    two_rows, two_columns, middle = lines(2)[0::2], lines(2)[1::2], lines(1)[2:4]
    classes = {
        9: [[ALL]],
        6: [two_rows, two_columns],
        3: [[window] for window in middle],
        0: [[~ALL]],
    }
    step = 16 if filters >= 32 else 1
    for option, (large, small) in enumerate([(9, 9), (9, 6), (6, 6), (6, 3), (3, 3), (3, 0)]):
        mask = of_one_convolution(kernel, option)
        assert is_one_of(mask, [w for size in (large, small) for kind in classes[size] for w in kind]).all()
        share = 1 if large == small else 0.5
        of_large = int((mask.sum((1, 2)) == large).sum())
        assert of_large == -(-filters * share // step) * step
        for size in {large, small}:
            # In one place, each kind of them, and in multiples of sixteen but for what is left over.
            counts = [is_one_of(mask, kind).sum() for kind in classes[size]]
            assert all(sum(bool(is_one_of(mask, [w]).any()) for w in kind) <= 1 for kind in classes[size])
            assert len(counts) < 2 or sorted(n % 16 for n in counts)[0] == 0
    space_energy = np.square(kernel).sum(2)
    kept = [space_energy.transpose(2, 0, 1)[of_one_convolution(kernel, o)].sum() for o in range(6)]
    assert all(more > less for more, less in itertools.pairwise(kept))


def test_filters_have_the_windows_that_hold_most() -> None:
    """Two rows, and a column, that stand out."""
    random = np.random.default_rng(0)
    windows = np.stack([lines(2)[0], lines(1)[3]])[random.permutation(np.repeat([0, 1], 32))]
    kernel = np.moveaxis(windows, 0, -1)[:, :, None] + 0.1 * random.normal(size=(3, 3, 4, 64))
    np.testing.assert_array_equal(of_one_convolution(kernel.astype(np.float32), 3), windows)


@pytest.mark.parametrize("seed", range(12))
def test_pruning_again_takes_nothing_more(seed: int) -> None:
    """Filters of very different energies; some of them gone since, so that the others' windows come in multiples no more."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(size=(3, 3, 1, 96)) + 2 * random.normal(size=96))
    kernel = (scale * random.normal(size=(3, 3, 4, 96))).astype(np.float32)
    for option in range(1, 6):
        mask = of_one_convolution(kernel, option)
        left = np.where(np.moveaxis(mask, 0, -1)[:, :, None], kernel, 0)
        np.testing.assert_array_equal(of_one_convolution(left, option), mask)
        stays = random.random(96) < random.uniform(0.3, 1.0)
        again = of_one_convolution(np.where(stays, left, 0), option)
        assert (mask & stays[:, None, None] <= again).all()


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
        (used((16, TWO_ROWS), (48, ALL)), []),
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
    windows = np.stack([np.roll(ROW, 1, 0), np.roll(COLUMN, 1, 1)] * 64).astype(np.float32)
    params: dict[str, Any] = {"bias": jnp.linspace(-0.1, 0.1, 128), "head": jnp.eye(128)[:, :5]}
    for key, (name, shape) in zip(jax.random.split(jax.random.key(0), 4), shapes.items()):
        last = np.transpose(windows, (1, 2, 0))[:, :, None, :]
        strong = windows[:, None] if name == "b" else last
        params[name] = 0.05 * jax.random.normal(key, shape) * (0.1 + strong)
    return sculpt.from_function(functools.partial(convolutions, dtype), params)


@pytest.mark.parametrize("families", [("rect_grouped",), ("channels", "rect_grouped")], ids="+".join)
@pytest.mark.slow
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
        assert "64 filters of 3x1, 64 filters of 1x3" in rows[name]
    assert "64 filters of nothing" in rows["c"]
    costs, macs = sculpt.cost(space, policy), sculpt.count_cost(small, IMAGES)[0]
    assert float(costs.macs) * (1 - 1e-5) <= macs < 0.5 * float(costs.macs_realised)

    def loss(model: Model, params: Any) -> jax.Array:
        return jnp.square(model.apply_train(params, {}, IMAGES, jax.random.key(0))[0]).sum()

    gradient = jax.jit(jax.grad(lambda p: loss(masked, p)))(masked.params)
    in_groups = jax.jit(jax.grad(lambda p: loss(small, p)))(small.params)
    # Channels are now in the order of their groups.
    places = jax.tree.unflatten(
        jax.tree.structure(masked.params),
        [np.ix_(*leaf) for leaf in small.apply.plan.places],  # type: ignore[attr-defined]
    )
    for name, mask in masks.items():
        expected = np.where(mask, gradient[name], 0)
        atol = 1e-4 * np.abs(expected).max()
        found = np.where(mask[places[name]], in_groups[name], 0)
        np.testing.assert_allclose(found, expected[places[name]], atol=atol)


@pytest.mark.slow
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
@pytest.mark.slow
def test_small_networks_together_with_channels(name: str) -> None:
    space = sculpt.make_space(traced(name), ("channels", "rect_grouped"))
    policy = space.num_options - 1
    masked = sculpt.apply_masks(network(name), sculpt.make_masks(space, network(name).params, policy))
    small = sculpt.compact(masked, space, policy)
    assert max_difference(masked, small, IMAGES) <= 1e-5
    macs, _ = sculpt.count_cost(small, IMAGES)
    assert macs <= float(sculpt.cost(space, policy).macs_realised) * (1 + 1e-5)


def per_channel() -> jax.Array:
    return jnp.arange(32, dtype=jnp.float32).reshape(1, 1, 1, 32)


@jax.custom_vjp
def scaled_backwards(y: jax.Array) -> jax.Array:
    return y * 1.5


scaled_backwards.defvjp(lambda y: (y * 1.5, None), lambda _, g: (g * per_channel() / 16,))


def scanned(y: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, _: (c + per_channel() / 32, None), y, length=2)[0]


MIDDLES = {
    "table": lambda y: y * (0.5 + per_channel()),
    "constant": lambda y: y * np.linspace(0.5, 2, 32, dtype=np.float32).reshape(1, 1, 1, 32),
    "scan": scanned,
    "checkpoint": jax.checkpoint(lambda y: jnp.tanh(y * per_channel())),
    "own derivative": scaled_backwards,
}


@pytest.mark.parametrize("name", MIDDLES)
@pytest.mark.fast("own derivative")
def test_what_knows_the_channels_by_number_follows_their_new_order(name: str) -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return MIDDLES[name](y).mean((1, 2)) @ params["head"]

    keys = jax.random.split(jax.random.key(0))
    params = {
        "kernel": jax.random.normal(keys[0], (3, 3, 3, 32)),
        "head": jax.random.normal(keys[1], (32, 5)),
    }
    model = sculpt.from_function(apply, params)
    space = sculpt.make_space(sculpt.trace(model, IMAGES), "rect_grouped")
    masks = sculpt.make_masks(space, params, [4])
    masked = sculpt.apply_masks(model, masks)
    small = sculpt.compact(masked, space, [4])
    order = small.apply.plan.places[0][0]  # type: ignore[attr-defined]
    assert (np.diff(order) < 0).any()
    assert max_difference(masked, small, IMAGES) <= 1e-5

    def gradient(model: Model) -> Any:
        return jax.grad(lambda p: jnp.square(model.apply(p, {}, IMAGES)).sum())(model.params)

    expected, found = gradient(masked), gradient(small)
    np.testing.assert_allclose(found["head"], expected["head"][order], rtol=1e-4, atol=1e-3)
    kernel = jnp.where(masks["kernel"], expected["kernel"], 0)[..., order]
    np.testing.assert_allclose(found["kernel"], kernel, rtol=1e-4, atol=1e-3 * np.abs(kernel).max())
    # Outside of any compiled function too.
    assert small(IMAGES).shape == (4, 5)


@pytest.mark.slow
def test_channels_that_something_joins_stay_where_they_were() -> None:
    """State along an axis of theirs and others, and a training program that takes them in groups."""

    def apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if state:
            y = (y.reshape(len(x), -1) - state["mean"][None]).reshape(y.shape)
        return y.mean((1, 2)) @ params["head"]

    def apply_train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        y = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if not state:
            kept = jax.random.bernoulli(key, 0.5, (len(x), 8, 1))
            y = jnp.where(kept, y.mean((1, 2)).reshape(len(x), 8, 4), 0.0).reshape(len(x), 32)
        else:
            y = (y.reshape(len(x), -1) - state["mean"][None]).reshape(y.shape).mean((1, 2))
        return y @ params["head"], state

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (3, 3, 3, 32)),
        "head": jax.random.normal(keys[1], (32, 5)),
    }
    for state in ({"mean": jax.random.normal(keys[2], (8 * 8 * 32,))}, {}):
        model = Model(apply, apply_train, params, state)
        space = sculpt.make_space(sculpt.trace(model, IMAGES), "rect_grouped")
        masked = sculpt.apply_masks(model, sculpt.make_masks(space, params, [4]))
        small = sculpt.compact(masked, space, [4])
        assert "in groups" in small.apply.describe()[0]  # type: ignore[attr-defined]
        assert max_difference(masked, small, IMAGES) <= 1e-5
        trained, _ = small.apply_train(small.params, state, IMAGES, keys[0])
        expected, _ = apply_train(masked.params, state, IMAGES, keys[0])
        np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-4)

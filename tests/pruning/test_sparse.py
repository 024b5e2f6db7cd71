"""Families of single entries: which entries stay, worked out here by plain loops; where kernels lie otherwise than usual."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from sculpt.pruning.families.sparse import is_nm
from sculpt.pruning.space import make_choices
from tests.networks import network, traced


def option(space: sculpt.Space, params: Any, site: int, label: str) -> Any:
    """The masks of a policy that takes the option of that label at one site and keeps all elsewhere."""
    policy = np.zeros(space.num_sites, np.int32)
    policy[site] = [o.label for o in space.sites[site].options].index(label)
    return jax.device_get(sculpt.make_masks(space, params, policy))


def dense(kernel: jax.Array, apply: Any = None) -> tuple[Model, sculpt.Trace]:
    model = sculpt.from_function(apply or (lambda p, x: x @ p["w"]), {"w": kernel})
    return model, sculpt.trace(model, jnp.zeros((1, 16)))


def test_unstructured_keeps_the_largest_and_exactly_as_many_as_it_says() -> None:
    weights = np.random.default_rng(0).permutation(np.arange(1, 49, dtype=np.float32)).reshape(16, 3)
    weights[::2] *= -1
    model, trace = dense(jnp.asarray(weights))
    space = sculpt.make_space(trace, "unstructured")
    for level in range(1, 9):
        mask = option(space, model.params, 0, f"{level}/8")["w"]
        assert np.array_equal(mask, np.abs(weights) > 48 - 6 * level)
    equal, _ = dense(jnp.ones((16, 3)))
    mask = option(space, equal.params, 0, "3/8")["w"]
    assert np.flatnonzero(mask).tolist() == list(range(18))


def test_n_of_m_keeps_the_largest_of_every_group_of_inputs() -> None:
    model = network("function")
    space = sculpt.make_space(traced("function"), "nm")
    assert [s.name for s in space.sites] == ["second"]
    energy = np.square(np.asarray(model.params["second"]))
    for n, m in ((4, 8), (2, 4), (1, 4)):
        mask = option(space, model.params, 0, f"{n}:{m}")["second"]
        for row, column, output, group in itertools.product(range(3), range(3), range(6), range(8 // m)):
            part = energy[row, column, group * m : (group + 1) * m, output]
            kept = mask[row, column, group * m : (group + 1) * m, output]
            assert np.flatnonzero(kept).tolist() == sorted(np.argsort(-part)[:n].tolist())
        assert is_nm(mask, n, m, 2)


def test_n_of_m_follows_the_axis_that_is_summed_over() -> None:
    """Outputs first, and a batch of matrices."""
    keys = jax.random.split(jax.random.key(0))
    model, trace = dense(jax.random.normal(keys[0], (6, 16)), lambda p, x: x @ p["w"].T)
    mask = option(sculpt.make_space(trace, "2:4"), model.params, 0, "2:4")["w"]
    assert is_nm(mask, 2, 4, 1) and mask.sum() == mask.size // 2

    def heads(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("nhi,hio->nho", x.reshape(-1, 2, 8), p["w"]).reshape(-1, 6)

    model, trace = dense(jax.random.normal(keys[1], (2, 8, 3)), heads)
    mask = option(sculpt.make_space(trace, "2:4"), model.params, 0, "2:4")["w"]
    assert is_nm(mask, 2, 4, 1) and mask.sum() == mask.size // 2


def test_convolutions_with_outputs_first() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x.reshape(-1, 2, 2, 4), p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        return y.mean((1, 2))

    model, trace = dense(jax.random.normal(jax.random.key(0), (6, 4, 3, 3)), apply)
    mask = option(sculpt.make_space(trace, "2:4"), model.params, 0, "2:4")["w"]
    assert is_nm(mask, 2, 4, 1) and mask.sum() == mask.size // 2
    mask = option(sculpt.make_space(trace, "entries4"), model.params, 0, "4/9")["w"]
    assert (mask.sum((2, 3)) == 4).all() and mask[:, :, 1, 1].all()


def test_steps_of_a_scan_are_a_stack_and_count_alike() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]

    model, trace = dense(jax.random.normal(jax.random.key(0), (3, 16, 16)), apply)
    space = sculpt.make_space(trace, "2:4")
    assert is_nm(option(space, model.params, 0, "2:4")["w"], 2, 4, 1)
    assert float(sculpt.cost(space, [1]).macs) == trace.macs / 2 == 3 * 128


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: x @ (p["w"] - p["w"].mean(0, keepdims=True)),
        lambda p, x: x.reshape(-1, 2, 8) @ p["w"].reshape(8, -1),
    ],
    ids=["standardised", "reshaped"],
)
def test_kernels_that_are_no_view_of_their_leaf_are_left_alone(apply: Any) -> None:
    """Where weights are standardised a zero is none in the product; reshaped ones have no axis of inputs."""
    _, trace = dense(jnp.ones((16, 4)), apply)
    with pytest.raises(ValueError, match="no kernel of this network has a size that they take"):
        sculpt.make_space(trace, ("unstructured", "2:4"))


@pytest.mark.parametrize(("inputs", "outputs", "side"), [(16, 8, 8), (16, 12, 4)])
def test_blocks(inputs: int, outputs: int, side: int) -> None:
    weights = np.asarray(jax.random.normal(jax.random.key(0), (inputs, outputs)))
    model, trace = dense(jnp.asarray(weights))
    space = sculpt.make_space(trace, "block")
    energy = np.square(weights).reshape(inputs // side, side, outputs // side, side).sum((1, 3))
    for site_option in space.sites[0].options:
        count = site_option.pattern[0]
        expected = np.zeros(energy.size, bool)
        expected[np.argsort(-energy.reshape(-1))[:count]] = True
        expected = expected.reshape(energy.shape).repeat(side, 0).repeat(side, 1)
        assert np.array_equal(option(space, model.params, 0, site_option.label)["w"], expected)


def test_four_of_nine_entries_of_a_library_of_eight() -> None:
    model = network("function")
    space = sculpt.make_space(traced("function"), "entries4")
    kernel = np.asarray(model.params["second"])
    energy = np.square(kernel).reshape(9, -1).T
    patterns = [(4, *others) for others in itertools.combinations((0, 1, 2, 3, 5, 6, 7, 8), 3)]
    votes = dict.fromkeys(patterns, 0.0)
    for kept in energy:
        largest = max(patterns, key=lambda p, kept=kept: kept[list(p)].sum())
        votes[largest] += kept[list(largest)].sum()
    library = sorted(patterns, key=lambda p: -votes[p])[:8]
    best = [max(library, key=lambda p, kept=kept: kept[list(p)].sum()) for kept in energy]
    worth = np.asarray([kept[list(p)].sum() for kept, p in zip(energy, best)])
    for label, count in (("4/9", 48), ("4/9 of 3/4", 36), ("4/9 of 2/4", 24), ("4/9 of 1/4", 12)):
        expected = np.zeros((48, 9), bool)
        for k in np.argsort(-worth)[:count]:
            expected[k, list(best[k])] = True
        mask = option(space, model.params, 1, label)["second"]
        assert np.array_equal(mask.reshape(9, -1).T, expected)


def test_share_of_the_energy_that_stays() -> None:
    model, trace = dense(jnp.asarray([[1.0], [-2.0], [3.0], [0.0]] * 4))
    nm, eighths = (
        make_choices(sculpt.make_space(trace, f), model.params)[0].retained for f in ("nm", "unstructured")
    )
    np.testing.assert_allclose(nm, [1.0, 13 / 14, 13 / 14, 9 / 14], rtol=1e-6)
    np.testing.assert_allclose(eighths[-3:], [(36 + 2 * 4) / 56, 36 / 56, 18 / 56], rtol=1e-6)
    silent = make_choices(sculpt.make_space(trace, "nm"), {"w": jnp.zeros((16, 1))})[0].retained
    np.testing.assert_allclose(silent, [1.0, 0.5, 0.5, 0.25])


def test_is_nm() -> None:
    mask = np.asarray([[1, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]], bool)
    assert is_nm(mask, 2, 4, 1) and is_nm(jnp.asarray(mask), 4, 8, -1) and not is_nm(mask, 1, 4, 1)
    assert not is_nm(np.asarray([0.0, 0.1, -0.2, 0.3]), 2, 4, 0)
    assert not is_nm(np.asarray([0, 0, 1, 1, 1, 1, 0, 0]), 1, 4, 0)
    for wrong in ({"axis": 0}, {"axis": 2}, {"n": 5}, {"n": 0}):
        with pytest.raises(ValueError, match="is_nm expected"):
            is_nm(mask, **{"n": 2, "m": 4, "axis": 1, **wrong})


def test_the_first_family_that_takes_a_kernel_has_it_alone() -> None:
    space = sculpt.make_space(traced("residual"), ("channels", "entries4", "nm", "unstructured"))
    of_kernels = [site for site in space.sites if site.family != "channels"]
    layers = traced("residual").layers
    assert len({site.kernel.leaf for site in of_kernels if site.kernel}) == len(of_kernels) == len(layers)
    for site in of_kernels:
        layer = layers[site.owner]
        last = "nm" if layer.in_channels % 4 == 0 else "unstructured"
        assert site.family == ("entries4" if layer.kernel_size == (3, 3) else last)


@pytest.mark.slow
def test_channels_first_and_then_two_of_four_on_what_is_left() -> None:
    """In one space the groups of the pattern would lose their neighbours."""
    model = network("plain")
    space = sculpt.make_space(traced("plain"), "channels", round_to=4)
    policy = space.num_options - 1
    small = sculpt.compact(
        sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy)), space, policy
    )
    again = sculpt.make_space(sculpt.trace(small, jnp.zeros((1, 8, 8, 3))), "2:4")
    masks = sculpt.make_masks(again, small.params, again.num_options - 1)
    thin = sculpt.compact(sculpt.apply_masks(small, masks), again, again.num_options - 1)
    kernel = thin.params["Conv_1"]["kernel"]
    assert kernel.shape == (3, 3, 4, 4) and is_nm(kernel, 2, 4, 2)
    assert np.count_nonzero(kernel) == kernel.size // 2

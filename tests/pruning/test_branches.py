"""Branches of which nothing stays: where that is offered, and that nothing is left of them in what is run and exported."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.ir.program import flatten
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import max_difference
from sculpt.tracing.branches import branch_atoms
from tests.architectures.architecture import from_linen
from tests.networks import NETWORKS, network, traced

IMAGES = jax.random.normal(jax.random.key(5), (4, 8, 8, 3))


class Bottlenecks(nn.Module):
    """Bottlenecks, the second with a depthwise convolution and a gate, and attention behind them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm(y: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train)(y)

        x = nn.Conv(16, (3, 3), name="stem")(x)
        for index in range(2):
            y = nn.relu(norm(nn.Conv(8, (1, 1), use_bias=False, name=f"reduce{index}")(x)))
            groups = 8 if index else 1
            y = norm(nn.Conv(8, (3, 3), feature_group_count=groups, use_bias=False, name=f"middle{index}")(y))
            y = nn.relu(y)
            if index:
                y = y * nn.sigmoid(nn.Conv(8, (1, 1), name="gate")(y.mean((1, 2), keepdims=True)))
            x = nn.relu(x + norm(nn.Conv(16, (1, 1), use_bias=False, name=f"expand{index}")(y)))
        x = x.reshape(x.shape[0], -1, 16)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(32, name="hidden")(nn.LayerNorm()(x))))
        return nn.Dense(5)(x.mean(1))


def without_branches(
    model: Model, families: tuple[str, ...] = ("channels",)
) -> tuple[Model, Model, list[str]]:
    """Masked and compact: all that may go gone, kernels elsewhere at the third of their options; and the names of what went."""
    space = sculpt.make_space(sculpt.trace(model, IMAGES), families, min_keep=0)
    gone = [site.name for site in space.sites if site.options[-1].kept == 0]
    policy = [
        len(site.options) - 1 if site.options[-1].kept == 0 else 2 * (site.family != "channels")
        for site in space.sites
    ]
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy)
    macs, params = sculpt.count_cost(small, IMAGES)
    costs = sculpt.cost(space, policy)
    if "rect_grouped" not in families:
        assert (macs, params) == (pytest.approx(costs.macs_realised), pytest.approx(costs.params))
    return masked, small, gone


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_stays_only_of_what_images_get_round(name: str) -> None:
    offered = {group.name for group in traced(name).groups if group.atom in branch_atoms(traced(name))}
    assert offered == {
        "residual": {"Conv_1", "Conv_3"},
        "concatenated": {"Conv_1", "Conv_2"},
        "separable": {"Conv_1", "Dense_0"},
        "nnx": {"inner"},
    }.get(name, set())


def test_no_group_loses_all_unless_it_is_asked_for() -> None:
    space = sculpt.make_space(traced("residual"), ("channels",))
    assert min(option.kept for site in space.sites for option in site.options) > 0
    offered = sculpt.make_space(traced("residual"), ("channels",), round_to=4, min_keep=0)
    for site in offered.sites:
        counts = {option.counts[0] for option in site.options}
        assert all(count % 4 == 0 for count in counts) and (0 in counts) == (
            site.name in ("Conv_1", "Conv_3")
        )


@pytest.mark.parametrize(
    ("name", "families"),
    [
        pytest.param("residual", ("channels",), marks=pytest.mark.slow),
        ("residual", ("channels", "rect")),
        ("residual", ("channels", "rect_grouped")),
        ("concatenated", ("channels", "rect")),
        pytest.param("separable", ("channels",), marks=pytest.mark.slow),
        ("nnx", ("channels", "rect_grouped")),
    ],
)
@pytest.mark.slow
def test_masked_equals_compact_equals_folded(name: str, families: tuple[str, ...]) -> None:
    masked, small, gone = without_branches(network(name), families)
    folded = sculpt.fold(small, IMAGES)
    assert gone and max_difference(masked, small, IMAGES) <= 1e-5
    assert max_difference(masked, folded, IMAGES) <= 1e-5
    assert all(array.size for array in folded.params.values())


@pytest.mark.slow
def test_attention_depthwise_convolutions_and_gates() -> None:
    """Also trains: what is left of a branch is a constant, whose derivatives are those of the masked network."""
    model = from_linen(Bottlenecks())(jax.random.key(0))
    masked, small, gone = without_branches(model)
    assert {"reduce0", "middle0", "reduce1", "hidden"} < set(gone) and "stem" not in gone
    folded = sculpt.fold(small, IMAGES)
    assert max_difference(masked, folded, IMAGES) <= 1e-5
    program = flatten(folded.apply, folded.params, folded.state, IMAGES)
    names = [eqn.name for eqn in program.equations]
    assert names.count("conv_general_dilated") == 1 and names.count("dot_general") == 1

    def loss(model: Model, params: object) -> jax.Array:
        logits, _ = model.apply_train(params, model.state, IMAGES, jax.random.key(1))
        return jnp.square(logits).sum()

    big, left = (jax.grad(lambda p, m=m: loss(m, p))(m.params) for m in (masked, small))
    for name in ("stem", "BatchNorm_2", "Dense_1"):
        for a, b in zip(jax.tree.leaves(big[name]), jax.tree.leaves(left[name])):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert left["reduce0"]["kernel"].shape == (1, 1, 16, 0)


def test_kernels_of_zeros_are_dead_layers_too() -> None:
    """Masked, not compacted: the branch goes, the constant behind it stays, and a branch whose constant is zero leaves nothing."""

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        branch = jax.nn.relu(x @ params["first"]) @ params["second"]
        return x + (branch + params["shift"]) + jnp.tanh(branch) + x @ params["third"]

    weights = {name: jnp.ones((6, 6)) for name in ("first", "third")}
    params = {**weights, "second": jnp.zeros((6, 6)), "shift": jnp.arange(6.0)[None]}
    model, x = sculpt.from_function(apply, params), jax.random.normal(jax.random.key(1), (4, 6))
    after = sculpt.fold(model, x)
    assert max_difference(model, after, x) <= 1e-6
    program = flatten(after.apply, after.params, after.state, x)
    assert sorted(eqn.name for eqn in program.equations) == ["add", "add", "dot_general"]


@pytest.mark.slow
def test_files_and_engines_take_what_is_left(tmp_path: Path) -> None:
    _, small, _ = without_branches(from_linen(Bottlenecks())(jax.random.key(0)))
    expected = small.apply(small.params, small.state, IMAGES)
    sculpt.export_onnx(small, tmp_path / "small.onnx", IMAGES)  # compares before it keeps the file
    sculpt.export_stablehlo(small, tmp_path / "small.stablehlo", IMAGES)
    found = sculpt.load_stablehlo(tmp_path / "small.stablehlo")(IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    sculpt.save_model(small, tmp_path / "small.model", IMAGES)
    again = sculpt.load_model(tmp_path / "small.model")
    np.testing.assert_allclose(again.apply(again.params, again.state, IMAGES), expected, rtol=1e-5, atol=1e-6)


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(16, (3, 3))(x)
        y = nn.relu(nn.Conv(16, (3, 3), feature_group_count=4)(x))
        return nn.Dense(5)((x + nn.Conv(16, (1, 1))(y)).mean((1, 2)))


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = nn.elu(nn.Conv(8, (3, 3))(x)).reshape(len(x), -1)
        return nn.Dense(5)(y) + nn.Dense(5)(x.reshape(len(x), -1))


class FusedAttention(nn.Module):
    """Queries, keys and values by one layer."""

    split: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16)(x.reshape(len(x), -1, 3))
        if self.split:
            q, k, v = (part.reshape(*x.shape[:2], 4, 4) for part in jnp.split(nn.Dense(48)(x), 3, -1))
        else:
            q, k, v = jnp.moveaxis(nn.Dense(48)(x).reshape(*x.shape[:2], 3, 4, 4), 2, 0)
        weights = nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / 2.0)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*x.shape[:2], 16)
        return nn.Dense(5)((x + nn.Dense(16)(y)).mean(1))


class SideBySide(nn.Module):
    """Two branches and no way round both."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        branches = [nn.Conv(8, (1, 1))(nn.elu(nn.Conv(8, (3, 3))(x))) for _ in range(2)]
        return nn.Dense(5)((branches[0] + branches[1]).mean((1, 2)))


@pytest.mark.parametrize(
    "module", [Grouped(), Flattened(), FusedAttention(True), FusedAttention(False), SideBySide()]
)
@pytest.mark.slow
def test_each_group_that_may_go_goes(module: nn.Module) -> None:
    """One by one and all together; axes that are products of what goes and what stays."""
    model = from_linen(module)(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, IMAGES), ("channels",), min_keep=0)
    may_go = [site.index for site in space.sites if site.options[-1].kept == 0]
    assert may_go
    for gone in [*([site] for site in may_go), may_go]:
        policy = np.zeros(space.num_sites, np.int32)
        policy[gone] = space.num_options[gone] - 1
        masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
        small = sculpt.compact(masked, space, policy)
        assert max_difference(masked, sculpt.fold(small, IMAGES), IMAGES) <= 1e-5
        outputs = np.asarray(small.apply(small.params, small.state, IMAGES))
        assert np.ptp(outputs, axis=0).max() > 1e-4  # it still depends on the images


def test_choices_between_arrays_are_worked_out_and_left() -> None:
    """`select_n` takes no operands of size one."""

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = jax.nn.elu(x @ params["zero"] + params["bias"])
        z = jnp.where(x > 0, x, jnp.zeros_like(x)) + jnp.where(x > 1, y, x)
        return (y + z + jnp.clip(x, jnp.full_like(x, -1.0), 1.0)) @ params["last"]

    params = {"zero": jnp.zeros((6, 6)), "bias": jnp.arange(6.0)[None] - 3.0, "last": jnp.ones((6, 2))}
    model, x = sculpt.from_function(apply, params), jax.random.normal(jax.random.key(1), (4, 6))
    after = sculpt.fold(model, x)
    assert max_difference(model, after, x) <= 1e-6
    assert max_difference(model, after, x[:1]) <= 1e-6


@pytest.mark.slow
def test_a_difference_is_named_where_a_branch_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("residual")
    space = sculpt.make_space(traced("residual"), ("channels",), min_keep=0)
    policy = np.zeros(space.num_sites, np.int32)
    policy[[site.index for site in space.sites if site.options[-1].kept == 0]] = 8
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    monkeypatch.setattr(sys.modules["sculpt.pruning.compaction.compactor"], "TOLERANCE", -1.0)
    monkeypatch.setattr(sys.modules["sculpt.pruning.compaction.compactor"], "_ROUNDINGS", -1)
    with pytest.raises(ValueError, match=r"compacted and masked outputs differ by .* first"):
        sculpt.compact(masked, space, policy)

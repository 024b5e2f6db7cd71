"""Branches of which nothing stays: where that is offered, and that nothing is left of them in what is run and exported."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.model import Model
from sculpt.pruning.compact import max_difference
from sculpt.tracing.branches import branch_atoms
from sculpt.tracing.program import flatten
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
        ("residual", ("channels",)),
        ("residual", ("channels", "rect")),
        ("residual", ("channels", "rect_grouped")),
        ("concatenated", ("channels", "rect")),
        ("separable", ("channels",)),
        ("nnx", ("channels", "rect_grouped")),
    ],
)
def test_masked_equals_compact_equals_folded(name: str, families: tuple[str, ...]) -> None:
    masked, small, gone = without_branches(network(name), families)
    folded = sculpt.fold(small, IMAGES)
    assert gone and max_difference(masked, small, IMAGES) <= 1e-5
    assert max_difference(masked, folded, IMAGES) <= 1e-5
    assert all(array.size for array in folded.params.values())


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

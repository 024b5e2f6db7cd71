"""Networks by name: their sizes, their shortcuts, and what is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sculpt import nets

# Of the paper's table 6 (0.27M, 0.46M, ...), exactly; statistics are not parameters.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


def variables_of(module: nn.Module, x: jax.Array) -> Any:
    """Random variables, made on the host: compiling `init` takes longer than everything tested here."""
    rng = np.random.default_rng(0)
    template = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: jnp.asarray(abs(rng.normal(0, 0.3, leaf.shape)), leaf.dtype), template)


def shapes(module: nn.Module, size: tuple[int, ...] = (1, 32, 32, 3)) -> dict:
    return dict(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(size)))


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts(name: str) -> None:
    params = shapes(nets.create(name, 10))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet8", *sorted(PARAMETERS)])
def test_layers_are_named_by_stage_and_block(name: str) -> None:
    variables = shapes(nets.create(name, 10))
    assert set(variables) == {"params", "batch_stats"}
    assert {"stem_conv", "stem_norm", "head"} <= set(variables["params"])
    blocks = [key for key in variables["params"] if key.startswith("stage")]
    assert len(blocks) * 2 + 2 == int(name.removeprefix("resnet"))
    for block in blocks:
        assert set(variables["params"][block]) == {"conv1", "norm1", "conv2", "norm2"}
        assert "bias" not in variables["params"][block]["conv1"]


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 32, 32, 3), (1, 9, 7, 2)])
def test_any_image_size_and_number_of_channels(shape: tuple[int, ...]) -> None:
    module = nets.create("resnet8", 7)
    x = jnp.ones(shape)
    variables = variables_of(module, x)
    logits: Any = jax.eval_shape(module.apply, variables, x)
    assert logits.shape == (shape[0], 7) and logits.dtype == jnp.float32


@pytest.mark.slow
def test_training_mode_moves_the_statistics_and_evaluation_does_not() -> None:
    module = nets.create("resnet8", 10)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    variables = variables_of(module, x)

    @functools.partial(jax.jit, static_argnames="train")
    def statistics(variables: Any, x: jax.Array, train: bool) -> Any:
        return module.apply(variables, x, train=train, mutable=["batch_stats"])[1]

    trained, evaluated = statistics(variables, x, train=True), statistics(variables, x, train=False)
    before = variables["batch_stats"]["stem_norm"]["mean"]
    after = trained["batch_stats"]["stem_norm"]["mean"]
    batch: Any = nn.Conv(16, (3, 3), padding=((1, 1), (1, 1)), use_bias=False).apply(
        {"params": variables["params"]["stem_conv"]}, x
    )
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * batch.mean((0, 1, 2)), atol=1e-6)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, evaluated["batch_stats"], variables["batch_stats"]))


def test_a_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    """Option A: with both convolutions at zero, a strided block gives the padded shortcut alone."""
    module = nets.create("resnet8", 10)
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    variables = variables_of(module, x)
    block = jax.tree.map(jnp.zeros_like, variables["params"]["stage2_block01"])
    variables = {**variables, "params": {**variables["params"], "stage2_block01": block}}
    captured: Any = jax.jit(
        lambda v, x: module.apply(v, x, capture_intermediates=True, mutable=["intermediates"])[1]
    )(variables, x)
    before = captured["intermediates"]["stage1_block01"]["__call__"][0]
    after = captured["intermediates"]["stage2_block01"]["__call__"][0]
    np.testing.assert_array_equal(after[..., 8:24], before[:, ::2, ::2])
    assert not after[..., :8].any() and not after[..., 24:].any()


def test_preprocess_is_the_stated_formula_on_the_host_and_under_jit() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images / 255.0 - mean) / std
    host = nets.preprocess("resnet20", images)
    assert isinstance(host, np.ndarray) and host.dtype == np.float32
    np.testing.assert_allclose(host, expected, atol=1e-6)
    device = jax.jit(lambda x: nets.preprocess("resnet20", x))(images)
    assert device.dtype == jnp.float32
    np.testing.assert_allclose(device, expected, atol=1e-6)
    np.testing.assert_allclose(nets.preprocess("resnet20", jnp.asarray(images[0])), expected[0], atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)],
)
def test_preprocess_refuses_what_it_cannot_mean(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=re.escape(f"expected uint8 images [..., 3], got {images.dtype}")):
        nets.preprocess("resnet20", images)


def test_an_unknown_name_gets_the_list_and_a_suggestion(tmp_path: Path) -> None:
    for call in (
        lambda: nets.create("resnet65", 10),
        lambda: nets.load("resnet65", tmp_path / "none", 10),
        lambda: nets.preprocess("resnet65", np.zeros((1, 2, 2, 3), np.uint8)),
    ):
        with pytest.raises(
            ValueError, match=r"unknown model 'resnet65'.*resnet8, resnet20.*did you mean 'resnet56'"
        ):
            call()


@pytest.mark.parametrize("widths", [(16, 8, 64), (16, 32), (0, 1, 2)])
def test_impossible_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths must be three positive"):
        nets.CifarResNet(blocks=1, num_classes=10, widths=widths)  # type: ignore[arg-type]


def test_suggestions_pass_over_capitals() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet20'"):
        nets.create("ResNet-20", 10)


def test_options_are_checked_and_used() -> None:
    assert shapes(nets.create("resnet8", 10, widths=[4, 4, 12]))["params"]["head"]["kernel"].shape == (12, 10)
    with pytest.raises(ValueError, match=r"takes the options blocks, widths, dtype, got \['width'\]"):
        nets.create("resnet8", 10, width=3)
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2, got 1"):
        nets.create("resnet8", 1)


def test_equal_modules_compare_equal_and_hash() -> None:
    assert nets.create("resnet20", 10) == nets.create("resnet20", 10)
    assert hash(nets.create("resnet20", 10, widths=[8, 16, 32])) == hash(
        nets.create("resnet20", 10, widths=(8, 16, 32))
    )

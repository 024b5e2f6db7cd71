"""Every network by name: its published size, its output, its training mode, its dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt import nets
from sculpt.nets.layers import divisible
from sculpt.nets.vgg import adaptive_mean

# 1,000 classes, as torchvision, Keras (MobileNet-V1) and timm (EfficientNet-Lite, ViT-Ti and -S, DeiT) give them; moving
# statistics are not parameters.
IMAGENET = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_small": 2_542_856,
    "mobilenet_v3_large": 5_483_032,
    "efficientnet_lite0": 4_652_008,
    "vit_tiny_patch16": 5_717_416,
    "vit_small_patch16": 22_050_664,
    "vit_base_patch16": 86_567_656,
    "deit_tiny_patch16": 5_717_416,
    "deit_small_patch16": 22_050_664,
    "deit_base_patch16": 86_567_656,
    "deit_tiny_distilled_patch16": 5_910_800,
    "deit_small_distilled_patch16": 22_436_432,
    "deit_base_distilled_patch16": 87_338_192,
}


def encoders(width: int) -> int:
    """Parameters of twelve blocks of attention (4 w^2 + 4 w), dense layers (8 w^2 + 5 w) and two LayerNorms (4 w)."""
    return 12 * (12 * width**2 + 13 * width)


def small_vit(width: int, patch: int, classes: int = 10) -> int:
    """All of a ViT on 64 patches: what comes before, the blocks, the last LayerNorm and the head."""
    before = 3 * patch**2 * width + width + width + 65 * width
    return before + encoders(width) + 2 * width + width * classes + classes


# 10 classes. The VGGs are the ImageNet ones with one dense layer in the place of three.
SMALL = {
    # 78,666 in the file (arXiv 2106.07597), which counts 240 biases in front of BatchNorm and 480 moving statistics.
    "resnet8_mlperf": 78_666 - 240 - 480,
    "vgg16_bn_cifar": 138_365_992 - (25_088 * 4096 + 4096 + 4096**2 + 4096 + 4_097_000) + 5_130,
    "vgg19_bn_cifar": 143_678_248 - (25_088 * 4096 + 4096 + 4096**2 + 4096 + 4_097_000) + 5_130,
    "vit_tiny_patch4": small_vit(192, 4),
    "vit_small_patch4": small_vit(384, 4),
    "vit_tiny_patch2": 16 * 192 - 64 * 192 + small_vit(192, 2),
    "vit_small_patch2": 16 * 384 - 64 * 384 + small_vit(384, 2),
}

IN_TEST_RESNET = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")

SAME_BLOCKS = (
    "resnet101",
    "resnet110",
    "resnet32",
    "resnet44",
    "resnet56",
    "_base",
    "_small_patch",
    "_small_dist",
    "vgg19",
    "patch2",
)
"""Parts of the names of networks that differ from another one in size alone."""

OTHERS = [name for name in nets.list_models() if name not in IN_TEST_RESNET]


def image(name: str, batch: int = 1) -> jax.ShapeDtypeStruct:
    side = nets.image_size(name)
    return jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)


def shapes(module: Any, x: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), x)


def size(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def slow_where_only_the_size_differs(names: Sequence[str]) -> list[Any]:
    """Names for `parametrize`: of networks that differ in depth, width or patch alone, one is in the default run."""
    return [
        pytest.param(n, marks=[pytest.mark.slow] if any(part in n for part in SAME_BLOCKS) else [])
        for n in names
    ]


def test_every_network_has_its_count() -> None:
    assert {*IMAGENET, *SMALL, *IN_TEST_RESNET} == set(nets.list_models())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.fast(
    "resnet34",
    "resnet8_mlperf",
    "vgg16_bn",
    "vgg19_bn",
    "vgg16_bn_cifar",
    "vgg19_bn_cifar",
    "vit_small_patch16",
    "vit_base_patch16",
    "vit_small_patch4",
    "deit_small_patch16",
    "deit_small_distilled_patch16",
)
def test_parameter_counts(name: str) -> None:
    module = nets.create(name, 1000 if name in IMAGENET else 10)
    assert size(shapes(module, image(name))["params"]) == {**IMAGENET, **SMALL}[name]


@pytest.mark.parametrize(("multiplier", "count"), [(0.25, 470_072), (0.5, 1_331_592), (0.75, 2_585_560)])
def test_mobilenet_v1_has_the_published_size_at_every_width(multiplier: float, count: int) -> None:
    module = nets.create("mobilenet_v1", 1000, width_multiplier=multiplier)
    assert size(shapes(module, image("mobilenet_v1"))["params"]) == count


@pytest.mark.parametrize("name", slow_where_only_the_size_differs(OTHERS))
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.fast(
    "None-resnet18",
    "None-resnet8_mlperf",
    "None-vgg16_bn",
    "None-vgg16_bn_cifar",
    "bfloat16-resnet18",
    "bfloat16-resnet8_mlperf",
    "bfloat16-vgg16_bn",
    "bfloat16-vgg16_bn_cifar",
)
def test_logits_are_single_precision_in_either_mode(name: str, dtype: Any) -> None:
    module, x = nets.create(name, 7, dtype=dtype), image(name, 2)
    variables = shapes(module, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def train(variables: Any, x: jax.Array) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return module.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])

    evaluated: Any = jax.eval_shape(module.apply, variables, x)
    trained, updated = jax.eval_shape(train, variables, x)
    for logits in (evaluated, trained):
        assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, updated) == (
        {"batch_stats": jax.tree.map(jnp.shape, variables["batch_stats"])}
        if "batch_stats" in variables
        else {}
    )


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_small", "vit_tiny_patch2"])
@pytest.mark.fast("resnet20")
def test_half_precision_computes_in_half_precision(name: str) -> None:
    module = nets.create(name, 7, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(module.apply)(shapes(module, image(name)), image(name))
    calls = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert calls and {v.aval.dtype for e in calls for v in e.invars} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_distillation_trains_two_heads_that_are_averaged() -> None:
    module: Any = nets.create("deit_tiny_distilled_patch16", 5, patch=4, width=12, depth=1)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    mean, heads = jax.jit(lambda v, x: (module.apply(v, x), module.apply(v, x, method=module.predictions)))(
        variables, x
    )
    assert len(heads) == 2 and float(jnp.abs(heads[0] - heads[1]).max()) > 0
    np.testing.assert_allclose(mean, (heads[0] + heads[1]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [0, 0, 0]),
        (3, [0, 1, 2]),
        (6, [0.5, 2.5, 4.5]),
        (7, [1, 3, 5]),  # PyTorch: 0 to 2, 2 to 4, 4 to 6
        (4, [0.5, 1.5, 2.5]),
    ],
)
def test_adaptive_mean(length: int, expected: list[float]) -> None:
    x = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32)[None, :, None], (2, length, 3))
    np.testing.assert_allclose(adaptive_mean(x, 3, axis=1)[1, :, 2], expected)


@pytest.mark.parametrize(
    ("width", "expected"), [(3, 8), (12, 16), (11, 16), (18, 24), (20, 24), (24, 24), (28, 32), (72 / 4, 24)]
)
def test_widths_are_rounded_to_eights(width: float, expected: int) -> None:
    assert divisible(width) == expected


def test_images_that_cannot_be_are_refused() -> None:
    for name, side, message in (
        ("vgg16_bn", 31, "sides of at least 32"),
        ("vit_tiny_patch4", 30, "of side 4"),
    ):
        module = nets.create(name, 10)
        with pytest.raises(ValueError, match=message):
            shapes(module, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "vit_tiny_patch4",
            {"depth": 0},
            "depth of vit_tiny_patch4 must be a whole number of at least 1, got 0",
        ),
        ("vit_tiny_patch4", {"hidden": 2.5}, "hidden of .* a whole number of at least 1, or None, got 2.5"),
        ("vit_tiny_patch4", {"heads": 5}, "heads must divide the width 192, got 5"),
        ("vit_tiny_patch4", {"distilled": "no"}, "distilled of .* must be True or False, got 'no'"),
        ("mobilenet_v2", {"width_multiplier": -1}, "width_multiplier of .* a number above 0, got -1"),
        ("mobilenet_v1", {"dropout": 1.0}, "dropout of .* a number from 0 to below 1, got 1.0"),
        ("mobilenet_v2", {"stages": [[1, 3, 16, 1]]}, r"stages of .* tuple\[tuple\[.* of whole numbers"),
        ("mobilenet_v3_small", {"rows": [(3, 16, 16, True, False, 2)]}, r"rows of .* tuple\[.*Row, "),
        ("resnet18", {"depths": (2, 2, 0, 2)}, r"depths of .* tuple\[int, \.\.\.\] of whole numbers"),
        ("resnet8", {"widths": (4, 8)}, r"widths of .* tuple\[int, int, int\] of .* got \(4, 8\)"),
        ("vgg16_bn", {"depths": (1, 1)}, r"widths must be as many as depths \(1, 1\), got \(64,"),
        ("resnet8", {"dtype": "bf16"}, "dtype of .* None, or a dtype of jax.numpy: bfloat16, .*, got 'bf16'"),
        ("resnet8", {"dtype": jnp.int8}, "dtype of resnet8 must be None, or a dtype"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        nets.create(name, 10, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, jnp.dtype("float32"), None])
def test_dtypes_of_jax_are_possible(dtype: Any) -> None:
    assert shapes(nets.create("resnet8", 10, dtype=dtype), image("resnet8"))


def test_the_narrowest_mobilenet_has_a_channel() -> None:
    narrow = shapes(nets.create("mobilenet_v1", 10, width_multiplier=0.01), image("mobilenet_v1"))
    assert narrow["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 3, 1)


def test_an_image_size_is_that_of_a_known_network() -> None:
    assert nets.image_size("resnet20") == 32 and nets.image_size("vit_tiny_patch2") == 8
    with pytest.raises(ValueError, match="unknown model 'resnet21'"):
        nets.image_size("resnet21")


@pytest.mark.parametrize("name", nets.list_models())
def test_equal_modules_compare_equal_and_hash(name: str) -> None:
    assert nets.create(name, 10) == nets.create(name, 10) != nets.create(name, 11)
    assert hash(nets.create(name, 10)) == hash(nets.create(name, 10))

"""Learning from what a teacher's layers compute."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.model import Model
from sculpt.training.features import distance, with_features
from sculpt.training.finetuning import finetune
from tests.conftest import untrained_digits
from tests.networks import network
from tests.training.tiny import BASE, KEY, largest_masked, same_bits, tiny_masks, tiny_model, tiny_splits

SPLITS = tiny_splits()
MATCH = dataclasses.replace(BASE, max_steps=4, feature_match=1.0)


def vit() -> Model:
    module = sculpt.nets.VisionTransformer(num_classes=10, patch=4, width=16, depth=1, heads=2)
    return sculpt.from_linen(module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))


def test_the_distance_by_hand() -> None:
    teacher = (jnp.asarray([[3.0, 4.0]]), jnp.asarray([2.0]), jnp.zeros(2))
    student = (jnp.asarray([[3.0, 0.0]]), jnp.asarray([1.0]), jnp.zeros(2))
    # 16 / 25, 1 / 4, and nothing where both are zero.
    assert float(distance(student, teacher)) == pytest.approx((16 / 25 + 1 / 4 + 0) / 3)
    assert float(distance(teacher, teacher)) == 0.0


@pytest.mark.slow
def test_features_are_the_results_of_the_layers() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            kernel = self.param("kernel", nn.initializers.normal(), (3, 3, 1, 4))
            # A product of weights alone is no layer.
            x = jax.lax.conv_general_dilated(
                x, kernel @ jnp.ones((4, 4)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return nn.Dense(10, use_bias=False)(nn.relu(x).mean((1, 2)))

    module, x = Net(), jnp.ones((2, 8, 8, 1))
    model = sculpt.from_linen(module, module.init(jax.random.key(0), x))
    logits, features = with_features(model.apply)(model.params, model.state, x)
    assert [feature.shape for feature in features] == [(2, 8, 8, 4), (2, 10)]
    np.testing.assert_allclose(logits, model(x), atol=1e-6)
    np.testing.assert_allclose(features[1], logits, atol=1e-6)


# A stem, six convolutions and a dense layer; patches, then queries, keys, values, two products, what joins the heads, two dense
# layers, and the head.
@pytest.mark.parametrize(("build", "layers"), [(untrained_digits, 8), (vit, 10), (tiny_model, 2)])
@pytest.mark.fast("tiny_model-2")
def test_training_mode_computes_the_same_layers(build: object, layers: int) -> None:
    model: Model = build()  # type: ignore[operator]
    x = jnp.zeros((2, 8, 8, 1))
    (_, state), own = jax.eval_shape(with_features(model.apply_train), model.params, model.state, x, KEY)
    _, evaluated = jax.eval_shape(with_features(model.apply), model.params, model.state, x)
    assert [f.shape for f in own] == [f.shape for f in evaluated]
    assert len(own) == layers
    assert jax.tree.structure(state) == jax.tree.structure(model.state)


@pytest.mark.slow
def test_a_student_comes_closer_to_the_features_of_its_teacher_than_without() -> None:
    teacher = tiny_model()
    student = teacher.replace(params=jax.tree.map(lambda w: w + 0.1, teacher.params))
    masks = tiny_masks(student)
    images = SPLITS.normalise(jnp.asarray(SPLITS.validation.images))

    def apart(model: Model) -> float:
        found, wanted = (with_features(m.apply)(m.params, m.state, images)[1] for m in (model, teacher))
        return float(distance(found, wanted))

    config = dataclasses.replace(BASE, feature_match=10.0, select_best=False)
    follower = finetune(student, masks, SPLITS, config, KEY, teacher=teacher)
    loner = finetune(student, masks, SPLITS, dataclasses.replace(config, feature_match=0.0), KEY)
    assert apart(follower) < 0.8 * apart(loner)
    assert largest_masked(follower.params, masks) == 0.0


@pytest.mark.slow
def test_it_goes_with_the_other_settings() -> None:
    model = tiny_model()
    config = dataclasses.replace(MATCH, accumulate=2, precision="bfloat16", distillation=0.5, gradual=0.5)
    masks = tiny_masks(model)
    much, little = (
        finetune(model, masks, SPLITS, dataclasses.replace(config, feature_match=weight), KEY, teacher=model)
        for weight in (1.0, 0.1)
    )
    assert not same_bits(much.params, little.params)
    assert largest_masked(much.params, masks) == 0.0


@pytest.mark.slow
def test_computing_activations_again_changes_nothing() -> None:
    model = tiny_model()
    again, plain = (
        finetune(model, None, SPLITS, dataclasses.replace(MATCH, remat=remat), KEY, teacher=model)
        for remat in (True, False)
    )
    for a, b in zip(*map(jax.tree.leaves, (again.params, plain.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_teachers_of_other_layers_are_refused() -> None:
    model = tiny_model()
    other = sculpt.from_function(lambda p, x: x.reshape(x.shape[0], -1) @ p, jnp.ones((64, 10)))
    with pytest.raises(
        ValueError,
        match=r"the teacher has 1 of them, the model 2; the first that differ are \[32, 10\] and \[32, 16\]",
    ):
        finetune(model, None, SPLITS, MATCH, KEY, teacher=other)
    linear = sculpt.from_function(lambda p, x: x.reshape(x.shape[0], -1)[:, :10] * p[None], jnp.ones(10))
    with pytest.raises(ValueError, match="the teacher has 0 of them, the model 0"):
        finetune(linear, None, SPLITS, MATCH, KEY, teacher=linear)
    with pytest.raises(ValueError, match=r"feature_match 1\.0, and there is no teacher"):
        finetune(model, None, SPLITS, MATCH, KEY)


@pytest.mark.slow
def test_depthwise_layers_are_followed_too() -> None:
    """Whatever a CPU computes them as."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (128, 8, 8, 3)).astype(np.uint8), np.arange(128) % 5
    splits = sculpt.from_arrays(images, labels, images[:5], labels[:5], validation=64)
    student = network("separable")
    teacher = student.replace(params=jax.tree.map(lambda w: 1.1 * w, student.params))
    losses: list[float] = []
    config = dataclasses.replace(MATCH, epochs=3, max_steps=None)
    finetune(
        student,
        None,
        splits,
        config,
        KEY,
        teacher=teacher,
        on_metrics=lambda row: losses.append(row["train_loss"]),
    )
    assert losses[-1] < losses[0]

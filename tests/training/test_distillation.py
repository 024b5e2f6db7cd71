"""Learning from a teacher besides the labels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sculpt
from sculpt.training.batch import divergence
from sculpt.training.finetuning import finetune, train
from tests.training.tiny import BASE, KEY, same_bits, tiny_model, tiny_splits

SPLITS = tiny_splits()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_agrees_with_optax(temperature: float) -> None:
    student, teacher = (3 * jax.random.normal(jax.random.key(i), (7, 5)) for i in range(2))
    log_p, q = (
        jax.nn.log_softmax(student / temperature),
        jax.nn.softmax(teacher / temperature),
    )
    expected = temperature**2 * optax.losses.kl_divergence(log_p, q).mean()
    np.testing.assert_allclose(divergence(student, teacher, temperature), expected, rtol=1e-5)
    assert float(divergence(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher_than_without_one() -> None:
    # A teacher that is wrong on purpose: only who listens to it can agree with it.
    teacher = tiny_model()
    student = teacher.replace(params=jax.tree.map(lambda w: 0.5 * jnp.roll(w, 1), teacher.params))
    images = SPLITS.normalise(SPLITS.validation.images)
    wanted = np.asarray(teacher(jnp.asarray(images))).argmax(1)

    def agreement(model: sculpt.Model) -> float:
        return float((np.asarray(model(jnp.asarray(images))).argmax(1) == wanted).mean())

    alone = dataclasses.replace(BASE, epochs=10)
    taught = dataclasses.replace(alone, distillation=1.0, temperature=2.0)
    follower = finetune(student, None, SPLITS, taught, KEY, teacher=teacher)
    loner = finetune(student, None, SPLITS, alone, KEY)
    assert agreement(follower) > agreement(loner) + 0.2


@pytest.mark.slow
def test_the_teacher_is_left_as_it_was_and_temperature_matters() -> None:
    teacher, model = tiny_model(), tiny_model()
    before = jax.tree.map(np.asarray, (teacher.params, teacher.state))
    config = dataclasses.replace(BASE, epochs=1, distillation=0.5)
    warm = finetune(model, None, SPLITS, config, KEY, teacher=teacher)
    cold = finetune(model, None, SPLITS, dataclasses.replace(config, temperature=1.0), KEY, teacher=teacher)
    assert same_bits(before, (teacher.params, teacher.state))
    assert not same_bits(warm.params, cold.params)


def test_what_would_have_no_effect_or_does_not_fit_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"distillation is 0\.5, .* there is no teacher: pass teacher="):
        finetune(model, None, SPLITS, dataclasses.replace(BASE, distillation=0.5), KEY)
    for name in ("distillation", "feature_match"):
        with pytest.raises(
            ValueError, match=rf"{name} is 0\.5, but train has no masks and no teacher: use fine"
        ):
            train(model, SPLITS, dataclasses.replace(BASE, **{name: 0.5}), KEY)
    with pytest.raises(ValueError, match=r"distillation is 0\.0, feature_match 0\.0, and there is a teacher"):
        finetune(model, None, SPLITS, BASE, KEY, teacher=model)
    with pytest.raises(ValueError, match="temperature must be left alone where distillation is 0"):
        dataclasses.replace(BASE, temperature=2.0)
    narrow = sculpt.from_function(lambda p, x: x.reshape(x.shape[0], -1) @ p, jnp.ones((64, 3)))
    with pytest.raises(ValueError, match=r"teacher's logits \[\[32, 3\]\] are not of the shape"):
        finetune(model, None, SPLITS, dataclasses.replace(BASE, distillation=0.5), KEY, teacher=narrow)

"""Many policies fine-tuned at once get what each gets alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import Model
from sculpt.pruning.space import Space
from sculpt.training.config import FinetuneConfig
from sculpt.training.finetuning import TrainingDiverged, finetune
from sculpt.training.policies import finetune_policies
from sculpt.training.run import TrainRun
from tests.training.tiny import BASE, KEY, largest_masked, same_bits, tiny_model, tiny_splits

SPLITS = tiny_splits()
CONFIG = dataclasses.replace(BASE, epochs=2, augment="shift", ema=0.5)


@pytest.fixture(scope="module")
def task() -> tuple[Model, Space, jax.Array]:
    model = tiny_model()
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 8, 8, 1))))
    return model, space, jnp.asarray([[0], [3], [1]], jnp.int32)


@pytest.fixture(scope="module")
def alone(task: tuple[Model, Space, jax.Array]) -> list[Model]:
    model, space, policies = task
    masks = [sculpt.make_masks(space, model.params, policy) for policy in policies]
    return [finetune(model, m, SPLITS, CONFIG, KEY) for m in masks]


@pytest.mark.parametrize("policies_per_chunk", [1, 2, 8])
@pytest.mark.slow
def test_each_policy_gets_what_finetune_gives(
    task: tuple[Model, Space, jax.Array], alone: list[Model], policies_per_chunk: int
) -> None:
    model, space, policies = task
    done: list[tuple[int, int]] = []
    tuned = finetune_policies(
        model,
        space,
        policies,
        SPLITS,
        CONFIG,
        KEY,
        policies_per_chunk=policies_per_chunk,
        on_progress=lambda *counts: done.append(counts),
    )
    assert done == {1: [(1, 3), (2, 3), (3, 3)], 2: [(2, 3), (3, 3)], 8: [(3, 3)]}[policies_per_chunk]
    assert not tuned.diverged.any()
    images = SPLITS.normalise(SPLITS.validation.images)
    for index, single in enumerate(alone):
        found = tuned.model(index)
        if policies_per_chunk == 1:
            assert same_bits(found, single)
        for a, b in zip(*map(jax.tree.leaves, (found, single)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        masks = sculpt.make_masks(space, model.params, policies[index])
        assert largest_masked(found.params, masks) == 0.0
        accuracy = sculpt.evaluate(found, images, SPLITS.validation.labels).accuracy
        assert float(tuned.validation_accuracy[index]) == pytest.approx(float(accuracy), abs=1e-6)


@pytest.mark.slow
def test_side_by_side_each_keeps_its_own_best_epoch(task: tuple[Model, Space, jax.Array]) -> None:
    model, space, policies = task
    noise = np.random.default_rng(4).integers(0, 10, len(SPLITS.validation.labels)).astype(np.int32)
    validation = dataclasses.replace(SPLITS.validation, labels=noise)
    splits = dataclasses.replace(SPLITS, validation=validation)
    best_epochs = []
    for policy in policies:
        rows: list[dict[str, float]] = []
        masks = sculpt.make_masks(space, model.params, policy)
        finetune(model, masks, splits, BASE, KEY, on_metrics=rows.append)
        best_epochs.append(int(np.argmax([row["validation_accuracy"] for row in rows])))
    assert len(set(best_epochs)) > 1, "this seed does not try what is to be tried"
    one, three = (
        finetune_policies(model, space, policies, splits, BASE, KEY, policies_per_chunk=n) for n in (1, 3)
    )
    np.testing.assert_array_equal(one.validation_accuracy, three.validation_accuracy)
    for a, b in zip(*map(jax.tree.leaves, (one.models, three.models)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_side_by_side_weights_fade_and_a_teacher_is_followed(task: tuple[Model, Space, jax.Array]) -> None:
    model, space, policies = task
    teacher = model.replace(params=jax.tree.map(lambda w: 2.0 * w, model.params))
    config = dataclasses.replace(BASE, epochs=2, gradual=0.5, distillation=0.5)
    tuned = finetune_policies(
        model, space, policies, SPLITS, config, KEY, policies_per_chunk=3, teacher=teacher
    )
    untaught = dataclasses.replace(config, distillation=0.0)
    for index, policy in enumerate(policies):
        masks = sculpt.make_masks(space, model.params, policy)
        found = tuned.model(index)
        assert largest_masked(found.params, masks) == 0.0
        single = finetune(model, masks, SPLITS, config, KEY, teacher=teacher)
        for a, b in zip(*map(jax.tree.leaves, (found, single)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert index == 2
    alone = finetune_policies(model, space, policies, SPLITS, untaught, KEY, policies_per_chunk=3)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), tuned.models, alone.models)
    assert max(jax.tree.leaves(difference)) > 1e-2


@pytest.mark.parametrize("policies_per_chunk", [1, 2])
def test_policies_that_have_nothing_to_fade_are_refused(
    task: tuple[Model, Space, jax.Array], policies_per_chunk: int
) -> None:
    model, space, policies = task
    pruned = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policies[1]))
    config = dataclasses.replace(BASE, epochs=1, gradual=0.5)
    done: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match="the weights that the masks prune are zero already: pass the dense"):
        finetune_policies(
            pruned, space, policies[:2], SPLITS, config, KEY,
            policies_per_chunk=policies_per_chunk, on_progress=lambda *counts: done.append(counts),
        )  # fmt: skip
    assert done == []


@pytest.mark.parametrize("policies_per_chunk", [1, 2])
@pytest.mark.slow
def test_a_kill_loses_no_policy(
    task: tuple[Model, Space, jax.Array],
    policies_per_chunk: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, space, policies = task

    def tune(directory: Path | None) -> Any:
        return finetune_policies(
            model, space, policies, SPLITS, CONFIG, KEY,
            policies_per_chunk=policies_per_chunk, directory=directory,
        )  # fmt: skip

    expected = tune(None)
    epochs: list[int] = []
    finish = TrainRun.finish_epoch

    def kill_in_the_last_epoch_but_one(run: TrainRun, on_metrics: Any) -> None:
        epochs.append(run.epoch)
        if len(epochs) == 4:
            raise KeyboardInterrupt
        finish(run, on_metrics)

    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "finish_epoch", kill_in_the_last_epoch_but_one)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path)
    names = {1: ["00000", "00001"], 2: ["00000", "00002"]}[policies_per_chunk]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    epochs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TrainRun, "finish_epoch", lambda run, _: (epochs.append(run.epoch), finish(run, None)))
        assert same_bits(tune(tmp_path), expected)
    assert epochs == {1: [2, 1, 2], 2: [2]}[policies_per_chunk]
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        finetune_policies(model, space, policies[::-1], SPLITS, CONFIG, KEY, directory=tmp_path)


@pytest.mark.parametrize("policies_per_chunk", [1, 2])
@pytest.mark.slow
def test_a_policy_that_diverges_does_not_stop_the_others(policies_per_chunk: int) -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        hidden = x.reshape(x.shape[0], -1) @ params["first"]["kernel"]
        return hidden @ params["last"]["kernel"]

    def explode(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        # Only the dense network has this weight, the least of all.
        bad = jnp.where(params["first"]["kernel"][0, 0] == 0.0, 1.0, jnp.nan)
        return apply(params, x) * bad

    keys = jax.random.split(jax.random.key(0))
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (64, 8)).at[:, 0].multiply(1e-3)},
        "last": {"kernel": jax.random.normal(keys[1], (8, 10))},
    }
    model = sculpt.from_function(apply, params, apply_train=explode)
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 8, 8, 1))))
    policies = jnp.asarray([[0], [3]], jnp.int32)
    config = dataclasses.replace(BASE, epochs=1)
    with pytest.raises(TrainingDiverged):
        finetune(model, sculpt.make_masks(space, params, policies[0]), SPLITS, config, KEY)
    tuned = finetune_policies(
        model, space, policies, SPLITS, config, KEY, policies_per_chunk=policies_per_chunk
    )
    assert tuned.diverged.tolist() == [True, False]
    assert tuned.validation_accuracy[0] == 0.0 < tuned.validation_accuracy[1]
    assert jnp.isnan(tuned.models.params["last"]["kernel"][0]).all()
    assert jnp.isfinite(tuned.models.params["last"]["kernel"][1]).all()


def test_what_does_not_fit_is_refused(task: tuple[Model, Space, jax.Array]) -> None:
    model, space, policies = task

    def tune(policies: Any = policies, config: FinetuneConfig = CONFIG, **options: Any) -> None:
        finetune_policies(model, space, policies, SPLITS, config, KEY, **options)

    with pytest.raises(ValueError, match=r"expected policies \[n, 1\] with n >= 1, got \[1\]"):
        tune(policies[0])
    with pytest.raises(ValueError, match="policies_per_chunk must be a whole number of at least 1, got 0"):
        tune(policies_per_chunk=0)
    with pytest.raises(ValueError, match="there is no teacher"):
        tune(config=dataclasses.replace(CONFIG, distillation=0.5))
    with pytest.raises(ValueError, match="batch_size is 500, more than the 200 images"):
        tune(config=dataclasses.replace(CONFIG, batch_size=500))

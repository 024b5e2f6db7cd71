"""Masks that set in over many steps instead of at once."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sculpt
from sculpt.data.splits import Split
from sculpt.training.finetuning import finetune, train
from sculpt.training.program import make_program
from sculpt.training.run import TrainRun
from tests.training.tiny import (
    BASE,
    KEY,
    OPTIMIZERS,
    largest_masked,
    same_bits,
    tiny_masks,
    tiny_model,
    tiny_splits,
)

SPLITS = tiny_splits()
HALF = dataclasses.replace(BASE, gradual=0.5)
"""18 steps in three epochs of six: what is pruned fades in nine of them."""


def states(run: TrainRun, count: int) -> list[jax.Array]:
    """Runs that many steps, each by itself; the diverged flags of each."""
    order = jnp.arange(len(SPLITS.train.labels), dtype=jnp.int32)
    return [run._call(order, run.step + 1) for _ in range(count)]


def test_pruned_weights_follow_the_cubic_by_hand() -> None:
    """With a loss that no weight moves, after t of 4 steps (1 - t / 4)^3 is left: 27, 8, 1 and 0 of 64 parts."""

    def constant(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], 10)) + 0.0 * params.sum()

    model = sculpt.from_function(constant, jnp.asarray([64.0, -64.0, 64.0]))
    masks = jnp.asarray([True, False, False])
    config = dataclasses.replace(BASE, max_steps=8, gradual=0.5)
    run = TrainRun.begin(model, masks, SPLITS, config, KEY, None)
    seen = [np.asarray(run.train.params)]
    for _ in range(5):
        states(run, 1)
        seen.append(np.asarray(run.train.params))
    expected = [[64, -left, left] for left in (64, 27, 8, 1, 0, 0)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert (seen[4][1:] == 0).all()


@pytest.mark.parametrize("gradual", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_the_fading_ends_before_the_last_step(steps: int, gradual: float) -> None:
    config = dataclasses.replace(BASE, max_steps=steps, gradual=gradual)
    program = make_program(tiny_model(), SPLITS, config)
    assert program.fade_steps == min(math.ceil(gradual * steps), steps - 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_correctness_01_pruned_weights_end_at_exact_zeros_wherever_the_run_is_cut(name: str) -> None:
    model = tiny_model()
    masks = tiny_masks(model)
    config = dataclasses.replace(OPTIMIZERS[name], gradual=0.99, max_steps=7)
    assert largest_masked(finetune(model, masks, SPLITS, config, KEY).params, masks) == 0.0


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_correctness_01_nothing_is_remembered_of_faded_weights(name: str) -> None:
    model = tiny_model()
    masks = tiny_masks(model)
    run = TrainRun.begin(model, masks, SPLITS, dataclasses.replace(OPTIMIZERS[name], gradual=0.5), KEY, None)

    def largest() -> list[float]:
        worst = [largest_masked(run.train.params, masks), largest_masked(run.train.weights[0], masks)]
        optax.tree.map_params(
            run.program.optimizer(),
            lambda m, mask: worst.append(largest_masked(m, mask)),
            run.train.optimizer,
            masks,
        )
        return worst

    states(run, 8)
    before = largest()
    assert before[0] > 0
    assert before[1] > 0
    assert len(before) == 2 or max(before[2:]) > 0
    for _ in range(2):
        states(run, 1)
        assert max(largest()) == 0.0


@pytest.mark.slow
def test_the_best_epoch_is_one_with_the_masks_in_force() -> None:
    """A network that is right as long as a pruned weight is above 0.1: after the first of three epochs, 0.27 is left of it."""

    def apply(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], 10)).at[:, 0].set(params[1] - 0.1)

    def apply_train(params: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], 10)) + 0.0 * params.sum()

    model = sculpt.from_function(apply, jnp.ones(2), apply_train=apply_train)
    zeros = np.zeros(len(SPLITS.validation.labels), np.int32)
    splits = dataclasses.replace(SPLITS, validation=Split(SPLITS.validation.images, zeros))
    rows: list[dict[str, float]] = []
    config = dataclasses.replace(BASE, gradual=0.94)
    tuned = finetune(model, jnp.asarray([True, False]), splits, config, KEY, on_metrics=rows.append)
    assert [row["validation_accuracy"] for row in rows] == [1.0, 0.0, 0.0]
    assert tuned.params.tolist() == [1.0, 0.0]


@pytest.mark.slow
def test_a_run_resumes_while_weights_fade(tmp_path: Path) -> None:
    model = tiny_model()
    masks = tiny_masks(model)
    config = dataclasses.replace(OPTIMIZERS["adamw"], ema=0.5, gradual=0.5, checkpoint_every=4)
    whole = finetune(model, masks, SPLITS, config, KEY)

    class Stop(Exception):
        pass

    def stop(step: int, total: int) -> None:
        if step == 8:  # the last checkpoint is that of step 6, of nine
            raise Stop

    with pytest.raises(Stop):
        finetune(model, masks, SPLITS, config, KEY, directory=tmp_path, on_progress=stop)
    assert same_bits(finetune(model, masks, SPLITS, config, KEY, directory=tmp_path), whole)


@pytest.mark.slow
def test_loops_and_several_devices_fade_alike() -> None:
    model = tiny_model()
    masks = tiny_masks(model)
    config = dataclasses.replace(HALF, max_steps=6)
    one = finetune(model, masks, SPLITS, config, KEY)
    looped = finetune(model, masks, SPLITS, dataclasses.replace(config, steps_per_call=6), KEY)
    shared = finetune(model, masks, SPLITS, config, KEY, devices=2)
    for other in (looped, shared):
        assert largest_masked(other.params, masks) == 0.0
        for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_where_masks_set_in_at_once_the_program_is_the_one_of_before() -> None:
    """Nothing of the schedule is in it."""
    model = tiny_model()
    masks = tiny_masks(model)
    program = make_program(model, SPLITS, BASE)
    text = str(jax.make_jaxpr(lambda p: program.faded(p, masks, jnp.int32(3)))(model.params))
    plain = str(jax.make_jaxpr(lambda p: sculpt.pruning.mask_params(p, masks))(model.params))
    assert text == plain


def test_what_has_nothing_to_fade_is_refused() -> None:
    model = tiny_model()
    masks = tiny_masks(model)
    with pytest.raises(ValueError, match=r"gradual is 0\.5, and there are no masks to set in: pass masks"):
        finetune(model, None, SPLITS, HALF, KEY)
    with pytest.raises(
        ValueError, match=r"gradual is 0\.5, but train has no masks and no teacher: use finetune"
    ):
        train(model, SPLITS, HALF, KEY)
    pruned = sculpt.apply_masks(model, masks)
    with pytest.raises(ValueError, match="the weights that the masks prune are zero already: pass the dense"):
        finetune(pruned, masks, SPLITS, HALF, KEY)

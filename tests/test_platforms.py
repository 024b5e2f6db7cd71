"""Everything that is compiled lowers for TPU and GPU too, on a machine that has neither."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.agents.actor_critic import site_inputs
from sculpt.agents.config import SearchConfig
from sculpt.agents.environment import EnvParams, PruningEnv
from sculpt.agents.learning import SearchTask, init_state, make_program, snapshot, update
from sculpt.pruning.costs import _cost
from sculpt.repair.recalibration import _recalibrated
from sculpt.scoring.evaluation import _totals, score_compiled
from sculpt.scoring.problem import make_problem
from sculpt.training import program as training_program
from sculpt.training import step as training
from tests.conftest import untrained_digits

SPLITS = sculpt.load_data("digits")
IMAGES, LABELS = SPLITS.normalise(SPLITS.train.images[:32]), np.asarray(SPLITS.train.labels[:32])
MODEL = untrained_digits()
SPACE = sculpt.make_space(sculpt.trace(MODEL, IMAGES[:1]))
KEY = jax.random.key(0)


def lowers(function: Any, *arguments: Any) -> None:
    """Lowers a jitted function for both platforms; an operation that either lacks would raise."""
    text = function.trace(*arguments).lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert "func.func public @main" in text


@pytest.mark.parametrize(
    "plan",
    [
        sculpt.EvaluationPlan(),
        sculpt.EvaluationPlan(policies_per_chunk=4, convolution="im2col", precision="bfloat16"),
        sculpt.EvaluationPlan(policies_per_chunk=2, policy_shards=4, image_shards=2),
    ],
    ids=["plain", "im2col in half precision", "mesh"],
)
@pytest.mark.slow
def test_scoring_lowers(plan: sculpt.EvaluationPlan) -> None:
    problem = make_problem(MODEL, SPACE, IMAGES, LABELS, IMAGES, plan)
    lowers(score_compiled, problem, jnp.zeros((8, SPACE.num_sites), jnp.int32), jnp.int32(8))


def test_evaluation_of_one_model_and_costs_lower() -> None:
    labels = jnp.asarray(LABELS, jnp.int32)
    lowers(_totals, MODEL.apply, MODEL.task, MODEL.params, MODEL.state, IMAGES, labels)
    lowers(_recalibrated, MODEL.apply_train, MODEL.params, MODEL.state, jnp.asarray(IMAGES)[None])
    lowers(_cost, SPACE, jnp.zeros((8, SPACE.num_sites), jnp.int32))


@pytest.mark.parametrize("method", ["agent", "evolution"])
@pytest.mark.slow
def test_a_search_lowers(method: Any) -> None:
    config = SearchConfig(method=method, evaluations=8, batch_size=4, rerank=0)
    env = PruningEnv(SPACE, config.batch, config.rounds, config.objective, config.reward)
    program = make_program(env, config)
    problem = make_problem(MODEL, SPACE, IMAGES, LABELS, IMAGES)
    task = SearchTask(
        env=EnvParams(problem, jnp.asarray([0.5])),
        sites=site_inputs(SPACE, MODEL.params),
        rule=jnp.zeros(SPACE.num_sites, jnp.int32),
    )
    state = init_state(program, task, KEY)
    lowers(update, program, task, state, KEY)
    lowers(snapshot, state)


@pytest.mark.slow
def test_fine_tuning_lowers() -> None:
    config = sculpt.FinetuneConfig(batch_size=16, augment="crop_flip", ema=0.9, distillation=0.5)
    masks = sculpt.make_masks(SPACE, MODEL.params, jnp.zeros(SPACE.num_sites, jnp.int32))
    for settings in (config, dataclasses.replace(config, optimizer="adamw")):
        program = training_program.make_program(MODEL, SPLITS, settings, MODEL.apply)
        state = training.start(program, MODEL.params, MODEL.state, masks)
        images, labels = jnp.asarray(SPLITS.train.images), jnp.asarray(SPLITS.train.labels, jnp.int32)
        order = training.epoch_order(KEY, len(labels), jnp.int32(0))
        teacher = (MODEL.params, MODEL.state)
        arguments = (masks, teacher, images, labels, order, KEY)
        lowers(training.run_step, program, state, *arguments)
        lowers(training.run_steps, program, state, jnp.int32(2), *arguments)
    raw = jnp.asarray(SPLITS.validation.images[:32])[None]
    normalisation = (tuple(map(float, SPLITS.mean)), tuple(map(float, SPLITS.std)))
    lowers(
        training.validate, MODEL.apply, MODEL.task, normalisation, False, MODEL.params, MODEL.state, raw,
        jnp.asarray(SPLITS.validation.labels[:32], jnp.int32)[None], jnp.ones((1, 32), bool),
    )  # fmt: skip


@pytest.mark.slow
def test_a_compact_model_lowers() -> None:
    policy = sculpt.uniform_policy(SPACE, 0.5)
    small = sculpt.compact(
        sculpt.apply_masks(MODEL, sculpt.make_masks(SPACE, MODEL.params, policy)), SPACE, policy
    )
    lowers(jax.jit(lambda params, state, x: small.apply(params, state, x)), small.params, small.state, IMAGES)

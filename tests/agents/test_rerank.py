"""The last step of a search: what the best few are judged by, and what is refused before anything is scored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sculpt
from sculpt.agents.loop import trial_network
from sculpt.agents.rerank import Referee
from sculpt.model import Model
from sculpt.pruning.space import Space
from sculpt.training.config import FinetuneConfig
from tests.training.tiny import tiny_splits

IMAGE = jnp.zeros((1, 8, 8, 1))


class Sluggish(nn.Module):
    """BatchNorm whose running statistics hardly move in a few steps."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for _ in range(2):
            x = nn.Conv(16, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.999)(x))
        return nn.Dense(10)(x.mean((1, 2)))


@functools.cache
def sluggish() -> tuple[Model, Space]:
    """A trained one, its statistics those of the data, and its space."""
    module = Sluggish()
    model = sculpt.from_linen(module, module.init(jax.random.key(0), IMAGE))
    splits = tiny_splits()
    # Validated by the running statistics all epochs look alike.
    config = FinetuneConfig(epochs=30, learning_rate=0.1, select_best=False)
    model = sculpt.train(model, splits, config, jax.random.key(0))
    model = sculpt.recalibrate(model, splits.normalise(splits.train.images))
    return model, sculpt.make_space(sculpt.trace(model, IMAGE))


@pytest.mark.slow
def test_candidates_are_judged_with_statistics_of_their_own() -> None:
    model, space = sluggish()
    splits = tiny_splits()
    policy = np.asarray(sculpt.random_policies(space, jax.random.key(1), 1, budget=0.4))[0]
    masks = sculpt.make_masks(space, model.params, policy)
    calibration = jnp.asarray(splits.normalise(splits.train.images[:128]))
    hardly = FinetuneConfig(max_steps=2, learning_rate=1e-6)
    config = sculpt.SearchConfig(rerank=1, rerank_finetune=hardly)
    judged = Referee(model, space, splits, config, calibration, jax.random.key(2)).judge(policy)
    images, labels = splits.normalise(splits.validation.images), splits.validation.labels
    stale = sculpt.apply_masks(model, masks)
    own, without = (
        float(sculpt.evaluate(network, images, labels).accuracy)
        for network in (sculpt.recalibrate(stale, calibration), stale)
    )
    assert judged == pytest.approx(own, abs=0.03)
    assert own > without + 0.1


@pytest.mark.slow
def test_the_network_that_a_policy_was_judged_by_is_had_again() -> None:
    model, space = sluggish()
    splits, key = tiny_splits(), jax.random.key(4)
    config = sculpt.SearchConfig(
        method="uniform",
        evaluations=2,
        score_images=64,
        calibration_images=64,
        rerank=1,
        rerank_finetune=FinetuneConfig(max_steps=2),
    )
    found = sculpt.search(model, space, splits, config, key)
    again = trial_network(model, space, splits, config, key, found.policy)
    split = splits.validation
    accuracy = sculpt.evaluate(again, split.images, split.labels, normalise=splits.normalise).accuracy
    assert float(accuracy) == found.validation_accuracy
    masks = sculpt.make_masks(space, model.params, found.policy)
    for weight, mask in zip(jax.tree.leaves(again.params), jax.tree.leaves(masks), strict=True):
        assert not np.asarray(weight)[~np.asarray(mask)].any()


def never(*_: Any) -> Any:
    raise AssertionError("something was scored")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rerank_finetune": FinetuneConfig(batch_size=201)}, "batch_size is 201, more than the 200 images"),
        ({"calibration_images": 100}, "calibration_images must be below 64 or a multiple of it.* got 100"),
    ],
)
def test_what_the_search_cannot_end_with_is_refused_at_its_beginning(
    config: dict[str, Any], message: str
) -> None:
    model, space = sluggish()
    config = {"score_images": 64, "calibration_images": 64, "evaluations": 4, **config}
    with pytest.raises(ValueError, match=message):
        sculpt.search(
            model, space, tiny_splits(), sculpt.SearchConfig(**config), jax.random.key(0), scorer=never
        )


class Dropped(nnx.Module):
    """Dropout's key is part of its state."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(nnx.relu(self.first(x.reshape(x.shape[0], -1)))))


@pytest.mark.slow
def test_networks_with_keys_in_their_state_can_be_searched_in_a_directory(tmp_path: Path) -> None:
    model = sculpt.from_nnx(Dropped(nnx.Rngs(0)))
    space = sculpt.make_space(sculpt.trace(model, IMAGE))
    config = sculpt.SearchConfig(
        method="random", evaluations=4, batch_size=2, rerank=0, score_images=32, calibration_images=32
    )
    found = [
        sculpt.search(model, space, tiny_splits(), config, jax.random.key(0), directory=tmp_path)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(found[0].policy, found[1].policy)

"""Every family of networks goes the whole way on real images: training, the agent's search, masked fine-tuning, compaction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt import nets
from sculpt.data.splits import Splits, from_arrays
from sculpt.pruning.compaction.compactor import max_difference
from tests.nets.test_prunable import NARROW
from tests.networks import slow_but

FAMILIES = {nets.family(name): name for name in NARROW}
"""Family -> the last of its networks."""


def digits(side: int) -> Splits:
    """The digits 0 to 4 in three colours and the size that a network takes."""
    splits = sculpt.load_data("digits")

    def scaled(split: sculpt.Split) -> tuple[np.ndarray, np.ndarray]:
        chosen = split.labels < 5
        images = np.repeat(split.images[chosen], 3, axis=-1)
        factor = side // images.shape[1]
        resized = images.repeat(factor, 1).repeat(factor, 2) if factor else images[:, ::2, ::2]
        return resized, split.labels[chosen]

    return from_arrays(*scaled(splits.train), *scaled(splits.test), name="digits", validation=64)


@slow_but("mobilenet", among=sorted(FAMILIES), argument="family")
@pytest.mark.slow
def test_the_whole_way(family: str) -> None:
    name = FAMILIES[family]
    options, side = NARROW[name]
    splits, key = digits(side), jax.random.key(0)
    image = jnp.zeros((1, side, side, 3))
    module = nets.create(name, 5, **options)
    model = sculpt.from_linen(module, jax.jit(module.init)(key, image))
    recipe = sculpt.recipe_for(family, side)
    common = {"augment": "none", "batch_size": 32, "max_steps": 10, "epochs": 1}
    model = sculpt.train(model, splits, recipe.train(**common), key)
    space = sculpt.make_space(sculpt.trace(model, image))
    config = sculpt.SearchConfig(
        budget=0.6, evaluations=8, batch_size=4, score_images=32, calibration_images=64, rerank=0
    )
    found = sculpt.search(model, space, splits, config, key)
    masks = sculpt.make_masks(space, model.params, found.policy)
    tuned = sculpt.finetune(
        model, masks, splits, recipe.finetune(**common, distillation=0.5), key, teacher=model
    )
    for kept, weight in zip(jax.tree.leaves(masks), jax.tree.leaves(tuned.params), strict=True):
        assert not np.asarray(weight)[~np.asarray(kept)].any()
    small = sculpt.compact(tuned, space, found.policy, masks=masks)
    images = jnp.asarray(splits.normalise(splits.validation.images))
    assert max_difference(tuned, small, images) <= 1e-4
    macs, params = sculpt.count_cost(small, image)
    dense_macs, dense_params = sculpt.count_cost(model, image)
    assert macs <= 0.6 * dense_macs
    assert params < dense_params

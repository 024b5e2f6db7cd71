"""Recipes: their numbers come out as they are told, scaled with the batch, and every network of `nets` has one."""

from __future__ import annotations

import numpy as np
import pytest

from sculpt import nets
from sculpt.training.recipes import RECIPES, recipe_for


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_at_the_published_batch_a_recipe_is_as_published(name: str) -> None:
    published = RECIPES[name].config
    config = RECIPES[name].train(batch_size=published.batch_size)
    assert config == published
    halved = RECIPES[name].train(batch_size=published.batch_size // 2)
    assert halved.learning_rate == pytest.approx(published.learning_rate / 2)
    assert RECIPES[name].train(learning_rate=0.7, epochs=3).learning_rate == 0.7


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_fine_tuning_is_gentler_and_mixes_nothing(name: str) -> None:
    train, finetune = RECIPES[name].train(), RECIPES[name].finetune(epochs=4)
    assert finetune.learning_rate == pytest.approx(0.3 * train.learning_rate)
    assert (finetune.epochs, finetune.mixup, finetune.cutmix) == (4, 0.0, 0.0)
    assert (finetune.optimizer, finetune.weight_decay) == (train.optimizer, train.weight_decay)
    assert RECIPES[name].finetune(learning_rate=0.5, batch_size=8).learning_rate == 0.5


def test_every_network_has_a_recipe() -> None:
    for name in nets.list_models():
        small, large = (recipe_for(nets.family(name), side) for side in (32, 224))
        assert ("transformer" in small.name) == name.startswith(("vit", "deit"))
        assert large.name in ("photographs", "mobile", "transformer") or name == "resnet8_mlperf"
    assert recipe_for("resnet", 32).name == "residual"
    assert recipe_for("vgg", 95).name == "plain"
    assert recipe_for("vit", 96).name == "transformer"


def test_the_learning_rate_is_scaled_with_numpy_s_batches_too() -> None:
    config = RECIPES["residual"].train(batch_size=np.int64(32))  # type: ignore[arg-type]
    assert config == RECIPES["residual"].train(batch_size=32)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="no recipe for 'resnet20', expected one of efficientnet"):
        recipe_for("resnet20", 32)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got '8'"):
        RECIPES["plain"].train(batch_size="8")
    with pytest.raises(ValueError, match="unknown model 'x'"):
        nets.family("x")

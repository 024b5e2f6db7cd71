"""A network and a data set that train in a blink."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import sculpt
from sculpt.data.splits import Split, Splits
from sculpt.model import Model
from sculpt.training.config import FinetuneConfig

KEY = jax.random.key(3)
BASE = FinetuneConfig(epochs=3, batch_size=32, learning_rate=0.05)
"""Three epochs of six steps; tests share what is compiled for it."""
OPTIMIZERS: dict[str, FinetuneConfig] = {
    "sgd": dataclasses.replace(BASE, momentum=0.0),
    "momentum": dataclasses.replace(BASE, weight_decay=0.1),
    "nesterov": dataclasses.replace(BASE, nesterov=True),
    "adamw": dataclasses.replace(BASE, optimizer="adamw"),
    "ema": dataclasses.replace(BASE, ema=0.5),
}


class Tiny(nn.Module):
    """One hidden layer with BatchNorm and dropout, on flattened images."""

    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


def tiny_model() -> Model:
    module = Tiny()
    return sculpt.from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))


def tiny_splits(train: int = 200, validation: int = 70) -> Splits:
    """The first digits of each part."""
    splits = sculpt.load_data("digits")

    def first(split: Split, n: int) -> Split:
        return Split(split.images[:n], split.labels[:n])

    return dataclasses.replace(
        splits,
        train=first(splits.train, train),
        validation=first(splits.validation, validation),
        test=first(splits.test, 50),
    )


def tiny_masks(model: Model, seed: int = 7) -> dict:
    """Half of every leaf, biases and norms included."""
    leaves, treedef = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.bernoulli(k, 0.5, w.shape) for k, w in zip(keys, leaves)])


def largest_masked(params: object, masks: object) -> float:
    """max |w[mask == 0]|."""
    worst = 0.0
    for weight, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks)):
        hidden = np.abs(np.asarray(weight))[~np.asarray(mask)]
        worst = max(worst, float(hidden.max(initial=0.0)))
    return worst


def same_bits(one: object, other: object) -> bool:
    """Whether two trees agree bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)

"""Spaces and traces go to other processes: pickled, and copied."""

from __future__ import annotations

import copy
import pickle

import jax
import numpy as np
import pytest
from flax import linen as nn

import sculpt

X = jax.random.normal(jax.random.key(0), (4, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))


MODEL = sculpt.from_linen(Net(), Net().init(jax.random.key(1), X))
SPACE = sculpt.make_space(sculpt.trace(MODEL, X), families=("channels", "unstructured"))


def test_a_space_is_the_same_after_pickling() -> None:
    ranked = sculpt.importance(MODEL, SPACE.trace, "l1")
    space = sculpt.make_space(SPACE.trace, families=("channels", "unstructured"), importance=ranked)
    found, trace = pickle.loads(pickle.dumps((space, space.trace)))
    assert found.trace is trace
    policy = sculpt.random_policies(space, jax.random.key(2), 1)[0]
    assert found.describe(policy) == space.describe(policy)
    assert float(sculpt.cost(found, policy).macs) == float(sculpt.cost(space, policy).macs)
    masks = [sculpt.make_masks(one, MODEL.params, policy) for one in (found, space)]
    jax.tree.map(np.testing.assert_array_equal, *masks)
    small = sculpt.compact(sculpt.apply_masks(MODEL, masks[0]), found, policy, masks=masks[0])
    again = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(again(X), small(X))


def test_copies_are_the_same_object() -> None:
    for value in (SPACE, SPACE.trace):
        assert copy.deepcopy(value) is value and copy.copy(value) is value


def test_a_network_that_has_changed_is_refused() -> None:
    loads, (model, inputs, axis, leaves, groups) = SPACE.trace.__reduce__()
    assert loads(model, inputs, axis, leaves, groups).groups == groups
    with pytest.raises(ValueError, match="trace the model again"):
        loads(model, inputs, axis, leaves, groups[1:])

"""Cuts optimizer moments, moving averages and masks to the shapes of a compact network."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sculpt.arguments import checked
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import CompactFunction
from sculpt.pruning.compaction.plan import Plan, sliced
from sculpt.trees import leaf_parts


@checked
def compact_tree(tree: Any, small: Model) -> Any:
    """Cuts what belongs to the arrays of a dense network to the shapes of the compact one.

        small = sculpt.compact(tuned, space, policy, masks=masks)
        state = sculpt.compact_tree(state, small)  # of optax: training goes on with optimizer.update(gradients, state, small.params)

    An array belongs to an array of the dense network if its path ends with the path of that one, as `0/mu/Conv_0/kernel` ends with
    `Conv_0/kernel`: first moments, averages of parameters or BatchNorm statistics, masks, gradients. All others, such as counts and
    keys, stay as they are.

    Args:
      tree: a pytree of arrays.
      small: what `sculpt.compact` returned; its parameters may have been trained on.

    Returns:
      The tree with those arrays cut.

    Raises:
      ValueError: if `small` is no compact network, or an array that belongs to one of the dense network has another shape than that.
    """
    if not isinstance(small.apply, CompactFunction):
        raise ValueError(
            "compact_tree expected what sculpt.compact returned, got a model that is not compact"
        )
    rows = _rows(small.apply.plan)
    longest = max(map(len, rows), default=0)
    leaves, structure = jax.tree.flatten(tree)
    cut = []
    for parts, leaf in zip(leaf_parts(tree), leaves):
        ends = (parts[len(parts) - n :] for n in range(min(longest, len(parts)), -1, -1))
        row = next((rows[end] for end in ends if end in rows), None)
        if row is not None and np.shape(leaf) == row[0]:
            cut.append(sliced(leaf, row[1]))
        elif row is None or np.size(leaf) <= 1:  # a placeholder, or one number for the array
            cut.append(leaf)
        else:
            raise ValueError(
                f"compact_tree expected {'/'.join(map(str, parts))} to be of the dense shape {list(row[0])}, got "
                f"{list(np.shape(leaf))}: what is not an array of numbers for each weight, as the factors of Adafactor, has to begin "
                "anew (optimizer.init(small.params))"
            )
    return structure.unflatten(cut)


_Row = tuple[tuple[int, ...], tuple[np.ndarray, ...]]
"""Shape of a dense array, and the places that stay along each of its axes."""


def _rows(plan: Plan) -> dict[tuple[str | int, ...], _Row]:
    """By the paths of the dense network's arrays, those of the state also without its collection ("batch_stats")."""
    shapes = [tuple(array.shape) for array in (*jax.tree.leaves(plan.params), *jax.tree.leaves(plan.state))]
    rows = list(zip(shapes, plan.places, strict=True))
    params, state = leaf_parts(plan.params), leaf_parts(plan.state)
    short = {parts[1:]: row for parts, row in zip(state, rows[len(params) :]) if len(parts) > 1}
    return short | dict(zip([*state, *params], [*rows[len(params) :], *rows[: len(params)]]))

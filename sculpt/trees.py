"""Pytrees of arrays: their shapes, and the names of their leaves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np


def leaf_parts(tree: Any) -> list[tuple[str | int, ...]]:
    """The paths of a pytree's leaves, part by part: keys and names as text, places in sequences as numbers. The `value` of what holds
    nothing else, such as Flax NNX variables, is left out."""
    found = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    held = Counter(path[:-1] for path in found)
    paths = []
    for path in found:
        variable = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
        paths.append(tuple(map(_part, path[:-1] if variable and held[path[:-1]] == 1 else path)))
    return paths


def _part(key: Any) -> str | int:
    if isinstance(key, jax.tree_util.SequenceKey):
        return key.idx
    return str(getattr(key, "key", getattr(key, "name", key)))


def leaf_paths(tree: Any) -> list[str]:
    """The paths of a pytree's leaves, parts joined by "/"."""
    return ["/".join(map(str, parts)) for parts in leaf_parts(tree)]


def shapes_of(tree: Any) -> Any:
    """The tree with arrays replaced by `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x)), tree)

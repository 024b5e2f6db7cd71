"""SHA-256 digests of arrays."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def add_arrays(digest: Any, tree: Any) -> None:
    """Adds every array of a pytree to a digest of `hashlib`: where it is, dtype, shape and bytes. Keys of `jax.random` are arrays too."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        typed_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = np.asarray(jax.random.key_data(leaf) if typed_key else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())


def digest_of(tree: Any) -> str:
    """SHA-256 of every array of a pytree, in hexadecimal digits."""
    digest = hashlib.sha256()
    add_arrays(digest, tree)
    return digest.hexdigest()

"""Reads and writes pytrees of arrays as safetensors files, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.files import written_whole
from sculpt.trees import leaf_paths

_OWN = "sculpt"
"""The one entry of the file's metadata, JSON: safetensors writes several in an order that changes from run to run."""
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
_REMEDY = "remove it, and write it again"
_DEEPEST = 100
"""Parts that a name has at the most, where it is read without a template."""
_ROOT = "array"
"""Name of the array of a tree that is a single leaf."""


def save_params(tree: Any, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a pytree of arrays as safetensors, under its tree paths joined by "/" ("conv1/kernel").

    Linen dictionaries, NNX states, a whole `Model` and trees of masks all work; random keys are stored as their data.
    The file appears under its name only when it is complete.

    Args:
      tree: pytree of arrays; floating-point numbers of 16 to 64 bits, integers of 8 to 64 bits, booleans.
      path: the file; its folder is made if need be.
      metadata: strings stored beside the arrays.

    Raises:
      ValueError: if two leaves have the same path, there is no leaf, or a dtype is none of these.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    keys: dict[str, str] = {}
    for name, leaf in zip(_names(tree), jax.tree.leaves(tree)):
        if _is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.asarray(jax.device_get(leaf), order="C")
        if arrays[name].dtype.name not in _DTYPES:
            raise ValueError(
                f"{name} is of {arrays[name].dtype.name}, which safetensors does not hold; expected one of {', '.join(_DTYPES)}"
            )
    metadata = dict(metadata or {})
    about = {"sha256": _digest(arrays, metadata), "keys": keys, "metadata": metadata}
    with written_whole(path) as temporary:
        # Not `save_file`, whose files only their owner may read.
        temporary.write_bytes(save(arrays, {_OWN: json.dumps(about, sort_keys=True)}))


def load_params(path: str | Path, template: Any = None) -> Any:
    """Reads what `save_params` wrote.

    Args:
      path: the file.
      template: pytree of arrays or `ShapeDtypeStruct`s that says what is expected; the result has its structure.
        None: nested dictionaries along the paths, which need not be the structure that was saved.

    Raises:
      ValueError: if the file is absent or damaged, or its arrays are not those of the template (the first few mismatches
        are named).
    """
    arrays, about = _read(Path(path))
    keys = about.get("keys", {})
    wide = [
        f"{n} ({a.dtype.name})"
        for n, a in arrays.items()
        if jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype
    ]
    if wide:
        raise ValueError(
            f"{path} holds arrays of 64 bits, which jax would cut to 32: {', '.join(wide[:3])}; "
            "switch them on with jax.config.update('jax_enable_x64', True)"
        )
    try:
        leaves = {
            name: jax.random.wrap_key_data(jnp.asarray(array), impl=keys[name])
            if name in keys
            else jnp.asarray(array)
            for name, array in arrays.items()
        }
    except Exception as error:  # JAX raises many kinds for what are no keys
        raise ValueError(f"{path} holds random keys that JAX does not take ({error}); {_REMEDY}") from error
    if template is None:
        return _nested(leaves, Path(path))
    names = _names(template)
    _check_like(Path(path), dict(zip(names, jax.tree.leaves(template))), leaves)
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in names])


def load_metadata(path: str | Path) -> dict[str, str]:
    """The strings stored beside the arrays.

    Raises:
      ValueError: if the file is absent or damaged.
    """
    _, about = _read(Path(path))
    return about["metadata"]


def load_checksum(path: str | Path) -> str | None:
    """The checksum of a file's contents that `save_params` put beside them; None where another program wrote the file.

    Raises:
      ValueError: if the file is absent or damaged.
    """
    with _opened(Path(path)) as file:
        return _about(file, Path(path)).get("sha256")


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with _opened(path) as file:
        about = _about(file, path)
        arrays = {name: _tensor(file, name, path) for name in file.keys()}  # noqa: SIM118
    if "sha256" in about and about["sha256"] != _digest(arrays, about["metadata"]):
        raise ValueError(f"{path} is damaged: it does not match its checksum; {_REMEDY}")
    return arrays, about


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); {_REMEDY}") from error


def _about(file: Any, path: Path) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if _OWN not in metadata:
        return {"metadata": metadata}
    try:
        about = json.loads(metadata[_OWN])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({error}); {_REMEDY}") from error
    if not isinstance(about, dict) or not all(
        isinstance(part, dict) and all(isinstance(value, str) for value in part.values())
        for part in (about.get("metadata"), about.get("keys", {}))
    ):
        raise ValueError(f"{path} is damaged: its metadata are not what was written; {_REMEDY}")
    return about


def _names(tree: Any) -> list[str]:
    names = [path or _ROOT for path in leaf_paths(tree)]
    if not names:
        raise ValueError("expected a pytree with at least one array, got an empty one")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"these tree paths name more than one array: {', '.join(twice[:3])}")
    return names


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(metadata):
        digest.update(f"{name} {metadata[name]}".encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_like(path: Path, expected: Mapping[str, Any], found: Mapping[str, jax.Array]) -> None:
    wrong = [*_missing(expected, found)]
    wrong += [f"{name} is not expected" for name in found if name not in expected]
    for name, leaf in expected.items():
        if name not in found:
            continue
        want, have = (f"{x.dtype}{list(x.shape)}" for x in (leaf, found[name]))
        if want != have:
            wrong.append(f"{name}: expected {want}, got {have}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} does not fit: {'; '.join(wrong[:3])}{more}")


def _missing(expected: Iterable[str], found: Mapping[str, Any]) -> Iterable[str]:
    return (f"{name} is missing" for name in expected if name not in found)


def _tensor(file: Any, name: str, path: Path) -> np.ndarray:
    try:
        array = file.get_tensor(name)
    except Exception as error:  # safetensors has none of its own for what NumPy lacks
        raise ValueError(f"{path}: {name} cannot be read as an array of NumPy ({error})") from error
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"{path}: {name} is of {array.dtype.name}, expected one of {', '.join(_DTYPES)}")
    return array


def _nested(leaves: Mapping[str, Any], path: Path) -> Any:
    """Dictionaries along the paths.

    Raises:
      ValueError: for a path with more than `_DEEPEST` parts, or one that leads through another array.
    """
    if set(leaves) == {_ROOT}:
        return leaves[_ROOT]
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        if len(parents) >= _DEEPEST:
            raise ValueError(f"{path}: the name {name[:40]}... has more than {_DEEPEST} parts")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{path}: {name} is below another array: load it with a template, or rename it"
                )
        if last in node:
            raise ValueError(f"{path}: {name} is above other arrays: load it with a template, or rename it")
        node[last] = leaf
    return tree

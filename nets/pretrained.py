"""Pretrained weights: safetensors files in PyTorch's names and layout, read into these networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sculpt.nets.registry import create

_STATISTICS = {"running_mean": "mean", "running_var": "var"}
_IGNORED = "num_batches_tracked"


def load(name: str, path: str | Path, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network and its weights from a safetensors file.

    Args:
      name: one of `list_models()`.
      path: file with PyTorch parameter names (`layer1.0.conv1.weight`), kernels as OIHW.
      num_classes: width of the head in the file.

    Returns:
      `(module, variables)` with float32 collections "params" and "batch_stats".

    Raises:
      ValueError: if the file is missing, no safetensors file, or its names, shapes or values do not fit.
    """
    module = create(name, num_classes)
    template = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    found, arrays, faults = {}, [], []
    for key, value in _read(Path(path)).items():
        parts = _flax_path(key)
        if parts in found:
            faults.append(f"{found[parts][0]} and {key} are one parameter here")
        elif not key.endswith(_IGNORED):
            found[parts] = (key, value)
    for tree_path, expected in leaves:
        parts = tuple(str(p.key) for p in tree_path)
        key, value = found.pop(parts, (None, None))
        if value is None:
            faults.append(f"missing {'/'.join(parts)} {list(expected.shape)}")
            continue
        value = _from_torch(value)
        if value.shape != expected.shape:
            faults.append(
                f"{key} gives {list(value.shape)} where {'/'.join(parts)} has {list(expected.shape)}"
            )
        elif not np.isfinite(value).all():
            faults.append(f"{key} holds NaN or infinite values")
        arrays.append(jnp.asarray(value))
    faults.extend(f"unexpected {key} {list(value.shape)}" for key, value in found.values())
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{path} does not fit {name} with {num_classes} classes: {'; '.join(faults[:5])}{more}"
        )
    return module, jax.tree.unflatten(treedef, arrays)


def _flax_path(key: str) -> tuple[str, ...]:
    """`layer2.0.bn1.running_mean` -> ("batch_stats", "stage2_block01", "norm1", "mean")."""
    *owner, kind = key.split(".")
    name = ".".join(owner)
    name = re.sub(r"layer(\d)\.(\d+)", lambda m: f"stage{m[1]}_block{int(m[2]) + 1:02d}", name)
    name = re.sub(r"\bbn(\d)", r"norm\1", name)
    name = {"conv1": "stem_conv", "norm1": "stem_norm", "linear": "head", "fc": "head"}.get(name, name)
    if kind in _STATISTICS:
        return ("batch_stats", *name.split("."), _STATISTICS[kind])
    if kind == "weight":
        kind = "scale" if name.split(".")[-1].startswith(("norm", "stem_norm")) else "kernel"
    return ("params", *name.split("."), kind)


def _from_torch(value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give the path of a .safetensors file")
    with path.open("rb") as file:
        start = file.read(8)
    pickled = start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or start[:4] == b"PK\x03\x04"
    if pickled or path.suffix in (".pth", ".pt", ".pkl"):
        raise ValueError(
            f"{path} looks like a pickled PyTorch checkpoint, which is never loaded here: convert it where you trust it, with "
            "`safetensors.torch.save_file(torch.load(file)['state_dict'], 'weights.safetensors')`"
        )
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again") from error

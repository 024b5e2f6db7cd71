"""Pretrained weights: reads and writes files with PyTorch's or Keras' names and layouts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sculpt.arguments import check_key
from sculpt.files import written_whole
from sculpt.nets.keras import read_keras
from sculpt.nets.layouts import WeightSource, from_file, shape_in_file, to_file
from sculpt.nets.naming import namings, sources
from sculpt.nets.registry import create, family, image_size, list_models

_IGNORED = "num_batches_tracked"
_SHOWN = 5
_OTHER_NETWORK = 0.25
"""Share of arrays that do not fit, from which the other networks of the family are tried."""
ArrayPath = tuple[str, ...]
Shapes = dict[ArrayPath, tuple[int, ...]]
"""Path of an array here, `(collection, *layer, kind)`, to its shape."""


def load(
    name: str,
    path: str | Path,
    num_classes: int,
    *,
    side: int | None = None,
    head_key: jax.Array | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A network and its weights from a file.

    Safetensors files may be named as torchvision, timm or Hugging Face name them (which of them is found out), `.npz` files
    as Keras does. Half and double precision become float32.

    Args:
      name: one of `list_models()`.
      path: the file.
      num_classes: width of the head in the file, or of the new one.
      side: side of the images, in pixels, where there are position embeddings: those of a file for another size are
        interpolated (bicubic, as in arXiv 2012.12877). None: that of `image_size(name)`. Other networks refuse it.
      head_key: `jax.random.key` to draw a new head with, to be trained for other classes than those of the file, whose head is
        passed over. None: the head is that of the file.
      **options: as in `create`.

    Returns:
      `(module, variables)` with float32 collections "params" and, where there is BatchNorm, "batch_stats".

    Raises:
      ValueError: if the file is missing or damaged, holds a pickle, or its names, shapes or values do not fit; for a `side`
        without position embeddings.
    """
    module = create(name, num_classes, **options)
    if not isinstance(path, str | Path):
        raise ValueError(f"path must be that of a file, got {path!r}")
    if head_key is not None:
        check_key("head_key", head_key)
    if side is not None and family(name) != "vit":
        raise ValueError(
            f"{name} has no position embeddings, its weights do not depend on the size of the images: leave out side={side}"
        )
    side = image_size(name) if side is None else side
    shapes, treedef = _shapes(module, side)
    head = set() if head_key is None else _head(shapes, name, num_classes, side, options)
    file = Path(path)
    arrays, faults = _fitted(file, module, shapes, head)
    if faults:
        hint = ""
        if (
            head_key is None
            and not _fitted(file, module, shapes, _head(shapes, name, num_classes, side, options))[1]
        ):
            hint = "; all but the head fits: draw a new one for your classes (--new-head on the command line, head_key= in Python)"
        elif len(faults) >= _OTHER_NETWORK * len(shapes) and (other := _network_of(file, name, num_classes)):
            hint = f"; these are weights of {other}"
        raise ValueError(f"{path} does not fit {name} with {num_classes} classes: {_shown(faults)}{hint}")
    if head_key is not None:
        fresh = dict(_leaves(jax.jit(module.init)(head_key, jnp.zeros((1, side, side, 3)))))
        arrays = {**arrays, **{ours: fresh[ours] for ours in head}}
    return module, jax.tree.unflatten(treedef, [jnp.asarray(arrays[ours]) for ours in shapes])


def save(
    module: nn.Module, variables: Mapping[str, Any], path: str | Path, naming: str | None = None
) -> None:
    """Writes weights as a safetensors file that the network's PyTorch twin reads with `load_state_dict`.

    Args:
      module: the network, as `create` or `load` gives it.
      variables: its collections, `{"params": model.params, **model.state}` of a `Model`; dense shapes, for a compact
        network has no twin (`sculpt.save_params` keeps those).
      path: where to; written beside it first, so that nothing is half written.
      naming: one of `namings(module)`: "torchvision", "timm", ...; None: the first of them.

    Raises:
      ValueError: for an unknown naming, or arrays that are not those of the network or not finite.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"weights are written to .safetensors files, got {path}")
    known = namings(module)
    naming = known[0] if naming is None else naming
    if naming not in known:
        raise ValueError(f"naming must be one of {', '.join(known)}, got {naming!r}")
    leaves = dict(_leaves(variables))
    expected, _ = _shapes(module, _side_of(module, leaves))
    wrong = [
        f"{'/'.join(ours)} is {list(np.shape(leaves[ours])) if ours in leaves else 'missing'}, expected {list(shape)}"
        for ours, shape in expected.items()
        if ours not in leaves or np.shape(leaves[ours]) != shape
    ] + [f"unexpected {'/'.join(ours)}" for ours in leaves if ours not in expected]
    if wrong:
        raise ValueError(
            f"the arrays are not those of the dense {type(module).__name__}: {'; '.join(wrong[:_SHOWN])}"
        )
    if bad := [
        f"{'/'.join(ours)} {fault}" for ours in expected if (fault := _impossible(ours, leaves[ours]))
    ]:
        raise ValueError(f"such weights would not be read again: {_shown(bad)}")
    parts: dict[str, dict[int, np.ndarray]] = {}
    for ours, source in zip(expected, _sources(module, naming, expected), strict=True):
        array = to_file(np.asarray(leaves[ours], np.float32), source)
        parts.setdefault(source.key, {})[source.part] = array
    tensors = {
        key: np.ascontiguousarray(
            np.concatenate([found[i] for i in sorted(found)]) if len(found) > 1 else found[0]
        )
        for key, found in parts.items()
    }
    from safetensors.numpy import save as to_bytes

    with written_whole(path) as temporary:
        temporary.write_bytes(to_bytes(tensors))


def download(repository: str, file: str = "model.safetensors", revision: str | None = None) -> Path:
    """A file of the Hugging Face hub, such as `download("timm/resnet50.a1_in1k")`, kept in the hub's cache.

    Raises:
      ValueError: without the extra `hub`, without a network where the file is not in the cache, or where there is no such
        file.
    """
    try:
        from huggingface_hub import hf_hub_download  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            "reading from the hub needs the extra: pip install 'autosculpt[hub]', or download the file yourself and give "
            "its path"
        ) from error
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the hub, its cache, HTTP and sockets each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"could not get {file} of {repository} from the hub ({reason}): check the name and the connection, or download "
            "it elsewhere and give its path"
        ) from error


def _head(
    shapes: Shapes, name: str, num_classes: int, side: int, options: Mapping[str, Any]
) -> set[ArrayPath]:
    """The arrays whose shapes depend on the number of classes."""
    others, _ = _shapes(create(name, num_classes + 1, **options), side)
    return {ours for ours, shape in shapes.items() if others[ours] != shape}


def _fitted(
    file: Path, module: nn.Module, shapes: Shapes, drawn: set[ArrayPath]
) -> tuple[dict[ArrayPath, np.ndarray], list[str]]:
    """The arrays of a file by our paths, without those in `drawn`, and a list of faults."""
    if file.suffix == ".npz" and file.is_file():
        arrays, names = read_keras(file, module)
        faults = [
            f"missing {'/'.join(ours)} {list(shape)}"
            for ours, shape in shapes.items()
            if ours not in arrays and ours not in drawn
        ]
        faults += [f"unexpected {names[ours]}" for ours in arrays if ours not in shapes]
        faults += [
            f"{names[ours]} is {list(arrays[ours].shape)}, expected {list(shape)}"
            for ours, shape in shapes.items()
            if ours in arrays and arrays[ours].shape != shape and ours not in drawn
        ]
    else:
        arrays, names, faults = _from_pytorch(_read(file), module, shapes, drawn)
    faults += [
        f"{names[ours]} {fault}"
        for ours in shapes
        if ours in arrays and ours not in drawn and (fault := _impossible(ours, arrays[ours]))
    ]
    return arrays, faults


def _network_of(file: Path, name: str, num_classes: int) -> str | None:
    """The network of the family of `name` whose arrays the file holds, the head aside; None if there is none."""
    for other in (other for other in list_models() if other != name and family(other) == family(name)):
        module = create(other, num_classes)
        shapes, _ = _shapes(module, image_size(other))
        # Quicker than `_head`, and exact enough for a hint.
        head = {ours for ours, shape in shapes.items() if num_classes in shape}
        with contextlib.suppress(ValueError):  # Keras' names are known for some networks only
            if not _fitted(file, module, shapes, head)[1]:
                return other
    return None


def _shapes(module: nn.Module, side: int) -> tuple[Shapes, Any]:
    template = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    )
    return {path: leaf.shape for path, leaf in _leaves(template)}, jax.tree.structure(template)


def _leaves(tree: Any) -> Iterator[tuple[ArrayPath, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield tuple(str(part.key) for part in path), leaf


def _sources(module: nn.Module, naming: str, shapes: Shapes) -> list[WeightSource]:
    return sources(module, naming, list(shapes), [len(shape) for shape in shapes.values()])


def _impossible(ours: ArrayPath, values: Any) -> str:
    """What is wrong with the values of an array, or nothing."""
    if not np.isfinite(np.asarray(values, np.float32)).all():
        return "holds NaN or infinite values"
    if ours[0] == "batch_stats" and ours[-1] == "var" and np.min(values) < 0:
        return "holds negative variances"
    return ""


def _shown(faults: list[str]) -> str:
    """The first few faults, and of names that the file has too many the first at least."""
    shown = faults[:_SHOWN]
    extra = next((fault for fault in faults if fault.startswith("unexpected")), None)
    if extra is not None and extra not in shown:
        shown[-1] = extra
    more = f" and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
    return "; ".join(shown) + more


def _side_of(module: nn.Module, leaves: Mapping[ArrayPath, Any]) -> int:
    """A side of images for which the network has arrays of these shapes."""
    position = leaves.get(("params", "position"))
    if position is None:
        return 32
    tokens = 2 if getattr(module, "distilled", False) else 1
    return math.isqrt(max(np.shape(position)[1] - tokens, 1)) * getattr(module, "patch", 1)


def _from_pytorch(
    raw: dict[str, np.ndarray], module: nn.Module, shapes: Shapes, drawn: set[ArrayPath]
) -> tuple[dict[ArrayPath, np.ndarray], dict[ArrayPath, str], list[str]]:
    """Arrays under our paths, save those that will be drawn; what the file calls them, and what is wrong with it."""
    raw = {key: value for key, value in raw.items() if not key.endswith(_IGNORED)}
    tables = [_sources(module, naming, shapes) for naming in namings(module)]
    table = max(tables, key=lambda found: len({source.key for source in found} & set(raw)))
    arrays: dict[ArrayPath, np.ndarray] = {}
    faults: list[str] = []
    for (ours, shape), source in zip(shapes.items(), table, strict=True):
        if ours in drawn:
            continue
        expected, value = shape_in_file(source, shape), raw.get(source.key)
        if value is None:
            faults.append(f"missing {source.key} {list(expected)}")
        elif not (np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16"):
            faults.append(f"{source.key} is {value.dtype}, expected floating point")
        else:
            value = np.asarray(value, np.float32)
            if ours[-1] == "position" and value.ndim == 3 and value.shape != expected:
                value = _interpolated(value, expected, 2 if getattr(module, "distilled", False) else 1)
            if value.shape == expected:
                arrays[ours] = from_file(value, source, shape)
            else:
                faults.append(f"{source.key} is {list(value.shape)}, expected {list(expected)}")
    known = {source.key for source in table}
    faults += [f"unexpected {key} {list(value.shape)}" for key, value in raw.items() if key not in known]
    return arrays, {ours: source.key for ours, source in zip(shapes, table)}, list(dict.fromkeys(faults))


def _interpolated(position: np.ndarray, expected: tuple[int, ...], tokens: int) -> np.ndarray:
    """Position embeddings `[1, tokens + side^2, width]` for another side; as they are where that is not what they are."""
    old, new = (math.isqrt(max(n - tokens, 0)) for n in (position.shape[1], expected[1]))
    square = old**2 + tokens == position.shape[1] and new**2 + tokens == expected[1] and old > 0
    if not square or position.shape[2] != expected[2]:
        return position
    grid = position[:, tokens:].reshape(1, old, old, -1)
    resized = jax.image.resize(grid, (1, new, new, grid.shape[-1]), "bicubic")
    return np.concatenate([position[:, :tokens], np.asarray(resized).reshape(1, new**2, -1)], axis=1)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give the path of a .safetensors or .npz file")
    with path.open("rb") as file:
        start = file.read(8)
    pickled = start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    # A zip file, as PyTorch writes; Keras' own are such too.
    pickled |= start[:4] == b"PK\x03\x04" and path.suffix != ".keras"
    if pickled or path.suffix in (".pth", ".pt", ".pkl"):
        raise ValueError(
            f"{path} looks like a pickled PyTorch checkpoint, which is never loaded here: convert it where you trust it, with "
            "`safetensors.torch.save_file(state_dict, 'weights.safetensors')`, where state_dict is what torch.load(file) gives, or "
            "its entry 'state_dict' or 'model'"
        )
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except Exception as error:  # safetensors has none of its own for what NumPy lacks
        if path.suffix not in ("", ".safetensors"):
            raise ValueError(
                f"weights are read from .safetensors files, or Keras' .npz files, got {path}: convert it to one of them"
            ) from error
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again") from error
    if own := [key for key in arrays if "/" in key]:
        raise ValueError(
            f"{path} holds arrays under tree paths, such as {own[0]}, as sculpt.save_params and run directories keep them, not "
            "under PyTorch's names: read it with sculpt.load_params, and write it with sculpt.nets.save to give it here"
        )
    return arrays

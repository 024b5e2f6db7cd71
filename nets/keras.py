"""Weights of Keras networks: `.npz` files of arrays named `conv2d_3|conv2d_3|kernel:0`, as MLPerf Tiny's are kept.

Keras numbers the layers of a kind in the order in which they were made, so layers are told by kind and order. Convolutions
there have biases in front of BatchNorm, which have no effect but to shift its mean: they are taken off the mean.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn

from sculpt.nets.mlperf import MlperfResNet
from sculpt.nets.mobilenet import MobileNetV1

_KINDS = {
    "conv2d": "convolution",
    "depthwise_conv2d": "depthwise",
    "batch_normalization": "norm",
    "dense": "dense",
}
_ARRAYS = {
    "kernel:0": ("params", "kernel"),
    "depthwise_kernel:0": ("params", "kernel"),
    "bias:0": ("params", "bias"),
    "gamma:0": ("params", "scale"),
    "beta:0": ("params", "bias"),
    "moving_mean:0": ("batch_stats", "mean"),
    "moving_variance:0": ("batch_stats", "var"),
}
Arrays = dict[tuple[str, ...], np.ndarray]


def read_keras(path: Path, module: nn.Module) -> tuple[Arrays, dict[tuple[str, ...], str]]:
    """The arrays of a file under our paths, in our layout, and what each is called in the file.

    Raises:
      ValueError: if the file cannot be read, or its layers are not those of this network.
    """
    raw = _read(path)
    layers: dict[str, dict[int, str]] = defaultdict(dict)
    for name in raw:
        layer = name.split("|")[0]
        kind, number = re.fullmatch(r"(.*?)(?:_(\d+))?", layer).groups()  # type: ignore[union-attr]
        if kind not in _KINDS or name.split("|")[-1] not in _ARRAYS:
            raise ValueError(f"{path} has the unknown array {name}: expected layers {', '.join(_KINDS)}")
        layers[_KINDS[kind]][int(number or 0)] = layer
    wanted = _layers(module)
    for kind, owners in wanted.items():
        if len(layers[kind]) != len(owners):
            raise ValueError(
                f"{path} does not fit {type(module).__name__}: it has {len(layers[kind])} {kind} layers where "
                f"{len(owners)} are expected"
            )
    owner_of = {
        layers[kind][number]: owner
        for kind, owners in wanted.items()
        for number, owner in zip(sorted(layers[kind]), owners, strict=True)
    }
    arrays: Arrays = {}
    names: dict[tuple[str, ...], str] = {}
    for name, value in raw.items():
        collection, kind = _ARRAYS[name.split("|")[-1]]
        key = (collection, *owner_of[name.split("|")[0]].split("/"), kind)
        arrays[key] = value.transpose(0, 1, 3, 2) if "depthwise_kernel" in name else value
        names[key] = name
    for key in [k for k in arrays if k[-2:] == ("conv", "bias")]:
        mean = ("batch_stats", *key[1:-2], "norm", "mean")
        if mean in arrays and arrays[mean].shape == arrays[key].shape:
            arrays[mean] = arrays[mean] - arrays[key]
            del arrays[key], names[key]
    return arrays, names


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not name.startswith("__")}
    except Exception as error:  # zipfile, zlib and numpy have their own
        raise ValueError(f"{path} is not a readable .npz file of arrays ({error}); make it again") from error


def _layers(module: nn.Module) -> dict[str, list[str]]:
    """Kind -> our layers, in the order in which Keras makes them."""
    for known, order in _ORDERS.items():
        if isinstance(module, known):
            return order(module)
    expected = ", ".join(kind.__name__ for kind in _ORDERS)
    raise ValueError(f"Keras weights are read for {expected}; those of {type(module).__name__} are not")


def _resnet(net: MlperfResNet) -> dict[str, list[str]]:
    convolutions, norms = ["stem/conv"], ["stem/norm"]
    for block in range(1, len(net.widths) + 1):
        for conv in (f"block{block}_conv1", f"block{block}_conv2"):
            convolutions.append(f"{conv}/conv")
            norms.append(f"{conv}/norm")
        convolutions += [f"block{block}_shortcut"] if block > 1 else []
    return {"convolution": convolutions, "depthwise": [], "norm": norms, "dense": ["head"]}


def _mobilenet(net: MobileNetV1) -> dict[str, list[str]]:
    blocks = [f"block{index + 1:02d}" for index in range(len(net.blocks))]
    norms = [f"{block}_{part}/norm" for block in blocks for part in ("depthwise", "pointwise")]
    return {
        "convolution": ["stem/conv", *(f"{block}_pointwise/conv" for block in blocks)],
        "depthwise": [f"{block}_depthwise/conv" for block in blocks],
        "norm": ["stem/norm", *norms],
        "dense": ["head"],
    }


_ORDERS: dict[type[nn.Module], Callable[[Any], dict[str, list[str]]]] = {
    MlperfResNet: _resnet,
    MobileNetV1: _mobilenet,
}

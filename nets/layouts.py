"""Conversion of array layouts between PyTorch files and Flax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

Layout = Literal["same", "vector", "dense", "heads", "conv", "pointwise", "flattened"]


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Where a file keeps one of our arrays."""

    key: str
    """Name in the file."""
    layout: Layout
    """How it lies there: "same"; "vector": flat; "dense": `[out, in]`; "heads": likewise, where we have `[in, heads, width]`;
    "conv": OIHW; "pointwise": a dense layer as a 1x1 convolution; "flattened": a dense layer on `[channels, side, side]`."""
    part: int = 0
    """Which of `parts` equal stretches of the file's first axis (a fused qkv has three)."""
    parts: int = 1
    side: int = 1
    """Of the feature map that a flattened dense layer sees."""
    window: bool = False
    """Whether a flattened dense layer lies there as a convolution `[out, channels, side, side]`."""


def shape_in_file(source: WeightSource, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the file's array must have for one of ours; of all its parts together."""
    first, *rest = to_file(np.broadcast_to(np.float32(0), shape), source).shape
    return (first * source.parts, *rest)


def from_file(array: np.ndarray, source: WeightSource, shape: tuple[int, ...]) -> np.ndarray:
    """Our array of that shape; the file's has `shape_in_file`."""
    length = len(array) // source.parts if array.ndim else 0
    if source.parts > 1:
        array = array[source.part * length : (source.part + 1) * length]
    return _READ[source.layout](array, source).reshape(shape)


def to_file(array: np.ndarray, source: WeightSource) -> np.ndarray:
    """The file's array, or its part, of ours."""
    return _WRITE[source.layout](array, source)


def _flattened(array: np.ndarray, source: WeightSource) -> np.ndarray:
    area = source.side**2
    channels = math.prod(array.shape[:-1]) // area
    windows = array.reshape(source.side, source.side, channels, array.shape[-1]).transpose(3, 2, 0, 1)
    return windows if source.window else windows.reshape(array.shape[-1], -1)


_READ: dict[str, Callable[[np.ndarray, WeightSource], np.ndarray]] = {
    "same": lambda a, s: a,
    "vector": lambda a, s: a,
    "dense": lambda a, s: a.T,
    "heads": lambda a, s: a.T,
    "conv": lambda a, s: a.transpose(2, 3, 1, 0),
    "pointwise": lambda a, s: a[:, :, 0, 0].T,
    "flattened": lambda a, s: a.reshape(len(a), -1, s.side, s.side).transpose(2, 3, 1, 0),
}
_WRITE: dict[str, Callable[[np.ndarray, WeightSource], np.ndarray]] = {
    "same": lambda a, s: a,
    "vector": lambda a, s: a.reshape(-1),
    "dense": lambda a, s: a.reshape(-1, a.shape[-1]).T,
    "heads": lambda a, s: a.reshape(a.shape[0], -1).T,
    "conv": lambda a, s: a.transpose(3, 2, 0, 1),
    "pointwise": lambda a, s: a.T[:, :, None, None],
    "flattened": _flattened,
}

"""Networks by name."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
from flax import linen as nn

from sculpt.nets.resnet import CifarResNet

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}


def list_models() -> list[str]:
    """Names that `create` knows."""
    return list(_BLOCKS)


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network by name, not initialised.

    Args:
      name: one of `list_models()`.
      num_classes: width of the head.
      **options: `widths=(16, 32, 64)`: channels of the three stages, never falling.

    Raises:
      ValueError: for an unknown name or option, or fewer than two classes.
    """
    _check(name)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if set(options) - {"widths"}:
        raise ValueError(f"{name} takes the option 'widths', got {sorted(options)}")
    widths = tuple(options.get("widths", CifarResNet.widths))
    if len(widths) != 3 or widths[0] < 1 or list(widths) != sorted(widths):
        raise ValueError(f"widths must be three positive channel counts that never fall, got {widths}")
    return CifarResNet(blocks=_BLOCKS[name], num_classes=num_classes, widths=widths)


def _check(name: str) -> None:
    if name not in _BLOCKS:
        close = difflib.get_close_matches(name, _BLOCKS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(_BLOCKS)}{hint}")


def preprocess(name: str, images: Any) -> Any:
    """uint8 images `[..., 3]` (0 to 255) as the float32 that the pretrained weights of `name` expect.

    NumPy arrays give NumPy arrays, JAX arrays JAX arrays; works inside `jax.jit`.

    Raises:
      ValueError: for an unknown name, another dtype or other than three channels.
    """
    _check(name)
    if images.dtype != np.uint8 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images [..., 3], got {images.dtype}{list(images.shape)}")
    mean, std = np.asarray(_MEAN, np.float32), np.asarray(_STD, np.float32)
    shape = (1,) * (images.ndim - 1) + (3,)
    return (images.astype(np.float32) / 255.0 - mean.reshape(shape)) / std.reshape(shape)

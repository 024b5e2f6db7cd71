"""Networks by name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import numpy as np
from flax import linen as nn

from sculpt.nets import efficientnet, mobilenet, mobilenet_v3, resnet, vgg, vit

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_FAMILIES = (resnet, vgg, mobilenet, mobilenet_v3, efficientnet, vit)
_MODELS: dict[str, tuple[type[nn.Module], dict[str, Any], int]] = {
    name: entry for family in _FAMILIES for name, entry in family.MODELS.items()
}


def list_models() -> list[str]:
    """Names that `create` knows."""
    return list(_MODELS)


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network by name, not initialised.

    Args:
      name: one of `list_models()`.
      num_classes: width of the head.
      **options: fields of the network's module in place of the published ones, such as `widths=(16, 32, 64)` of a CIFAR ResNet,
        `width_multiplier=0.5` of a MobileNet, `depth=6` of a vision transformer, `dtype=jnp.bfloat16` of any.

    Raises:
      ValueError: for an unknown name or option, an impossible value, or fewer than two classes.
    """
    module, fields, _ = _entry(name)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    known = [f.name for f in dataclasses.fields(module) if f.name not in ("num_classes", "parent", "name")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name} takes the options {', '.join(known)}, got {unknown}")
    # Tuples, so that modules hash.
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return module(**{**fields, **chosen, "num_classes": num_classes})


def image_size(name: str) -> int:
    """Side of the square images that a network was published for; most take other sizes too.

    Raises:
      ValueError: for an unknown name.
    """
    return _entry(name)[2]


def _entry(name: str) -> tuple[type[nn.Module], dict[str, Any], int]:
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown model {name!r}, expected one of {', '.join(_MODELS)}{hint}")
    return _MODELS[name]


def preprocess(name: str, images: Any) -> Any:
    """uint8 images `[..., 3]` (0 to 255) as the float32 that the pretrained weights of `name` expect: by the mean and the
    deviation of ImageNet's colours.

    NumPy arrays give NumPy arrays, JAX arrays JAX arrays; works inside `jax.jit`.

    Raises:
      ValueError: for an unknown name, another dtype or other than three channels.
    """
    _entry(name)
    if images.dtype != np.uint8 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images [..., 3], got {images.dtype}{list(images.shape)}")
    mean, std = np.asarray(_MEAN, np.float32), np.asarray(_STD, np.float32)
    shape = (1,) * (images.ndim - 1) + (3,)
    return (images.astype(np.float32) / 255.0 - mean.reshape(shape)) / std.reshape(shape)

"""Networks by name."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import numpy as np
from flax import linen as nn

from sculpt.arguments import did_you_mean, is_whole
from sculpt.nets import efficientnet, mlperf, mobilenet, mobilenet_v3, resnet, vgg, vit
from sculpt.nets.options import check_option

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5,) * 3, (0.5,) * 3)
_COLOURS = {
    "resnet8_mlperf": ((0.0,) * 3, (1 / 255,) * 3),
    "efficientnet_lite0": ((127 / 255,) * 3, (128 / 255,) * 3),
    "mobilenet_v1": _HALF,
    **dict.fromkeys((name for name in vit.MODELS if name.startswith("vit_")), _HALF),
}
"""Mean and deviation of the colours, 0 to 1, where they are not those of ImageNet."""
_FAMILIES = (resnet, mlperf, vgg, mobilenet, mobilenet_v3, efficientnet, vit)
_FAMILY_OF = {name: family.__name__.rpartition(".")[2] for family in _FAMILIES for name in family.MODELS}
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
        `width_multiplier=0.5` of a MobileNet, `depth=6` of a vision transformer, `dtype=jnp.bfloat16` of any (or float16, float32,
        float64: types or names, of the activations).

    Raises:
      ValueError: for an unknown name or option, an impossible value, or fewer than two classes.
    """
    module, fields, _ = _entry(name)
    if not is_whole(num_classes, 2):
        raise ValueError(f"num_classes must be a whole number of at least 2, got {num_classes!r}")
    known = [f.name for f in dataclasses.fields(module) if f.name not in ("num_classes", "parent", "name")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name} takes the options {', '.join(known)}, got {unknown}")
    chosen = {key: _hashable(value) for key, value in options.items()}
    kinds = get_type_hints(module)
    for key, value in chosen.items():
        check_option(name, key, kinds[key], value)
    return module(**{**fields, **chosen, "num_classes": num_classes})


def _hashable(value: Any) -> Any:
    """Lists as tuples, so that modules hash."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def family(name: str) -> str:
    """What a network is one of: "resnet", "vgg", "mobilenet", "mobilenet_v3", "efficientnet", "vit" (DeiT too) or "mlperf".

    Raises:
      ValueError: for an unknown name.
    """
    _entry(name)
    return _FAMILY_OF[name]


def image_size(name: str) -> int:
    """Side of the square images that a network was published for; most take other sizes too.

    Raises:
      ValueError: for an unknown name.
    """
    return _entry(name)[2]


def _entry(name: str) -> tuple[type[nn.Module], dict[str, Any], int]:
    if name not in _MODELS:
        raise ValueError(
            f"unknown model {name!r}, expected one of {', '.join(_MODELS)}{did_you_mean(name, _MODELS)}"
        )
    return _MODELS[name]


def colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each of three colours, of pixels divided by 255, that the pretrained weights of `name` expect.

    Raises:
      ValueError: for an unknown name.
    """
    _entry(name)
    return _COLOURS.get(name, _IMAGENET)


def preprocess(name: str, images: Any) -> Any:
    """uint8 images `[..., 3]` (0 to 255) as the float32 that the pretrained weights of `name` expect.

    By the mean and the deviation of ImageNet's colours, save for networks whose publishers scaled otherwise: to -1..1 (MobileNet-V1,
    timm's ViTs; torchvision's ViTs want ImageNet's), by 127 and 128 (EfficientNet-Lite), not at all (MLPerf's ResNet-8).

    NumPy arrays give NumPy arrays, JAX arrays JAX arrays; works inside `jax.jit`.

    Raises:
      ValueError: for an unknown name, another dtype or other than three channels.
    """
    mean, std = (np.asarray(values, np.float32) for values in colours(name))
    if images.dtype != np.uint8 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 images [..., 3], got {images.dtype}{list(images.shape)}")
    shape = (1,) * (images.ndim - 1) + (3,)
    return (images.astype(np.float32) / 255.0 - mean.reshape(shape)) / std.reshape(shape)

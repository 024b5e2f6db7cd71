"""Layer names of these networks in PyTorch's libraries.

A naming is a table from the path of one of our layers (`stage1_block02/conv1`) or single arrays (`class_token`) to the name that a
library gives it (`layer1.1.conv1`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn

from sculpt.nets.efficientnet import EfficientNetLite
from sculpt.nets.layouts import Layout, WeightSource
from sculpt.nets.mobilenet import MobileNetV1, MobileNetV2
from sculpt.nets.mobilenet_v3 import BlockRow, MobileNetV3
from sculpt.nets.resnet import CifarResNet, ResNet
from sculpt.nets.vgg import VGG
from sculpt.nets.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class NamedLayer:
    """A layer whose kernel does not lie there as it usually does; see `WeightSource`."""

    name: str
    layout: Layout
    part: int = 0
    parts: int = 1
    side: int = 1
    window: bool = False


Names = dict[str, str | NamedLayer]
_KINDS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def namings(module: nn.Module) -> tuple[str, ...]:
    """The namings that weights of this network are read and written in.

    Raises:
      ValueError: for a module that is not of this library.
    """
    return tuple(_namings(module))


def sources(
    module: nn.Module, naming: str, paths: Sequence[tuple[str, ...]], dims: Sequence[int]
) -> list[WeightSource]:
    """Where a file of that naming keeps each array.

    Args:
      module: the network.
      naming: one of `namings(module)`.
      paths: `(collection, *layer, kind)` of every array.
      dims: its number of axes.
    """
    names = _namings(module)[naming](module)
    return [_source(names, path, ndim) for path, ndim in zip(paths, dims, strict=True)]


def _source(names: Names, path: tuple[str, ...], ndim: int) -> WeightSource:
    whole, owner, kind = "/".join(path[1:]), "/".join(path[1:-1]), path[-1]
    if whole in names:
        return WeightSource(str(names[whole]), "same")
    layer = names[owner]
    if isinstance(layer, str):
        layer = NamedLayer(layer, "conv" if ndim == 4 else "dense")
    key = f"{layer.name}{'_' if layer.name.endswith('in_proj') else '.'}{_KINDS[kind]}"
    if kind == "kernel":
        return WeightSource(key, layer.layout, layer.part, layer.parts, layer.side, layer.window)
    return WeightSource(key, "vector", layer.part, layer.parts)


def _namings(module: nn.Module) -> dict[str, Callable[[Any], Names]]:
    """Naming -> what makes its table for a network."""
    match module:
        case CifarResNet():
            return {
                "cifar": lambda net: _resnet_torchvision(net, "linear"),
                "torchvision": _resnet_torchvision,
            }
        case ResNet():
            return {
                "torchvision": _resnet_torchvision,
                "timm": _resnet_torchvision,
                "huggingface": _resnet_hugging_face,
            }
        case VGG(hidden=()):
            return {"torchvision": _vgg_torchvision}
        case VGG():
            return {"torchvision": _vgg_torchvision, "timm": _vgg_timm}
        case MobileNetV1():
            return {"timm": _mobilenet_v1_timm}
        case EfficientNetLite():
            return {"timm": _mobilenet_v2_timm, "efficientnet_lite": _efficientnet_lite}
        case MobileNetV2():
            return {"torchvision": _mobilenet_v2_torchvision, "timm": _mobilenet_v2_timm}
        case MobileNetV3():
            return {"torchvision": _mobilenet_v3_torchvision, "timm": _mobilenet_v3_timm}
        case VisionTransformer(distilled=True):
            return {"timm": _vit_timm, "huggingface": lambda net: _vit_hugging_face(net, "deit")}
        case VisionTransformer():
            return {"timm": _vit_timm, "torchvision": _vit_torchvision, "huggingface": _vit_hugging_face}
    raise ValueError(
        f"expected a network of sculpt.nets that PyTorch's libraries have too, got {type(module).__name__}"
    )


def _resnet(net: Any, top: Names, block: Callable[[int, int], str], parts: dict[str, str]) -> Names:
    """`block` names a block by its stage and its place there, from 0; `parts` the layers in it."""
    names = dict(top)
    depths = net.depths if isinstance(net, ResNet) else (net.blocks,) * 3
    for stage, depth in enumerate(depths):
        for place in range(depth):
            for ours, theirs in parts.items():
                names[f"stage{stage + 1}_block{place + 1:02d}/{ours}"] = f"{block(stage, place)}.{theirs}"
    return names


def _resnet_torchvision(net: Any, head: str = "fc") -> Names:
    """timm's too; CIFAR ResNets call their head `linear`."""
    parts = {
        **{f"conv{index}": f"conv{index}" for index in (1, 2, 3)},
        **{f"norm{index}": f"bn{index}" for index in (1, 2, 3)},
        "shortcut_conv": "downsample.0",
        "shortcut_norm": "downsample.1",
    }
    top: Names = {"stem_conv": "conv1", "stem_norm": "bn1", "head": head}
    return _resnet(net, top, lambda stage, place: f"layer{stage + 1}.{place}", parts)


def _resnet_hugging_face(net: ResNet) -> Names:
    top: Names = {
        "stem_conv": "resnet.embedder.embedder.convolution",
        "stem_norm": "resnet.embedder.embedder.normalization",
        "head": "classifier.1",
    }
    parts = {
        **{f"conv{index}": f"layer.{index - 1}.convolution" for index in (1, 2, 3)},
        **{f"norm{index}": f"layer.{index - 1}.normalization" for index in (1, 2, 3)},
        "shortcut_conv": "shortcut.convolution",
        "shortcut_norm": "shortcut.normalization",
    }
    return _resnet(net, top, "resnet.encoder.stages.{}.layers.{}".format, parts)


def _vgg_features(net: VGG) -> Names:
    names: Names = {}
    index = 0
    for stage, depth in enumerate(net.depths):
        for layer in range(depth):
            ours = f"stage{stage + 1}_conv{layer + 1}"
            names[f"{ours}/conv"], names[f"{ours}/norm"] = f"features.{index}", f"features.{index + 1}"
            index += 3  # convolution, normalisation, ReLU
        index += 1  # pooling
    return names


def _vgg_torchvision(net: VGG) -> Names:
    """Of CIFAR forms, which have no dense layer before the head, the usual `classifier`."""
    names = _vgg_features(net)
    layers = [*(f"dense{i + 1}" for i in range(len(net.hidden))), "head"]
    for index, ours in enumerate(layers):
        theirs = f"classifier.{3 * index}" if net.hidden else "classifier"
        first = index == 0 and net.pool > 1
        names[ours] = NamedLayer(theirs, "flattened", side=net.pool) if first else theirs
    return names


def _vgg_timm(net: VGG) -> Names:
    return _vgg_features(net) | {
        "dense1": NamedLayer("pre_logits.fc1", "flattened", side=net.pool, window=True),
        "dense2": NamedLayer("pre_logits.fc2", "pointwise"),
        "head": "head.fc",
    }


def _mobilenet_v1_timm(net: MobileNetV1) -> Names:
    names: Names = {"stem/conv": "conv_stem", "stem/norm": "bn1", "head": "classifier"}
    stage, block = -1, 0
    for index, (_, stride) in enumerate(net.blocks):
        stage, block = (stage + 1, 0) if stride == 2 or index == 0 else (stage, block + 1)
        for part, conv, norm in (("depthwise", "conv_dw", "bn1"), ("pointwise", "conv_pw", "bn2")):
            ours, theirs = f"block{index + 1:02d}_{part}", f"blocks.{stage}.{block}"
            names[f"{ours}/conv"], names[f"{ours}/norm"] = f"{theirs}.{conv}", f"{theirs}.{norm}"
    return names


def _mobilenet_v2_torchvision(net: MobileNetV2) -> Names:
    names: Names = {"head": "classifier.1"}
    index = 0

    def add(ours: str, conv: str, norm: str) -> None:
        names[f"{ours}/conv"], names[f"{ours}/norm"] = conv, norm

    add("stem", "features.0.0", "features.0.1")
    for stage, (expansion, _, _, blocks, _) in enumerate(net.stages):
        for block in range(blocks):
            index += 1
            ours, theirs = f"stage{stage + 1}_block{block + 1}", f"features.{index}.conv"
            place = 0
            for part in ("expand", "depthwise") if expansion != 1 else ("depthwise",):
                add(f"{ours}/{part}", f"{theirs}.{place}.0", f"{theirs}.{place}.1")
                place += 1
            add(f"{ours}/project", f"{theirs}.{place}", f"{theirs}.{place + 1}")
    add("last", f"features.{index + 1}.0", f"features.{index + 1}.1")
    return names


def _inverted_timm(ours: str, theirs: str, expands: bool) -> Names:
    """timm's inverted residual, or its depthwise-separable block where nothing is expanded."""
    parts = (
        (("expand", "conv_pw", "bn1"), ("depthwise", "conv_dw", "bn2"), ("project", "conv_pwl", "bn3"))
        if expands
        else (("depthwise", "conv_dw", "bn1"), ("project", "conv_pw", "bn2"))
    )
    names: Names = {}
    for part, conv, norm in parts:
        names[f"{ours}/{part}/conv"], names[f"{ours}/{part}/norm"] = f"{theirs}.{conv}", f"{theirs}.{norm}"
    names[f"{ours}/squeeze"] = NamedLayer(f"{theirs}.se.conv_reduce", "pointwise")
    names[f"{ours}/excite"] = NamedLayer(f"{theirs}.se.conv_expand", "pointwise")
    return names


def _mobilenet_v2_timm(net: MobileNetV2) -> Names:
    names: Names = {
        "stem/conv": "conv_stem",
        "stem/norm": "bn1",
        "last/conv": "conv_head",
        "last/norm": "bn2",
    }
    for stage, (expansion, _, _, blocks, _) in enumerate(net.stages):
        for block in range(blocks):
            ours = f"stage{stage + 1}_block{block + 1}"
            names |= _inverted_timm(ours, f"blocks.{stage}.{block}", expansion != 1)
    return names | {"head": "classifier"}


def _efficientnet_lite(net: MobileNetV2) -> Names:
    """The package efficientnet_lite_pytorch."""
    names: Names = {
        "stem/conv": "_conv_stem",
        "stem/norm": "_bn0",
        "last/conv": "_conv_head",
        "last/norm": "_bn1",
    }
    index = 0
    for stage, (_, _, _, blocks, _) in enumerate(net.stages):
        for block in range(blocks):
            ours, theirs = f"stage{stage + 1}_block{block + 1}", f"_blocks.{index}"
            for place, part in enumerate(("expand", "depthwise", "project")):
                names[f"{ours}/{part}/conv"] = f"{theirs}._{part}_conv"
                names[f"{ours}/{part}/norm"] = f"{theirs}._bn{place}"
            index += 1
    return names | {"head": "_fc"}


def _mobilenet_v3_torchvision(net: MobileNetV3) -> Names:
    last = len(net.rows) + 1
    names: Names = {
        "stem/conv": "features.0.0",
        "stem/norm": "features.0.1",
        "last/conv": f"features.{last}.0",
        "last/norm": f"features.{last}.1",
        "dense": "classifier.0",
        "head": "classifier.3",
    }
    for index, (row, expands) in enumerate(_expanding(net.rows)):
        ours, theirs, place = f"block{index + 1:02d}", f"features.{index + 1}.block", 0
        parts = ["expand"] * expands + ["depthwise"] + ["squeeze"] * row.squeeze + ["project"]
        for place, part in enumerate(parts):
            if part == "squeeze":
                names[f"{ours}/squeeze"] = NamedLayer(f"{theirs}.{place}.fc1", "pointwise")
                names[f"{ours}/excite"] = NamedLayer(f"{theirs}.{place}.fc2", "pointwise")
            else:
                names[f"{ours}/{part}/conv"] = f"{theirs}.{place}.0"
                names[f"{ours}/{part}/norm"] = f"{theirs}.{place}.1"
    return names


def _mobilenet_v3_timm(net: MobileNetV3) -> Names:
    """A stage of timm's ends where resolution or channels change."""
    names: Names = {"stem/conv": "conv_stem", "stem/norm": "bn1", "head": "classifier"}
    stage, block, width = -1, 0, 0
    for index, (row, expands) in enumerate(_expanding(net.rows)):
        stage, block = (stage + 1, 0) if row.stride == 2 or row.width != width else (stage, block + 1)
        width = row.width
        names |= _inverted_timm(f"block{index + 1:02d}", f"blocks.{stage}.{block}", expands)
    return names | {
        "last/conv": f"blocks.{stage + 1}.0.conv",
        "last/norm": f"blocks.{stage + 1}.0.bn1",
        "dense": NamedLayer("conv_head", "pointwise"),
    }


def _expanding(rows: Sequence[BlockRow]) -> list[tuple[BlockRow, bool]]:
    """Rows, and whether each widens what it is given, which is 16 channels at first."""
    given = [16, *(row.width for row in rows)]
    return [(row, row.hidden != width) for row, width in zip(rows, given)]


def _vit(
    net: VisionTransformer,
    top: dict[str, str],
    block: Callable[[int], str],
    parts: dict[str, str],
    separate: tuple[str, str, str] | None = None,
) -> Names:
    """`parts` names the layers of a block; `separate` the query, key and value where they are not one layer, `qkv`."""
    names: Names = dict(top)
    for index in range(net.depth):
        ours, theirs = f"block{index + 1:02d}", block(index)
        for name, inner in parts.items():
            if name != "qkv":
                names[f"{ours}/{name}"] = f"{theirs}.{inner}"
        for place, name in enumerate(("query", "key", "value")):
            names[f"{ours}/attention/{name}"] = (
                NamedLayer(f"{theirs}.{parts['qkv']}", "heads", place, 3)
                if separate is None
                else NamedLayer(f"{theirs}.{separate[place]}", "heads")
            )
    return names


def _vit_timm(net: VisionTransformer) -> Names:
    top = {
        "patches": "patch_embed.proj",
        "class_token": "cls_token",
        "distillation_token": "dist_token",
        "position": "pos_embed",
        "norm": "norm",
        "head": "head",
        "distillation_head": "head_dist",
    }
    parts = {
        "norm1": "norm1",
        "norm2": "norm2",
        "qkv": "attn.qkv",
        "attention/out": "attn.proj",
        "dense1": "mlp.fc1",
        "dense2": "mlp.fc2",
    }
    return _vit(net, top, "blocks.{}".format, parts)


def _vit_torchvision(net: VisionTransformer) -> Names:
    top = {
        "patches": "conv_proj",
        "class_token": "class_token",
        "position": "encoder.pos_embedding",
        "norm": "encoder.ln",
        "head": "heads.head",
    }
    parts = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "qkv": "self_attention.in_proj",
        "attention/out": "self_attention.out_proj",
        "dense1": "mlp.0",
        "dense2": "mlp.3",
    }
    return _vit(net, top, "encoder.layers.encoder_layer_{}".format, parts)


def _vit_hugging_face(net: VisionTransformer, root: str = "vit") -> Names:
    head = "cls_classifier" if net.distilled else "classifier"
    top = {
        "patches": f"{root}.embeddings.patch_embeddings.projection",
        "class_token": f"{root}.embeddings.cls_token",
        "distillation_token": f"{root}.embeddings.distillation_token",
        "position": f"{root}.embeddings.position_embeddings",
        "norm": f"{root}.layernorm",
        "head": head,
        "distillation_head": "distillation_classifier",
    }
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attention/out": "attention.output.dense",
        "dense1": "intermediate.dense",
        "dense2": "output.dense",
    }
    attention = "attention.attention."
    separate = (f"{attention}query", f"{attention}key", f"{attention}value")
    return _vit(net, top, (root + ".encoder.layer.{}").format, parts, separate)

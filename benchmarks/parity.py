"""Do the networks compute what their PyTorch twins compute? Needs the extra `parity` (PyTorch for CPUs and timm).

    python -m benchmarks.parity [--data FOLDER]

Each twin is drawn at random (normalisation statistics as well), its weights are written as safetensors, read by
`sculpt.nets.load`, and both score the same random images; with `--data` the given pretrained weights on real images too. The
weights are then written back by `sculpt.nets.save` and must be the twin's, bit by bit.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.timing import provenance, write_results
from sculpt import nets

CLASSES = 7
CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


@dataclasses.dataclass(frozen=True)
class Twin:
    """A network and the one of another library that it should equal."""

    name: str
    """Ours."""
    naming: str
    """Whose names its weights have."""
    make: Callable[[], Any]
    """Makes the `torch.nn.Module`."""
    side: int = 64
    """Of the images that both are given."""
    options: tuple[tuple[str, Any], ...] = ()
    """Of `sculpt.nets.create`."""


@functools.cache
def _declare_operators() -> Any:
    """torchvision's packages are built for CUDA: beside a PyTorch for CPUs they lack their operators, which no network here
    needs, but which they want to be declared."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _timm(name: str, classes: int = CLASSES, **options: Any) -> Any:
    _declare_operators()
    import timm

    return timm.create_model(name, num_classes=classes, **options)


def _torchvision(name: str, **options: Any) -> Any:
    _declare_operators()
    from torchvision import models

    return getattr(models, name)(num_classes=CLASSES, **options)


def _hugging_face(kind: str, **options: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **options)
    suffix = "ForImageClassificationWithTeacher" if kind == "DeiT" else "ForImageClassification"
    return getattr(transformers, kind + suffix)(config)


def _cifar_resnet(name: str) -> Any:
    """ResNets of He et al., section 4.2, with option A shortcuts and the names of their usual PyTorch form."""
    import torch
    from torch import nn

    def conv(inputs: int, outputs: int, stride: int) -> Any:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.stride = 1 if inputs == outputs else 2
            self.conv1, self.bn1 = conv(inputs, outputs, self.stride), nn.BatchNorm2d(outputs)
            self.conv2, self.bn2 = conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)
            self.missing = outputs - inputs

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            x = x[:, :, :: self.stride, :: self.stride]
            half = self.missing // 2
            return torch.relu(y + nn.functional.pad(x, (0, 0, 0, 0, half, self.missing - half)))

    class Net(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(3, 16, 1), nn.BatchNorm2d(16)
            for stage, width in enumerate((16, 32, 64), start=1):
                first = width if stage == 1 else width // 2
                layers = [Block(first if block == 0 else width, width) for block in range(blocks)]
                setattr(self, f"layer{stage}", nn.Sequential(*layers))
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.linear(x.mean((2, 3)))

    return Net(nets.create(name, 10).blocks)  # type: ignore[attr-defined]


def _cifar_vgg(name: str) -> Any:
    """The features of timm's VGG, a mean and one dense layer."""
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = _timm(name).features, nn.Linear(512, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.classifier(self.features(x).mean((2, 3)))

    return Net()


def twins() -> Iterator[Twin]:
    """Every network, by every library that has it."""
    part = functools.partial
    for name in CIFAR:
        yield Twin(name, "cifar", part(_cifar_resnet, name), 32)
    for depth in (18, 34, 50, 101):
        yield Twin(f"resnet{depth}", "timm", part(_timm, f"resnet{depth}"))
        yield Twin(f"resnet{depth}", "torchvision", part(_torchvision, f"resnet{depth}"))
    for depth, bottleneck in ((18, False), (50, True)):
        options: dict[str, Any] = {
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [64, 128, 256, 512],
            "layer_type": "basic",
        }
        yield Twin(
            f"resnet{depth}", "huggingface", part(_hugging_face, "ResNet", **({} if bottleneck else options))
        )
    for depth in (16, 19):
        yield Twin(f"vgg{depth}_bn", "timm", part(_timm, f"vgg{depth}_bn"), 224)
        yield Twin(f"vgg{depth}_bn", "torchvision", part(_torchvision, f"vgg{depth}_bn"), 224)
        yield Twin(f"vgg{depth}_bn_cifar", "torchvision", part(_cifar_vgg, f"vgg{depth}_bn"), 32)
    same = (("same", False), ("epsilon", 1e-5))
    yield Twin("mobilenet_v1", "timm", part(_timm, "mobilenetv1_100"), options=same)
    yield Twin("mobilenet_v2", "timm", part(_timm, "mobilenetv2_100"))
    yield Twin("mobilenet_v2", "torchvision", part(_torchvision, "mobilenet_v2"))
    for size in ("small", "large"):
        yield Twin(
            f"mobilenet_v3_{size}",
            "timm",
            part(_timm, f"mobilenetv3_{size}_100"),
            options=(("epsilon", 1e-5),),
        )
        yield Twin(f"mobilenet_v3_{size}", "torchvision", part(_torchvision, f"mobilenet_v3_{size}"))
    yield Twin("efficientnet_lite0", "timm", part(_timm, "tf_efficientnet_lite0"))
    for size in ("tiny", "small", "base"):
        yield Twin(f"vit_{size}_patch16", "timm", part(_timm, f"vit_{size}_patch16_224"), 224)
        yield Twin(f"deit_{size}_patch16", "timm", part(_timm, f"deit_{size}_patch16_224"), 224)
        distilled = f"deit_{size}_distilled_patch16"
        yield Twin(distilled, "timm", part(_timm, f"{distilled}_224"), 224)
    for size, (width, heads) in {"tiny": (192, 3), "small": (384, 6)}.items():
        for patch, side in ((4, 32), (2, 8)):
            shape = {"img_size": side, "patch_size": patch, "embed_dim": width, "num_heads": heads}
            yield Twin(f"vit_{size}_patch{patch}", "timm", part(_timm, "vit_tiny_patch16_224", **shape), side)
    yield Twin("vit_base_patch16", "torchvision", part(_torchvision, "vit_b_16"), 224)
    tiny = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    yield Twin("vit_tiny_patch16", "huggingface", part(_hugging_face, "ViT", **tiny), 224)
    yield Twin("deit_tiny_distilled_patch16", "huggingface", part(_hugging_face, "DeiT", **tiny), 224)


def drawn(twin: Twin) -> Any:
    """The twin in evaluation mode, with statistics and scales away from zero and one."""
    import torch

    torch.manual_seed(zlib.crc32(f"{twin.name} {twin.naming}".encode()))
    module = twin.make().eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                layer.weight.uniform_(0.7, 1.3)
                layer.bias.normal_(0, 0.1)
        for name, parameter in module.named_parameters():
            if "token" in name or "pos" in name or not parameter.any():
                parameter.normal_(0, 0.2)
    return module


def logits_of(module: Any, images: np.ndarray) -> np.ndarray:
    """The twin's logits float32 `[n, classes]` of images `[n, side, side, 3]`."""
    import torch

    with torch.no_grad():
        found = module(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    return np.asarray(getattr(found, "logits", found))


def published(module: Any, folder: Path) -> dict[str, np.ndarray]:
    """The twin's arrays by the names that its library publishes them under."""
    from safetensors.numpy import load_file

    if hasattr(module, "save_pretrained"):  # in memory Hugging Face has names of its own
        module.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    else:
        state = {key: np.ascontiguousarray(value.numpy()) for key, value in module.state_dict().items()}
    return {
        key: value
        for key, value in state.items()
        if not key.endswith(("num_batches_tracked", "position_ids"))
    }


def difference(twin: Twin, module: Any, images: np.ndarray, classes: int) -> tuple[float, float]:
    """(largest difference of logits, largest logit); the weights go over and back through files."""
    from safetensors.numpy import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        file, back = Path(folder, "twin.safetensors"), Path(folder, "back.safetensors")
        state = published(module, Path(folder))
        save_file(state, file)
        side = twin.side if nets.family(twin.name) == "vit" else None
        ours, variables = nets.load(twin.name, file, classes, side=side, **dict(twin.options))
        nets.save(ours, variables, back, twin.naming)
        written = load_file(back)
    if set(written) != set(state) or any(not np.array_equal(written[key], state[key]) for key in state):
        raise ValueError(f"{twin.name}, {twin.naming}: what is written back is not what was read")
    expected = logits_of(module, images)
    found = np.asarray(jax.jit(ours.apply)(variables, images))
    return float(np.abs(found - expected).max()), float(np.abs(expected).max())


def random_difference(twin: Twin) -> tuple[float, float]:
    """`difference` of a drawn twin on two random images."""
    images = np.random.default_rng(0).standard_normal((2, twin.side, twin.side, 3)).astype(np.float32)
    classes = 10 if twin.naming == "cifar" else CLASSES
    return difference(twin, drawn(twin), images, classes)


def pretrained_twins(data: Path) -> Iterator[tuple[Twin, Path, Any, np.ndarray]]:
    """Networks with given weights, their files, twins with the same weights, and real images."""
    import torch
    from safetensors.numpy import load_file

    with np.load(data / "cifar10" / "test_lossless_first1000.npz", allow_pickle=False) as file:
        images = file["images"][:8]
    for name in CIFAR[:4]:
        weights = data / "weights" / f"cifar10_{name}.safetensors"
        module = _cifar_resnet(name).eval()
        module.load_state_dict({key: torch.from_numpy(value) for key, value in load_file(weights).items()})
        yield Twin(name, "cifar", lambda: None, 32), weights, module, nets.preprocess(name, images)
    name, weights = "efficientnet_lite0", data / "weights" / "imagenet_efficientnet_lite0.safetensors"
    ours, variables = nets.load(name, weights, 1000)
    with tempfile.TemporaryDirectory() as folder:
        nets.save(ours, variables, Path(folder, "timm.safetensors"), "timm")
        state = load_file(Path(folder, "timm.safetensors"))
    module = _timm("tf_efficientnet_lite0", classes=1000).eval()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    from sculpt.data.parquet import read_parquet

    pictures, _ = read_parquet(data / "imagenet" / "sample1000_224.parquet", None)
    yield (
        Twin(name, "efficientnet_lite", lambda: None, 224),
        weights,
        module,
        nets.preprocess(name, pictures[::250]),
    )


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with cifar10/, imagenet/ and weights/")
    parser.add_argument("--golden", type=Path, help="file to keep the twins' logits for the given weights in")
    parser.add_argument("--nets", nargs="*", help="only these")
    options = parser.parse_args()
    rows = []
    for twin in twins():
        if options.nets and twin.name not in options.nets:
            continue
        apart, largest = random_difference(twin)
        print(twin.name, twin.naming, f"{apart:.1e}", f"{largest:.2g}", flush=True)
        rows.append(f"| {twin.name} | {twin.naming} | drawn | {twin.side} | {apart:.1e} | {largest:.3g} |")
    if options.data:
        golden = {}
        for twin, weights, module, images in pretrained_twins(options.data):
            golden[twin.name] = logits_of(module, images)
            _, variables = nets.load(twin.name, weights, golden[twin.name].shape[1])
            ours = nets.create(twin.name, golden[twin.name].shape[1])
            found = np.asarray(jax.jit(ours.apply)(variables, images))
            apart, largest = np.abs(found - golden[twin.name]).max(), np.abs(found).max()
            print(weights.name, f"{apart:.1e}", f"{largest:.2g}", flush=True)
            rows.append(
                f"| {twin.name} | {twin.naming} | given | {twin.side} | {apart:.1e} | {largest:.3g} |"
            )
        if options.golden:
            np.savez_compressed(options.golden, **golden)
    head = [
        "| network | names of | weights | side | largest difference of logits | largest logit |",
        "| --- " * 6 + "|",
    ]
    if not options.nets:
        import timm
        import torch

        rivals = f"Beside PyTorch {torch.__version__}, timm {timm.__version__}; float32."
        write_results("parity", ["# Parity with PyTorch", "", *provenance(), rivals, "", *head, *rows])


if __name__ == "__main__":
    main()

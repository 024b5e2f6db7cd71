"""Networks to prune, by name, and their pretrained weights. Stands by itself: imports nothing of the rest."""

from sculpt.nets.efficientnet import EfficientNetLite
from sculpt.nets.mlperf import MlperfResNet
from sculpt.nets.mobilenet import MobileNetV1, MobileNetV2
from sculpt.nets.mobilenet_v3 import MobileNetV3
from sculpt.nets.naming import namings
from sculpt.nets.pretrained import download, load, save
from sculpt.nets.registry import colours, create, family, image_size, list_models, preprocess
from sculpt.nets.resnet import CifarResNet, ResNet
from sculpt.nets.vgg import VGG
from sculpt.nets.vit import VisionTransformer

__all__ = [
    "VGG",
    "CifarResNet",
    "EfficientNetLite",
    "MlperfResNet",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "ResNet",
    "VisionTransformer",
    "colours",
    "create",
    "download",
    "family",
    "image_size",
    "list_models",
    "load",
    "namings",
    "preprocess",
    "save",
]

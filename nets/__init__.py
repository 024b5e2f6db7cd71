"""Networks to prune, by name, and their pretrained weights. Stands by itself: imports nothing of the rest."""

from sculpt.nets.efficientnet import EfficientNetLite
from sculpt.nets.mobilenet import MobileNetV1, MobileNetV2
from sculpt.nets.mobilenet_v3 import MobileNetV3
from sculpt.nets.pretrained import load
from sculpt.nets.registry import create, image_size, list_models, preprocess
from sculpt.nets.resnet import CifarResNet, ResNet
from sculpt.nets.vgg import VGG
from sculpt.nets.vit import VisionTransformer

__all__ = [
    "VGG",
    "CifarResNet",
    "EfficientNetLite",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "ResNet",
    "VisionTransformer",
    "create",
    "image_size",
    "list_models",
    "load",
    "preprocess",
]

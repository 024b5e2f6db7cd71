"""Networks to prune, by name, and their pretrained weights. Stands by itself: imports nothing of the rest."""

from sculpt.nets.pretrained import load
from sculpt.nets.registry import create, list_models, preprocess
from sculpt.nets.resnet import CifarResNet

__all__ = ["CifarResNet", "create", "list_models", "load", "preprocess"]

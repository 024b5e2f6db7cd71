"""EfficientNet-Lite (TensorFlow's `efficientnet/lite`, after Tan and Le, arXiv 1905.11946): no excitation, ReLU6 throughout."""

from __future__ import annotations

from sculpt.nets.mobilenet import MobileNetV2


class EfficientNetLite(MobileNetV2):
    """Lite0: the structure of MobileNet-V2 with EfficientNet-B0's stages."""

    stages: tuple[tuple[int, int, int, int, int], ...] = (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    )  # fmt: skip
    same: bool = True
    momentum: float = 0.99
    epsilon: float = 1e-3


MODELS = {"efficientnet_lite0": (EfficientNetLite, {}, 224)}
"""Name -> module, its fields, side of the images that it was published for."""

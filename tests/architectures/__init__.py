"""The zoo: a small network of every kind that Sculpt must trace and compact exactly."""

from __future__ import annotations

from tests.architectures import (
    convolutional,
    dense_prediction,
    functions,
    high_level,
    language,
    mobile,
    normalised,
    odd,
    recurrent,
    vision_transformer,
)
from tests.architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    **convolutional.ARCHITECTURES,
    **mobile.ARCHITECTURES,
    **normalised.ARCHITECTURES,
    **dense_prediction.ARCHITECTURES,
    **vision_transformer.ARCHITECTURES,
    **language.ARCHITECTURES,
    **recurrent.ARCHITECTURES,
    **functions.ARCHITECTURES,
    **high_level.ARCHITECTURES,
    **odd.ARCHITECTURES,
}
"""Name -> network, in order of what they are built of."""

__all__ = ["ARCHITECTURES", "Architecture"]

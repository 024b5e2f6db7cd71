"""How candidates are laid out on the device."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """Sizes of the pieces that one compiled evaluation works on.

    The defaults are the measured best on CPU: `vmap` over convolution kernels becomes a grouped convolution, 8 to 10
    times slower there, while small batches of images stay in the cache.
    """

    policies_per_chunk: int = 1
    """Policies evaluated side by side (vmap); 1 never goes through vmap. Accelerators want more."""
    images_per_batch: int = 64
    """Images in one forward pass."""

    def __post_init__(self) -> None:
        for name in ("policies_per_chunk", "images_per_batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

"""The evaluation plan: how policies and images are laid out on the devices."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sculpt.arguments import checked_fields
from sculpt.ir.lowering import Convolution, Precision

POLICY_AXIS, IMAGE_AXIS = "policy", "data"
"""Axes of the mesh: policies and images are spread over them."""


@checked_fields
@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """Sizes of the pieces that one compiled evaluation works on, and how it computes them.

    The defaults are the measured best on one CPU device: `vmap` over convolution kernels becomes a grouped convolution, 8 to
    10 times slower there, while small batches of images stay in the cache. `tune_plan` measures what is best elsewhere.
    Every plan gives the same scores up to rounding, save for `precision="bfloat16"`.

    Raises:
      ValueError: on sizes below 1 or an unknown choice.
    """

    policies_per_chunk: int = 1
    """Policies evaluated side by side on a device (vmap); 1 never goes through vmap. Accelerators want more."""
    images_per_batch: int = 64
    """Images in one forward pass on a device."""
    convolution: Convolution = "lax"
    """What a convolution is made of: XLA's own, or patches and one matrix product (which vmap turns into a batched one)."""
    precision: Precision = "float32"
    """Of the operands of convolutions and matrix products. "bfloat16" changes the scores a little."""
    policy_shards: int = 1
    """Groups of devices that share the policies among them."""
    image_shards: int = 1
    """Devices in each group, which share the images of a policy among them."""

    def __post_init__(self) -> None:
        for name in ("policies_per_chunk", "images_per_batch", "policy_shards", "image_shards"):
            value = getattr(self, name)
            if isinstance(value, np.integer):
                value = int(value)
                object.__setattr__(self, name, value)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, choices in (("convolution", Convolution), ("precision", Precision)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")

    @property
    def devices(self) -> int:
        """Devices that the plan uses."""
        return self.policy_shards * self.image_shards

    def mesh(self) -> Mesh:
        """The mesh `[policy, data]` over the first devices of all hosts.

        Raises:
          ValueError: where there are fewer devices.
        """
        available = jax.devices()
        if self.devices > len(available):
            raise ValueError(
                f"the plan uses {self.policy_shards} x {self.image_shards} devices, there are {len(available)}: "
                "lower policy_shards or image_shards, or start with more devices "
                "(on CPU: JAX_NUM_CPU_DEVICES=8 makes 8)"
            )
        grid = np.asarray(available[: self.devices]).reshape(self.policy_shards, self.image_shards)
        return Mesh(grid, (POLICY_AXIS, IMAGE_AXIS), axis_types=(AxisType.Auto, AxisType.Auto))

    def place(self, tree: Any) -> Any:
        """Arrays copied to every device of the plan; as they are where it has only one."""
        if self.devices == 1:
            return tree
        sharding = NamedSharding(self.mesh(), P())
        return jax.tree.map(lambda leaf: jax.device_put(_portable(leaf), sharding), tree)

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.policies_per_chunk} policies x {self.images_per_batch} images at a time, {self.convolution} "
            f"convolutions in {self.precision}, {self.policy_shards} x {self.image_shards} devices (policies x images)"
        )


def _portable(leaf: Any) -> Any:
    """An array that can go to devices of other hosts: what lies on this host's devices goes through its memory."""
    if jax.process_count() == 1 or not isinstance(leaf, jax.Array):
        return leaf
    return np.asarray(leaf) if leaf.is_fully_addressable else leaf

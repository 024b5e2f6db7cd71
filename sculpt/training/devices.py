"""Training over several devices: every one holds the weights and a part of each batch.

The step is one program over the whole batch, whose images lie on a mesh axis; XLA divides it (GSPMD, arXiv 2105.04663) and sums
gradients and batch statistics over the devices. So any number of devices computes what one does, up to rounding:
BatchNorm sees the whole batch, and augmentation, dropout and mixup draw the same numbers.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sculpt.scoring.plan import IMAGE_AXIS
from sculpt.training.config import FinetuneConfig


def check_devices(devices: int, config: FinetuneConfig) -> None:
    """Raises ValueError unless there are so many devices here and they divide a batch, or each of the parts it is computed in."""
    there = jax.local_device_count()
    if not isinstance(devices, int) or isinstance(devices, bool) or not 1 <= devices <= there:
        raise ValueError(
            f"devices must be a whole number from 1 to {there}, the devices that JAX finds here, got {devices!r} "
            "(on CPU: JAX_NUM_CPU_DEVICES=8 makes 8)"
        )
    part = config.batch_size // config.accumulate
    if part % devices:
        parts = "" if config.accumulate == 1 else f", computed in parts of {part},"
        raise ValueError(
            f"{devices} devices cannot share a batch of {config.batch_size} images{parts} evenly: "
            "take another number of devices, or change batch_size"
        )


def place(tree: Any, devices: int) -> Any:
    """Arrays copied to each of the devices; as they are where there is only one."""
    return tree if devices == 1 else jax.device_put(tree, NamedSharding(_mesh(devices), P()))


def place_shared(tree: Any, devices: int) -> Any:
    """Arrays `[batches, images, ...]` whose images are spread over the devices, which divide them."""
    return tree if devices == 1 else jax.device_put(tree, NamedSharding(_mesh(devices), P(None, IMAGE_AXIS)))


def place_batch(tree: Any, devices: int) -> Any:
    """Arrays `[images, ...]` of the host, sent to the device or spread over the devices, which divide them."""
    return jax.device_put(tree, None if devices == 1 else NamedSharding(_mesh(devices), P(IMAGE_AXIS)))


def from_each(tree: Any, devices: int) -> Any:
    """Arrays that are on each of the devices, on the first alone."""
    return tree if devices == 1 else jax.tree.map(lambda x: x.addressable_data(0), tree)


def on_each(tree: Any, devices: int) -> Any:
    """Inside `jax.jit`: the arrays are to be on each of the devices."""
    if devices == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(_mesh(devices), P()))


def shared(tree: Any, devices: int) -> Any:
    """Inside `jax.jit`: the arrays `[images, ...]` are to be spread over the devices; scalars stay on each."""
    if devices == 1:
        return tree
    mesh = _mesh(devices)
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(IMAGE_AXIS) if x.ndim else P())),
        tree,
    )


def _mesh(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), (IMAGE_AXIS,), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:devices]
    )

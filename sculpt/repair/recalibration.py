"""BatchNorm recalibration: recomputes the statistics of a pruned network in one pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.arguments import checked, is_whole
from sculpt.inputs import check_finite, check_finite_images, check_images, number_of, rows
from sculpt.ir.lowering import lowered
from sculpt.ir.program import flatten
from sculpt.model import Model, State, TrainFn

_IMAGES_PER_BATCH = 64


def batch_statistics(
    apply_train: TrainFn, params: Any, state: State, images: Any, axis: str | None = None
) -> State:
    """The state that training on `images` for ever would lead to.

    Running statistics move as `new = m * old + (1 - m) * batch` with a momentum m that only the network knows. This is
    affine in the old state, so one forward pass with a tangent on the state alone gives both: at `old = 0` the value is
    `(1 - m) * batch` and the derivative is m. Leaves of the state that are not floating-point, or that training
    hands on unchanged (frozen statistics, constants), stay as they are and are read as they are.

    Args:
      images: `[batches, batch, ...]`, normalised, or a pytree of such arrays. Statistics are averaged over the batches.
      axis: name of the mapped axis over whose devices the batches are spread, as many on each; None: all are here.
    """
    leaves, treedef = jax.tree.flatten(state)
    unchanged = _unchanged(apply_train, params, state, rows(images, 0))
    floating = [
        jnp.issubdtype(leaf.dtype, jnp.floating) and not same for leaf, same in zip(leaves, unchanged)
    ]
    if not any(floating):
        return state
    own = [leaf for leaf, moves in zip(leaves, floating) if moves]
    zeros = [jnp.zeros_like(leaf) for leaf in own]
    # Networks with statistics in half precision may return them in float32.
    sums = [jnp.zeros(leaf.shape, _wide(leaf.dtype)) for leaf in own]

    def new_leaves(old: list[jax.Array], x: Any) -> list[jax.Array]:
        values = iter(old)
        merged = [next(values) if moves else leaf for leaf, moves in zip(leaves, floating)]
        _, new_state = apply_train(params, jax.tree.unflatten(treedef, merged), x, jax.random.key(0))
        moved = [leaf for leaf, moves in zip(jax.tree.leaves(new_state), floating) if moves]
        return [leaf.astype(total.dtype) for leaf, total in zip(moved, sums, strict=True)]

    def one_batch(total: list[jax.Array], x: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        value, momentum = jax.jvp(
            functools.partial(new_leaves, x=x), (zeros,), ([jnp.ones_like(z) for z in zeros],)
        )
        return [t + v for t, v in zip(total, value)], momentum

    totals, momenta = jax.lax.scan(one_batch, sums, images)
    count = number_of(images)
    if axis is not None:
        totals, count = jax.lax.psum(totals, axis), count * jax.lax.axis_size(axis)
    statistics = []
    for total, momentum, old in zip(totals, momenta, own):
        moved = 1.0 - momentum[0]
        mean = total / count / jnp.where(moved > 1e-6, moved, 1.0)
        statistics.append(jnp.where(moved > 1e-6, mean.astype(old.dtype), old))
    values = iter(statistics)
    return jax.tree.unflatten(treedef, [next(values) if m else v for v, m in zip(leaves, floating)])


def _wide(dtype: Any) -> Any:
    """float32, or what has more bits."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.float32


def _unchanged(apply_train: TrainFn, params: Any, state: State, x: Any) -> list[bool]:
    """Which leaves of the state training returns as they came."""
    program = flatten(lambda s, p, x, k: apply_train(p, s, x, k)[1], state, params, x, jax.random.key(0))
    inputs = program.inputs[: len(jax.tree.leaves(state))]
    return [given == returned for given, returned in zip(inputs, program.outputs, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _recalibrated(apply_train: TrainFn, params: Any, state: State, images: Any) -> State:
    return batch_statistics(lowered(apply_train), params, state, images)


@checked
def recalibrate(model: Model, images: Any, images_per_batch: int = _IMAGES_PER_BATCH) -> Model:
    """A copy of `model` with BatchNorm statistics of these images instead of its running ones.

    Args:
      images: `[n, ...]`, normalised as the model expects, or a pytree of arrays where the network takes one; what does not fill a batch is
        left out.

    Raises:
      ValueError: if there is no image, the images are pixels that nobody normalised, parameters or images are not finite, or `images_per_batch` is not a whole number of at
        least 1.
    """
    if not is_whole(images_per_batch, 1):
        raise ValueError(f"images_per_batch must be a whole number of at least 1, got {images_per_batch!r}")
    # Statistics that are not finite are what this mends.
    check_finite(model.replace(state={}))
    images = check_images(model, images)
    check_finite_images(images)
    batches = into_batches(images, images_per_batch)
    return model.replace(state=_recalibrated(model.apply_train, model.params, model.state, batches))


def has_statistics(model: Model) -> bool:
    """Whether a model has state that recalibration could be about: floating-point numbers, not counters or keys of dropout."""
    return any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(model.state))


def into_batches(images: Any, images_per_batch: int = _IMAGES_PER_BATCH) -> Any:
    """Whole batches `[batches, batch, ...]` of images `[n, ...]`, or of a pytree; one smaller batch if n is below the batch size."""
    n = number_of(images)
    if n < 1:
        raise ValueError("expected at least one calibration image, got none")
    size = min(images_per_batch, n)
    count = images_used(n, images_per_batch) // size
    return jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), images)


def images_used(n: int, images_per_batch: int = _IMAGES_PER_BATCH) -> int:
    """How many of `n` images `into_batches` takes: whole batches, or all where there are fewer than one batch."""
    return n if n < images_per_batch else n - n % images_per_batch


def check_calibration_images(n: int) -> None:
    """Raises ValueError unless recalibration uses `n` images to the last one."""
    if (used := images_used(n)) != n:
        raise ValueError(
            f"calibration_images must be below {_IMAGES_PER_BATCH} or a multiple of it, for batches are whole; got {n}: "
            f"take {used} or {used + _IMAGES_PER_BATCH}"
        )

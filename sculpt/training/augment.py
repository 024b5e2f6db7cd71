"""Augmentation on the device, under jit, of raw images: padding is black, as in the usual recipes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]
"""`(key, images [n, height, width, channels]) -> images`, of the same shape and dtype."""

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


def shift(key: jax.Array, images: jax.Array, distance: int) -> jax.Array:
    """Pads by `distance` zeros on each side and crops each image at a random place."""
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (distance, distance), (distance, distance), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * distance + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors half of the images."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1, :], images)


def crop_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """The CIFAR recipe: pad 4, random crop, mirror half of the images."""
    crop_key, flip_key = jax.random.split(key)
    return flip(flip_key, shift(crop_key, images, 4))


def resized_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """The ImageNet recipe (Szegedy et al., arXiv 1409.4842): a random part of 8 to 100 % of the area and of ratio 3/4 to 4/3,
    brought back to full size (bilinear, smoothed where it shrinks), and half of them mirrored."""
    n, height, width, channels = images.shape
    area_key, ratio_key, place_key, flip_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (n,), minval=_AREA[0], maxval=_AREA[1])
    low, high = jnp.log(jnp.float32(_RATIO[0])), jnp.log(jnp.float32(_RATIO[1]))
    stretch = jnp.exp(0.5 * jax.random.uniform(ratio_key, (n,), minval=low, maxval=high))
    side = jnp.sqrt(area)
    part = jnp.minimum(jnp.stack([side / stretch, side * stretch], axis=1), 1.0)
    corner = jax.random.uniform(place_key, (n, 2)) * (1.0 - part)
    size = jnp.asarray([height, width], jnp.float32)

    def one(image: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
        scale = 1.0 / part
        return jax.image.scale_and_translate(
            image.astype(jnp.float32),
            (height, width, channels),
            (0, 1),
            scale,
            -corner * size * scale,
            method="linear",
        )

    return flip(flip_key, _as_before(jax.vmap(one)(images, part, corner), images))


def rand_augment(key: jax.Array, images: jax.Array, operations: int, strength: float = 0.5) -> jax.Array:
    """Some operations at random for each image (RandAugment, Cubuk et al., arXiv 1909.13719), of these: none, shear and shift
    along either axis, rotation, brightness, contrast, saturation, posterisation, solarisation.

    Args:
      key: `jax.random.key`.
      images: `[n, height, width, channels]`, 0 to 255.
      operations: how many after each other.
      strength: 0 to 1, as a share of RandAugment's ranges: shear by 0.3, shift by 0.45, rotation by
        30 degrees, colours by 0.9, down to 2 bits; at 0 nothing changes.
    """
    values = images.astype(jnp.float32)
    for one in jax.random.split(key, operations):
        which_key, sign_key = jax.random.split(one)
        which = jax.random.randint(which_key, (len(images),), 0, 11)
        amount = strength * jnp.where(jax.random.bernoulli(sign_key, 0.5, (len(images),)), 1.0, -1.0)
        values = jax.vmap(_operate)(values, which, amount)
    return _as_before(values, images)


def _operate(image: jax.Array, which: jax.Array, amount: jax.Array) -> jax.Array:
    """One operation on one float32 image; `amount` from -1 to 1."""
    height, width, channels = image.shape

    def when(index: int, value: jax.Array) -> jax.Array:
        return jnp.where(which == index, value, 0.0)

    angle = when(5, amount * (jnp.pi / 6))
    matrix = jnp.stack(
        [
            jnp.stack([jnp.cos(angle), jnp.sin(angle) + when(1, 0.3 * amount)]),
            jnp.stack([-jnp.sin(angle) + when(2, 0.3 * amount), jnp.cos(angle)]),
        ]
    )
    moved = jnp.stack([when(3, 0.45 * amount * height), when(4, 0.45 * amount * width)])
    centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2], jnp.float32)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    places = jnp.stack([rows, columns], axis=-1).astype(jnp.float32) - centre[None, None]
    places = jnp.einsum("hwj,ij->hwi", places, matrix) + (centre + moved)[None, None]
    warped = jnp.stack(
        [map_coordinates(image[..., c], [places[..., 0], places[..., 1]], order=1) for c in range(channels)],
        axis=-1,
    )
    image = jnp.where((which >= 1) & (which <= 5), warped, image)

    more = 1.0 + 0.9 * amount
    grey = image.mean(axis=-1, keepdims=True)
    levels = jnp.exp2(jnp.round(6.0 * jnp.abs(amount)))
    threshold = 256.0 * (1.0 - 0.9 * jnp.abs(amount))
    coloured = (
        image,
        image * more,
        grey.mean() + (image - grey.mean()) * more,
        grey + (image - grey) * more,
        jnp.floor(image / levels) * levels,
        jnp.where(image >= threshold, 255.0 - image, image),
    )
    place = jnp.maximum(which - 5, 0)
    return jnp.clip(jnp.select([place == i for i in range(6)], coloured), 0.0, 255.0)


def _as_before(values: jax.Array, images: jax.Array) -> jax.Array:
    """float32 values in the dtype of the images, rounded where that is whole numbers."""
    if not jnp.issubdtype(images.dtype, jnp.integer):
        return values.astype(images.dtype)
    return jnp.clip(jnp.round(values), 0, 255).astype(images.dtype)


def mix(key: jax.Array, x: jax.Array, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixes each image with another one of the batch.

    mixup: `share x + (1 - share) x'` (Zhang et al., arXiv 1710.09412); cutmix: a rectangle of `1 - share` of the area is the
    other image's (Yun et al., arXiv 1905.04899). `share` is drawn from Beta(a, a), once per batch; where both are wanted, a coin
    decides for the batch.

    Args:
      key: `jax.random.key`.
      x: normalised images float32 `[n, height, width, channels]`.
      mixup: a of mixup; 0: never.
      cutmix: a of cutmix; 0: never.

    Returns:
      The images, int32 `[n]`: with which one each is mixed, and the share (float32 scalar) of its own label.
    """
    n, height, width, _ = x.shape
    coin_key, share_key, place_key, order_key = jax.random.split(key, 4)
    cuts = jax.random.bernoulli(coin_key, 0.5) if mixup and cutmix else jnp.asarray(bool(cutmix))
    alpha = jnp.where(cuts, cutmix or 1.0, mixup or 1.0)
    share = jax.random.beta(share_key, alpha, alpha)
    other = jax.random.permutation(order_key, n)
    partner = x[other]
    blended = share * x + (1.0 - share) * partner

    side = jnp.sqrt(1.0 - share)
    centre = jax.random.uniform(place_key, (2,))
    size = jnp.asarray([height, width], jnp.float32)
    low, high = jnp.round((centre - side / 2) * size), jnp.round((centre + side / 2) * size)
    rows, columns = jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32)
    inside = ((rows >= low[0]) & (rows < high[0]))[:, None] & ((columns >= low[1]) & (columns < high[1]))[
        None, :
    ]
    cut = jnp.where(inside[None, :, :, None], partner, x)
    # At the border less of the rectangle is left than was drawn.
    cut_share = 1.0 - inside.mean(dtype=jnp.float32)
    return jnp.where(cuts, cut, blended), other.astype(jnp.int32), jnp.where(cuts, cut_share, share)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": lambda key, images: images,
    "shift": lambda key, images: shift(key, images, 1),
    "crop_flip": crop_flip,
    "resized_crop": resized_crop,
}
"""What `FinetuneConfig.augment` names."""

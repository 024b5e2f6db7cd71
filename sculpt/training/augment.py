"""Augmentation on the device, under jit, of raw images: padding is black, as in the usual recipes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Augmentation = Callable[[jax.Array, jax.Array], jax.Array]
"""`(key, images [n, height, width, channels]) -> images`, of the same shape and dtype."""


def shift(key: jax.Array, images: jax.Array, distance: int) -> jax.Array:
    """Pads by `distance` zeros on each side and crops each image at a random place."""
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (distance, distance), (distance, distance), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * distance + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def crop_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """The CIFAR recipe: pad 4, random crop, mirror half of the images."""
    crop_key, flip_key = jax.random.split(key)
    images = shift(crop_key, images, 4)
    flip = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1, :], images)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": lambda key, images: images,
    "shift": lambda key, images: shift(key, images, 1),
    "crop_flip": crop_flip,
}
"""What `FinetuneConfig.augment` names."""

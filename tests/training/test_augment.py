"""Augmentation: what may change does, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.training.augment import AUGMENTATIONS, crop_flip, shift


def images(n: int = 64, size: int = 8, channels: int = 3) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (n, size, size, channels), 1, 256).astype(jnp.uint8)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_shape_and_dtype_stay_and_a_key_gives_the_same_images_again(name: str) -> None:
    x, augment = images(), jax.jit(AUGMENTATIONS[name])
    y = augment(jax.random.key(1), x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(y, augment(jax.random.key(1), x))
    assert (name == "none") == bool((y == x).all())
    assert (name == "none") == bool((augment(jax.random.key(2), x) == y).all())


def test_shift_moves_by_every_offset_up_to_one_and_pads_with_zeros() -> None:
    x = np.asarray(images())
    y = np.asarray(shift(jax.random.key(3), jnp.asarray(x), 1))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for i in range(len(x)):
        matches = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if (padded[i, r : r + 8, c : c + 8] == y[i]).all()
        ]  # fmt: skip
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 9


def test_crop_flip_shifts_by_up_to_four_and_mirrors_half() -> None:
    x = np.asarray(images(200, 10))
    y = np.asarray(crop_flip(jax.random.key(4), jnp.asarray(x)))
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners, mirrored = set(), 0
    for i in range(len(x)):
        found = [
            (r, c, flip)
            for r in range(9)
            for c in range(9)
            for flip in (False, True)
            if (padded[i, r : r + 10, c : c + 10][:, :: -1 if flip else 1] == y[i]).all()
        ]
        assert len(found) == 1
        corners.add(found[0][:2])
        mirrored += found[0][2]
    assert {r for r, _ in corners} == {c for _, c in corners} == set(range(9))
    assert 70 < mirrored < 130

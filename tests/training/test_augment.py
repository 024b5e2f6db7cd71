"""Augmentation: what may change does, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sculpt.training.augment import AUGMENTATIONS, crop_flip, mix, rand_augment, resized_crop, shift


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_resized_crop_shows_parts_of_the_image_at_full_size() -> None:
    rows = jnp.broadcast_to(jnp.linspace(0.0, 255.0, 32)[None, :, None, None], (500, 32, 32, 3))
    y = np.asarray(resized_crop(jax.random.key(5), rows))
    # Bilinear: what rises evenly still does, over less of the range the smaller the part.
    height = (y[:, -1, 0, 0] - y[:, 0, 0, 0]) / 255
    assert (np.diff(y[:, :, 0, 0], axis=1) > -1e-3).all()
    assert height.min() < 0.5 and height.max() > 0.95
    flat = jnp.full((4, 8, 8, 3), 77, jnp.uint8)
    np.testing.assert_array_equal(resized_crop(jax.random.key(6), flat), flat)


@pytest.mark.slow
def test_rand_augment_of_no_strength_changes_nothing_and_of_some_most_images() -> None:
    x = images(60, 16)
    np.testing.assert_array_equal(rand_augment(jax.random.key(0), x, 2, strength=0.0), x)
    y = jax.jit(rand_augment, static_argnums=2)(jax.random.key(0), x, 2)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    changed = (np.asarray(y) != np.asarray(x)).any((1, 2, 3)).mean()
    assert 0.8 < changed <= 1.0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.slow
def test_rand_augment_does_each_operation(channels: int) -> None:
    x = jnp.broadcast_to(images(1, 16, channels), (300, 16, 16, channels))
    y = np.asarray(rand_augment(jax.random.key(1), x, 1))
    # One of eleven operations in two directions; grey images have no saturation, three operations have one direction.
    assert len(np.unique(y.reshape(300, -1), axis=0)) >= (15 if channels == 1 else 17)


@pytest.mark.slow
def test_mixup_blends_and_cutmix_pastes_the_share_that_they_tell() -> None:
    x = jax.random.normal(jax.random.key(0), (16, 12, 12, 3))
    blended, other, share = mix(jax.random.key(1), x, 1.0, 0.0)
    np.testing.assert_allclose(blended, share * x + (1 - share) * x[other], atol=1e-6)
    assert sorted(np.asarray(other).tolist()) == list(range(16)) and 0 < float(share) < 1
    for seed in range(5):
        cut, other, share = map(np.asarray, mix(jax.random.key(seed), x, 0.0, 1.0))
        moved = [i for i in range(16) if other[i] != i]
        own = (cut == np.asarray(x)).all(-1)[moved].mean((1, 2))
        np.testing.assert_allclose(own, share, atol=1e-6)
        assert ((cut == np.asarray(x)) | (cut == np.asarray(x)[other])).all()


@pytest.mark.slow
def test_of_both_mixtures_a_coin_takes_one() -> None:
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    kinds = set()
    for seed in range(20):
        y, other, _ = map(np.asarray, mix(jax.random.key(seed), x, 1.0, 1.0))
        kinds.add(bool(((y == np.asarray(x)) | (y == np.asarray(x)[other])).all()))
    assert kinds == {True, False}

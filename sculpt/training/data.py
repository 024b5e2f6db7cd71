"""Images and labels in three disjoint splits: by name, from arrays, from files.

Images stay as they came (mostly uint8) in host memory; `Splits.normalise` makes them the network's input, on the host or
inside a jitted function. The test split is fixed by the data set; validation is carved out of train by a seed.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sculpt.training.folder import find_parts, read_folder
from sculpt.training.parquet import read_parquet
from sculpt.training.prepared import is_known, read_prepared

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_DIGITS_MEAN = (0.3053,)
_DIGITS_STD = (0.3762,)

_CIFAR_VALIDATION = 5000
_DIGITS_VALIDATION = 300
_NAMES = ("digits", "cifar10", "cifar10-jpeg", "cifar100", "folder")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One set of examples."""

    images: np.ndarray
    """`[n, height, width, channels]`, uint8 or float32, not normalised."""
    labels: np.ndarray
    """int32 `[n]`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint sets of examples. Search and selection read `validation`; only the final report reads `test`."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    """Per channel, of pixels divided by 255."""
    std: tuple[float, ...]
    """Per channel, of pixels divided by 255."""

    def normalise(self, images: Any) -> Any:
        """`(images / 255 - mean) / std`: uint8 or floating `[..., channels]` to float32 of the same shape.

        NumPy arrays give NumPy arrays, JAX arrays JAX arrays; works inside `jax.jit`.

        Raises:
          ValueError: for another dtype or number of channels.
        """
        return normalise(images, self.mean, self.std)


def normalise(images: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """`(images / 255 - mean) / std` per channel, as `Splits.normalise` does it."""
    channels = len(mean)
    floating = jax.numpy.issubdtype(images.dtype, np.floating)
    if not (floating or images.dtype == np.uint8) or images.ndim < 1 or images.shape[-1] != channels:
        raise ValueError(
            f"normalise expected uint8 or floating images [..., {channels}], got {images.dtype}{list(images.shape)}"
        )
    shape = (1,) * (images.ndim - 1) + (channels,)
    offset = np.asarray(mean, np.float32).reshape(shape)
    spread = np.asarray(std, np.float32).reshape(shape)
    return (images.astype(np.float32) / 255.0 - offset) / spread


def load_data(
    name: str, data_dir: str | Path | None = None, *, validation: int | None = None, seed: int = 0
) -> Splits:
    """A data set by name.

    `digits` comes with the package: 1,797 real 8x8 grey images, 400 of them for test (E. Alpaydin, C. Kaynak, "Optical
    Recognition of Handwritten Digits", UCI Machine Learning Repository, CC BY 4.0, as scikit-learn distributes it; its
    grey levels 0..16 are stored as 0..255). `folder` reads `data_dir/train/<class>/<image>` and `data_dir/test` (or `val`)
    alike, see `load_folder`. `cifar10-jpeg` reads `train_jpeg.parquet` and `test_jpeg.parquet` in
    `data_dir`. `cifar10`, `cifar100` and every other TensorFlow Datasets name are read from a prepared array_record
    directory; nothing is downloaded here. Where such a data set has no "test", its official validation is the test.

    Args:
      name: one of the above.
      data_dir: where the files are; for TensorFlow Datasets `$TFDS_DATA_DIR` or `~/tensorflow_datasets` by default.
      validation: number of training examples set aside; by default 300 of digits, 5,000 of CIFAR, else a tenth.
      seed: which of them. The test split never depends on it.

    Raises:
      ValueError: for an unknown name, data that are not there (with the command that prepares them), images of several
        sizes, or a `validation` that leaves nothing to train on.
    """
    if name == "digits":
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
            arrays = [file[key] for key in ("train_images", "train_labels", "test_images", "test_labels")]
        return from_arrays(
            *arrays,
            name=name,
            validation=_DIGITS_VALIDATION if validation is None else validation,
            seed=seed,
            num_classes=10,
            mean=_DIGITS_MEAN,
            std=_DIGITS_STD,
        )
    if name == "folder":
        if data_dir is None:
            raise ValueError("folder needs data_dir, the folder that holds train and test (or val)")
        return load_folder(*find_parts(Path(data_dir)), validation=validation, seed=seed)
    if name == "cifar10-jpeg":
        if data_dir is None:
            raise ValueError(
                "cifar10-jpeg needs data_dir, the folder that holds train_jpeg.parquet and test_jpeg.parquet"
            )
        return load_parquet(
            name,
            Path(data_dir) / "train_jpeg.parquet",
            Path(data_dir) / "test_jpeg.parquet",
            validation=_CIFAR_VALIDATION if validation is None else validation,
            seed=seed,
            num_classes=10,
            mean=_IMAGENET_MEAN,
            std=_IMAGENET_STD,
        )
    if name not in _NAMES and not is_known(name, data_dir):
        close = difflib.get_close_matches(name, _NAMES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown data set {name!r}, expected one of {', '.join(_NAMES)} or a TensorFlow Datasets name{hint}"
        )
    prepared = read_prepared(name, data_dir)
    cifar = name in ("cifar10", "cifar100")
    if validation is None and cifar and len(prepared.train_labels) > 2 * _CIFAR_VALIDATION:
        validation = _CIFAR_VALIDATION
    return from_arrays(
        prepared.train_images,
        prepared.train_labels,
        prepared.test_images,
        prepared.test_labels,
        name=name,
        validation=validation,
        seed=seed,
        num_classes=prepared.num_classes,
        mean=_IMAGENET_MEAN if cifar else None,
        std=_IMAGENET_STD if cifar else None,
    )


def load_folder(
    train: str | Path,
    test: str | Path,
    *,
    size: int | None = None,
    validation: int | None = None,
    seed: int = 0,
) -> Splits:
    """Splits from two folders that hold a folder of images for each class.

    Args:
      train: the folder that train and validation come from.
      test: the folder of the test split, of the same classes.
      size: shorter sides are scaled to it and middle squares cut out; None: images are of one size already.
      validation, seed: as in `from_arrays`.

    Raises:
      ValueError: for folders without images, other classes in `test`, images that cannot be decoded or differ in size.
    """
    train_images, train_labels, classes = read_folder(Path(train), size)
    test_images, test_labels, others = read_folder(Path(test), size)
    if classes != others:
        raise ValueError(
            f"{test} and {train} differ in their classes: {sorted(set(classes) ^ set(others))[:5]} are in one of them only"
        )
    return from_arrays(
        train_images,
        train_labels,
        test_images,
        test_labels,
        name="folder",
        validation=validation,
        seed=seed,
        num_classes=len(classes),
    )


def load_parquet(
    name: str,
    train_file: str | Path,
    test_file: str | Path,
    *,
    validation: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    cache_dir: str | Path | None = None,
) -> Splits:
    """Splits from two parquet files with columns `image` (encoded bytes, one size for all) and `label` (integers).

    Args:
      name: what to call the data set.
      train_file: the file that train and validation come from.
      test_file: the file of the test split.
      validation, seed, num_classes, mean, std: as in `from_arrays`.
      cache_dir: folder for the decoded images, to be read back the next time; None keeps nothing.

    Raises:
      ValueError: if a file is missing or unreadable, lacks a column, or holds images of several sizes.
    """
    cache = None if cache_dir is None else Path(cache_dir)
    train, test = read_parquet(Path(train_file), cache), read_parquet(Path(test_file), cache)
    return from_arrays(
        *train,
        *test,
        name=name,
        validation=validation,
        seed=seed,
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    name: str = "arrays",
    validation: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Splits:
    """Splits from arrays in memory; validation is carved out of train, every class in its proportion.

    Args:
      train_images: `[n, height, width, channels]`, uint8 or floating.
      train_labels: integers `[n]`, 0 to num_classes - 1.
      test_images: `[m, height, width, channels]`, of the same dtype.
      test_labels: integers `[m]`.
      name: what to call the data set.
      validation: number of training examples set aside; a tenth by default.
      seed: which of them.
      num_classes: by default the highest label plus one.
      mean: per channel, of pixels divided by 255; measured on the training images by default.
      std: the same.

    Raises:
      ValueError: for shapes, dtypes or labels that do not fit each other.
    """
    train = _checked("train", train_images, train_labels)
    test = _checked("test", test_images, test_labels)
    if train.images.shape[1:] != test.images.shape[1:] or train.images.dtype != test.images.dtype:
        raise ValueError(
            f"train images are {train.images.dtype}{list(train.images.shape)}, test images "
            f"{test.images.dtype}{list(test.images.shape)}: only the first axis may differ"
        )
    highest = max(int(train.labels.max()), int(test.labels.max()))
    num_classes = highest + 1 if num_classes is None else num_classes
    if num_classes < 2 or highest >= num_classes:
        raise ValueError(
            f"labels go up to {highest}, which does not fit num_classes={num_classes} (at least 2)"
        )
    channels = train.images.shape[-1]
    train, validation_split = _carve(train, validation, seed)
    measured_mean, measured_std = _moments(train.images) if mean is None or std is None else ((), ())
    mean, std = tuple(measured_mean if mean is None else mean), tuple(measured_std if std is None else std)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"expected a mean and a positive std for {channels} channels, got {mean} and {std}")
    return Splits(name, train, validation_split, test, num_classes, mean, std)


def _checked(which: str, images: Any, labels: Any) -> Split:
    images, labels = np.asarray(images), np.asarray(labels)
    floating = np.issubdtype(images.dtype, np.floating)
    if images.ndim != 4 or not (floating or images.dtype == np.uint8):
        raise ValueError(
            f"{which} images must be uint8 or floating [n, height, width, channels], "
            f"got {images.dtype}{list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{which} labels must be integers [{len(images)}], one for each image, got {labels.dtype}{list(labels.shape)}"
        )
    if images.size == 0:
        raise ValueError(f"{which} images are empty: {list(images.shape)}")
    if labels.min() < 0:
        raise ValueError(f"{which} labels must be 0 or more, the lowest is {labels.min()}")
    if floating:
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise ValueError(f"{which} images hold NaN or infinite values")
    return Split(images, labels.astype(np.int32))


def _carve(split: Split, validation: int | None, seed: int) -> tuple[Split, Split]:
    """Train and validation, both shuffled.

    Sorted by class after the shuffle, evenly spaced positions hold every class in its proportion; so which of a class
    go is chance, how many is not.
    """
    n = len(split.labels)
    count = max(1, n // 10) if validation is None else validation
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 0 < count < n:
        raise ValueError(f"validation must be a number of examples between 1 and {n - 1}, got {validation!r}")
    order = np.asarray(jax.random.permutation(jax.random.key(seed), n))
    by_class = np.argsort(split.labels[order], kind="stable")
    chosen = np.zeros(n, bool)
    chosen[by_class[np.arange(count) * n // count]] = True
    kept, held = order[~chosen], order[chosen]
    return Split(split.images[kept], split.labels[kept]), Split(split.images[held], split.labels[held])


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels divided by 255."""
    pixels = images.reshape(-1, images.shape[-1])
    mean = pixels.mean(0, dtype=np.float64)
    # By blocks, so that no float64 copy of the whole set is made.
    blocks = np.array_split(pixels, -(-len(pixels) // (1 << 20)))
    square = sum(np.square(block - mean[None]).sum(0) for block in blocks) / len(pixels)
    std = np.maximum(np.sqrt(square), 1e-3)
    return tuple((mean / 255.0).tolist()), tuple((std / 255.0).tolist())

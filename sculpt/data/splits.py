"""Train, validation and test splits, from arrays or from streamed sources.

Images stay as they came (mostly uint8) in host memory; `Splits.normalise` makes them the network's input, on the host or
inside a jitted function. The test split is fixed by the data set; validation is carved out of train by a seed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from sculpt.arguments import as_int32, is_whole
from sculpt.data.stream import Source, StreamedImages
from sculpt.data.unreadable import read_whole
from sculpt.inputs import arrays_of, as_text, number_of, rows

_MOST_VALIDATION = 10_000
_MOST_CLASSES = 1000
"""Classes that are taken from the highest label, where there are fewer training images."""
_MEASURED = 4096
"""Images that mean and deviation are measured on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One set of examples."""

    images: Any
    """`[n, height, width, channels]`, uint8 or float32, not normalised; or what the network takes: an array `[n, ...]` or a pytree of them.
    Of a stream (`StreamedImages`) rows are read when they are asked for."""
    labels: np.ndarray
    """int32 `[n]`, or what the task of a network wants, `[n, ...]`."""

    def __repr__(self) -> str:
        """Shapes instead of arrays."""
        if isinstance(self.images, StreamedImages):
            return f"Split(streamed {np.dtype(self.images.dtype)}{list(self.images.shape)})"
        return f"Split({as_text(self.images)})"


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint sets of examples. Search and selection read `validation`; only the final report reads `test`.

    Only `train` may be a stream; the others are in memory.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    """0 where labels are no classes of whole images."""
    mean: tuple[float, ...]
    """Per channel, of pixels divided by 255; empty where inputs are as the network takes them."""
    std: tuple[float, ...]
    """Per channel, of pixels divided by 255."""
    unreadable: tuple[str, ...] = ()
    """Images that were left out because they cannot be decoded: place and reason."""

    def normalise(self, images: Any) -> Any:
        """`(images / 255 - mean) / std`: uint8 or floating `[..., channels]` to float32 of the same shape. What `from_examples` took stays
        as it is.

        NumPy arrays give NumPy arrays, JAX arrays JAX arrays; works inside `jax.jit`.

        Raises:
          ValueError: for another dtype or number of channels.
        """
        return normalise(images, self.mean, self.std)

    def input(self, number: int) -> Any:
        """Shapes and dtypes of so many inputs of the network, normalised."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (number, *x.shape[1:]), jax.numpy.float32 if self.mean else x.dtype
            ),
            self.train.images,
        )

    def wanted(self, number: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of so many labels."""
        labels = self.train.labels
        return jax.ShapeDtypeStruct((number, *labels.shape[1:]), labels.dtype)


def normalise(images: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """`(images / 255 - mean) / std` per channel, as `Splits.normalise` does it."""
    if not mean:
        return images
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
      train_images: `[n, height, width, channels]`, uint8, or floating on whatever scale (RandAugment wants 0 to 255).
      train_labels: integers `[n]`, 0 to num_classes - 1.
      test_images: `[m, height, width, channels]`, of the same dtype.
      test_labels: integers `[m]`.
      name: what to call the data set.
      validation: number of training examples set aside; a tenth by default, 10,000 at the most.
      seed: which of them.
      num_classes: by default the highest label plus one, at most the number of training images or 1,000.
      mean: per channel, of pixels divided by 255; by default that of 4,096 training images, drawn by the seed.
      std: the same.

    Raises:
      ValueError: for shapes, dtypes or labels that do not fit each other.
    """
    train = _checked("train", train_images, train_labels)
    test = _checked("test", test_images, test_labels)
    return _splits(name, train, test, validation, seed, num_classes, mean, std)


def from_examples(
    train_inputs: Any,
    train_labels: Any,
    test_inputs: Any,
    test_labels: Any,
    *,
    name: str = "examples",
    validation: int | None = None,
    seed: int = 0,
) -> Splits:
    """Splits for networks that classify no images: their inputs as they are, and whatever labels their task wants.

    Nothing is normalised or varied. A tenth of train, drawn by the seed, is set aside for validation, or so many as are asked for.

    Args:
      train_inputs: what the network takes: `[n, ...]`, floating or whole numbers (tokens), or a pytree of such arrays.
      train_labels: `[n, ...]`: a class for each pixel or token (below 0: none), numbers to be met, and so on.
      test_inputs: `[m, ...]`, of the same kind.
      test_labels: `[m, ...]`, of the same kind.
      name: what to call the data set.
      validation: number of training examples set aside; a tenth by default, 10,000 at the most.
      seed: which of them.

    Raises:
      ValueError: for shapes or dtypes that do not fit each other.
    """
    train = _as_they_are("train", train_inputs, train_labels)
    test = _as_they_are("test", test_inputs, test_labels)
    if jax.tree.structure(train.images) != jax.tree.structure(test.images):
        raise ValueError(
            f"train inputs are {as_text(train.images)}, test inputs {as_text(test.images)}: expected the same arrays"
        )
    for one, other in zip(jax.tree.leaves(train.images), jax.tree.leaves(test.images), strict=True):
        _require_alike("inputs", one, other)
    _require_alike("labels", train.labels, test.labels)
    train, held = _carve(train, validation, seed)
    return Splits(name, train, held, test, 0, (), ())


def from_sources(
    train: Source,
    test: Source,
    *,
    name: str = "sources",
    train_labels: Any = None,
    validation: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    workers: int | None = None,
    ahead: int = 2,
) -> Splits:
    """Splits whose train part stays in its source and is read while it is used, for data larger than memory.

    The same examples as `from_arrays` would give, in the same order. Of the train split `ahead + 1` batches are in host memory and up
    to three on the device; validation and test are read into memory here.

    Args:
      train: random access to examples, such as a `tfds.data_source` or a grain source; see `Source`. Threads share it.
      test: the same.
      name: what to call the data set.
      train_labels: integers `[n]`, what is trained on; by default those in `train`, every row of which is read once for them.
      validation, seed, num_classes, mean, std: as in `from_arrays`.
      workers: threads that read and decode; by default one for each core.
      ahead: batches that they read ahead.

    Raises:
      ValueError: for rows that cannot be read or do not fit each other; rows that training comes to are told of there.
    """
    images = StreamedImages.of(train, f"the train split of {name}", workers, ahead)
    if train_labels is None:
        train_labels = images.read_labels()
    held = read_whole(test, f"the test split of {name}", workers)
    return _splits(
        name,
        _checked("train", images, train_labels),
        _checked("test", *held),
        validation,
        seed,
        num_classes,
        mean,
        std,
    )


def _splits(
    name: str,
    train: Split,
    test: Split,
    validation: int | None,
    seed: int,
    num_classes: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Splits:
    _require_alike("images", train.images, test.images)
    highest = max(int(train.labels.max()), int(test.labels.max()))
    if num_classes is None:
        most = max(len(train.labels), _MOST_CLASSES)
        if highest >= most:
            raise ValueError(
                f"{name}: labels go up to {highest} with {len(train.labels)} training images: correct the label, or give num_classes"
            )
        num_classes = highest + 1
    if num_classes < 2 or highest >= num_classes:
        raise ValueError(
            f"{name}: labels go up to {highest}, which does not fit num_classes={num_classes} (at least 2)"
        )
    channels = train.images.shape[-1]
    train, validation_split = _carve(train, validation, seed)
    # They are in an order of chance.
    measured_mean, measured_std = (
        _moments(train.images[:_MEASURED]) if mean is None or std is None else ((), ())
    )
    mean, std = tuple(measured_mean if mean is None else mean), tuple(measured_std if std is None else std)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ValueError(f"expected a mean and a positive std for {channels} channels, got {mean} and {std}")
    return Splits(name, train, validation_split, test, num_classes, mean, std)


def _require_alike(what: str, train: Any, test: Any) -> None:
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise ValueError(
            f"train {what} are {train.dtype}{list(train.shape)}, test {what} {test.dtype}{list(test.shape)}: only the first axis "
            "may differ"
        )


def _as_they_are(which: str, inputs: Any, labels: Any) -> Split:
    inputs = jax.tree.map(lambda array: _as_it_is(which, "inputs", array), arrays_of(inputs))
    labels = _as_it_is(which, "labels", labels)
    if number_of(inputs) != len(labels):
        raise ValueError(f"{which} has {number_of(inputs)} inputs and {len(labels)} labels: one for each")
    return Split(inputs, labels)


def _as_it_is(which: str, what: str, given: Any) -> np.ndarray:
    """float32, or int32 of whole numbers, `[n, ...]`."""
    array = np.asarray(given)
    kind = next((k for k in (np.floating, np.integer) if np.issubdtype(array.dtype, k)), None)
    pixels = what == "inputs" and array.dtype == np.uint8
    if kind is None or pixels or array.ndim < 1 or 0 in array.shape:
        raise ValueError(
            f"{which} {what} must be floating-point or whole numbers [n, ...]{', pixels normalised' if pixels else ''}, got "
            f"{array.dtype}{list(array.shape)}"
        )
    if kind is np.integer:
        return as_int32(array, f"{which} {what}:")
    if not np.isfinite(array).all():
        raise ValueError(f"{which} {what} hold NaN or infinite values")
    return array.astype(np.float32)


def _checked(which: str, images: Any, labels: Any) -> Split:
    images = images if isinstance(images, StreamedImages) else np.asarray(images)
    labels = np.asarray(labels)
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
    if 0 in images.shape:
        raise ValueError(f"{which} images are empty: {list(images.shape)}")
    if labels.min() < 0:
        raise ValueError(f"{which} labels must be 0 or more, the lowest is {labels.min()}")
    if floating and isinstance(images, np.ndarray):
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise ValueError(f"{which} images hold NaN or infinite values")
    return Split(images, as_int32(labels, f"{which} labels:"))


def _carve(split: Split, validation: int | None, seed: int) -> tuple[Split, Split]:
    """Train and validation, both shuffled.

    Sorted by class after the shuffle, evenly spaced positions hold every class in its proportion; so which of a class
    go is chance, how many is not.
    """
    n = len(split.labels)
    count = min(max(1, n // 10), _MOST_VALIDATION) if validation is None else validation
    if not is_whole(count, 1) or count >= n:
        raise ValueError(f"validation must be a number of examples between 1 and {n - 1}, got {validation!r}")
    if not is_whole(seed, 0) or seed >= 2**32:
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}")
    order = np.asarray(jax.random.permutation(jax.random.key(seed), n))
    classes = split.labels.ndim == 1 and np.issubdtype(split.labels.dtype, np.integer)
    by_class = np.argsort(split.labels[order], kind="stable") if classes else np.arange(n)
    chosen = np.zeros(n, bool)
    chosen[by_class[np.arange(count) * n // count]] = True
    kept, held = order[~chosen], order[chosen]
    images = split.images
    rest = images.subset(kept) if isinstance(images, StreamedImages) else rows(images, kept)
    return Split(rest, split.labels[kept]), Split(rows(images, held), split.labels[held])


def add_examples(digest: Any, splits: Splits) -> None:
    """Adds what is trained on and selected by to a digest of `hashlib`: images (of a stream some) and labels. The test split is left
    alone."""
    for split in (splits.train, splits.validation):
        images = split.images.content() if isinstance(split.images, StreamedImages) else split.images
        for array in (*jax.tree.leaves(images), split.labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels divided by 255."""
    pixels = images.reshape(-1, images.shape[-1])
    mean = pixels.mean(0, dtype=np.float64)
    # By blocks, so that no float64 copy of all is made.
    blocks = np.array_split(pixels, -(-len(pixels) // (1 << 20)))
    square = sum(np.square(block - mean[None]).sum(0) for block in blocks) / len(pixels)
    std = np.maximum(np.sqrt(square), 1e-3)
    return tuple((mean / 255.0).tolist()), tuple((std / 255.0).tolist())

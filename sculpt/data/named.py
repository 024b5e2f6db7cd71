"""Loads data sets by name: `load_data`, `load_folder`, `load_parquet`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.arguments import did_you_mean
from sculpt.data import idx
from sculpt.data.folder import FolderSource, find_parts
from sculpt.data.parquet import ParquetSource, count_rows, read_parquet
from sculpt.data.prepared import (
    data_directory,
    is_known,
    is_prepared,
    named_errors,
    official_names,
    open_prepared,
    preparing_command,
)
from sculpt.data.splits import Splits, from_arrays, from_sources
from sculpt.data.stream import Source
from sculpt.data.unreadable import ReadableRows, read_whole

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COLOURS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3053,), (0.3762,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": _IMAGENET,
    "cifar10-jpeg": _IMAGENET,
    "cifar100": _IMAGENET,
    "imagenette": _IMAGENET,
    "imagenet2012": _IMAGENET,
}
"""Mean and deviation; of other data sets they are measured."""
_VALIDATION = {"digits": 300, "cifar10": 5000, "cifar10-jpeg": 5000, "cifar100": 5000, "fashion_mnist": 5000}
_NAMES = ("digits", "fashion_mnist", "cifar10", "cifar10-jpeg", "cifar100", "folder", "parquet")
ONE_SIZE = ("digits", "fashion_mnist")
"""Small data sets of small images: never scaled or streamed."""


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    size: int | None = None,
    stream: bool = False,
    skip_unreadable: bool = False,
    validation: int | None = None,
    seed: int = 0,
) -> Splits:
    """A data set by name. Nothing is downloaded.

    `digits` comes with the package: 1,797 real 8x8 grey images, 400 of them for test (E. Alpaydin, C. Kaynak, "Optical
    Recognition of Handwritten Digits", UCI Machine Learning Repository, CC BY 4.0, as scikit-learn distributes it; its
    grey levels 0..16 are stored as 0..255).

    `fashion_mnist`: 70,000 grey 28x28 pictures of clothes, 10,000 of them for test (H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a
    Novel Image Dataset for Benchmarking Machine Learning Algorithms", arXiv 1708.07747; MIT licence, Zalando SE). Classes: T-shirt/top,
    trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot. Read from `train-images-idx3-ubyte.gz` and its three
    siblings in `data_dir`, by default where Debian's package `dataset-fashion-mnist` puts them; else as TensorFlow Datasets prepares it.

    `folder` reads `data_dir/train/<class>/<image>` and `data_dir/test` (or `val`) alike, see `load_folder`; `parquet` reads
    `train.parquet` and `test.parquet` in `data_dir`, see `load_parquet`; `cifar10-jpeg` reads `train_jpeg.parquet` and
    `test_jpeg.parquet` there.

    `cifar10`, `cifar100`, `imagenette`, `imagenet2012` and every other TensorFlow Datasets name are read from a prepared array_record
    directory. Where such a data set has no "test", or one without labels, its official validation is the test.

    Args:
      name: one of the above.
      data_dir: where the files are; for TensorFlow Datasets `$TFDS_DATA_DIR` or `~/tensorflow_datasets` by default.
      size: shorter sides are scaled to it and middle squares cut out, for images of several sizes; None: they are of one size already.
        Not for digits and fashion_mnist.
      stream: leave the train split on disk and read it while it is used, see `from_sources`; validation and test are in memory. For
        TensorFlow Datasets every record is read once for its label, here. Not for digits and fashion_mnist.
      skip_unreadable: leave out images that cannot be decoded, and name them in `Splits.unreadable`; every image is decoded once more to
        find them. Without it such an image is a ValueError. Not for digits and fashion_mnist.
      validation: number of training examples set aside; by default 300 of digits, 5,000 of CIFAR and Fashion-MNIST, else a
        tenth, 10,000 at the most.
      seed: which of them. The test split never depends on it.

    Raises:
      ValueError: for an unknown name, data that are not there (with the command that prepares them), images of several
        sizes without `size`, or a `validation` that leaves nothing to train on.
    """
    for option, value in (("size", size), ("stream", stream), ("skip_unreadable", skip_unreadable)):
        if name in ONE_SIZE and value is not None and value is not False:
            raise ValueError(f"{name} is small and of one size: leave out {option}")
    reading: dict[str, Any] = {"size": size, "stream": stream, "skip_unreadable": skip_unreadable}
    if name == "digits":
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
            arrays = [file[key] for key in ("train_images", "train_labels", "test_images", "test_labels")]
        about = _about(name, len(arrays[1]), validation, seed)
        return from_arrays(*arrays, num_classes=10, **about)
    if name == "fashion_mnist" and (files := _fashion_files(data_dir)):
        train, test = idx.read_images(*files[:2]), idx.read_images(*files[2:])
        return from_arrays(*train, *test, num_classes=10, **_about(name, len(train[1]), validation, seed))
    if name == "folder":
        folder = _required(name, data_dir, "train and test (or val)")
        return load_folder(*find_parts(folder), **reading, validation=validation, seed=seed)
    if name == "parquet":
        folder = _required(name, data_dir, "train.parquet and test.parquet")
        files = folder / "train.parquet", folder / "test.parquet"
        return load_parquet(name, *files, **reading, validation=validation, seed=seed)
    if name == "cifar10-jpeg":
        folder = _required(name, data_dir, "train_jpeg.parquet and test_jpeg.parquet")
        files = folder / "train_jpeg.parquet", folder / "test_jpeg.parquet"
        about = _about(name, count_rows(files[0]), validation, seed)
        return load_parquet(train_file=files[0], test_file=files[1], num_classes=10, **reading, **about)
    if name not in _NAMES and not is_known(name, data_dir):
        hint = did_you_mean(name, (*_NAMES, *official_names()))
        raise ValueError(
            f"unknown data set {name!r}, expected one of {', '.join(_NAMES)} or a TensorFlow Datasets name{hint}"
        )
    prepared = open_prepared(name, data_dir, size)
    about = _about(name, len(prepared.train), validation, seed)
    about["num_classes"] = prepared.num_classes

    def labels() -> np.ndarray:
        with named_errors(prepared.where):
            return prepared.train.labels()

    return _from_sources(prepared.train, prepared.test, labels, stream, skip_unreadable, about)


def load_folder(
    train: str | Path,
    test: str | Path,
    *,
    size: int | None = None,
    stream: bool = False,
    skip_unreadable: bool = False,
    validation: int | None = None,
    seed: int = 0,
) -> Splits:
    """Splits from two folders that hold a folder of images for each class; names that begin with a dot are passed over.

    Args:
      train: the folder that train and validation come from.
      test: the folder of the test split, of the same classes.
      size: shorter sides are scaled to it and middle squares cut out; None: images are of one size already.
      stream: leave the train split on disk and read it while it is used, see `from_sources`.
      skip_unreadable: as in `load_data`.
      validation, seed: as in `from_arrays`.

    Raises:
      ValueError: for classes without images, other classes in `test`, images that cannot be decoded or differ in size.
    """
    kept, held = FolderSource.open(Path(train), size), FolderSource.open(Path(test), size)
    if kept.classes != held.classes:
        differing = sorted(set(kept.classes) ^ set(held.classes))[:5]
        raise ValueError(f"{test} and {train} differ in their classes: {differing} are in one of them only")
    about: dict[str, Any] = {"validation": validation, "seed": seed, "num_classes": len(kept.classes)}
    about["name"] = "folder"
    return _from_sources(kept, held, lambda: kept.labels, stream, skip_unreadable, about)


def load_parquet(
    name: str,
    train_file: str | Path,
    test_file: str | Path,
    *,
    size: int | None = None,
    stream: bool = False,
    skip_unreadable: bool = False,
    validation: int | None = None,
    seed: int = 0,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    cache_dir: str | Path | None = None,
) -> Splits:
    """Splits from two parquet files with columns `image` (encoded bytes, or Hugging Face's struct of them) and `label` (integers).

    Args:
      name: what to call the data set.
      train_file: the file that train and validation come from.
      test_file: the file of the test split.
      size: shorter sides are scaled to it and middle squares cut out; None: images are of one size already.
      stream: leave the train split on disk and read it while it is used, see `from_sources`. Parquet cannot be read at random, so
        its two columns are copied, once, to an Arrow file in `cache_dir`.
      skip_unreadable: as in `load_data`.
      validation, seed, num_classes, mean, std: as in `from_arrays`.
      cache_dir: folder for the decoded images, to be read back the next time, None keeps nothing; of a stream for the encoded ones,
        None: beside `train_file`, or where one may not write there in `$SCULPT_CACHE_DIR` or `~/.cache/sculpt`.

    Raises:
      ValueError: if a file is missing or unreadable, lacks a column, or holds images of several sizes.
    """
    kept, held = Path(train_file), Path(test_file)
    cache = None if cache_dir is None else Path(cache_dir)
    about: dict[str, Any] = {
        "name": name,
        "validation": validation,
        "seed": seed,
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
    }
    if not stream and not skip_unreadable:
        return from_arrays(*read_parquet(kept, cache, size), *read_parquet(held, cache, size), **about)
    if not stream and cache is not None:
        raise ValueError(
            "cache_dir keeps the decoded images of whole files: leave it out with skip_unreadable"
        )
    source = ParquetSource.open(kept, size, mapped=stream, cache_dir=cache)
    test = ParquetSource.open(held, size)
    return _from_sources(source, test, lambda: source.labels, stream, skip_unreadable, about)


def _from_sources(
    train: Source,
    test: Source,
    train_labels: Callable[[], np.ndarray],
    stream: bool,
    skip_unreadable: bool,
    about: dict[str, Any],
) -> Splits:
    """Splits of two sources: streamed or in memory, with or without rows that cannot be decoded."""
    unreadable: tuple[str, ...] = ()
    labels = train_labels() if stream else None
    if skip_unreadable:
        train, test = (ReadableRows.of(source, about["name"]) for source in (train, test))
        unreadable = train.unreadable + test.unreadable
        labels = labels if labels is None else labels[train.rows]
    if stream:
        splits = from_sources(train, test, train_labels=labels, **about)
    else:
        splits = from_arrays(*read_whole(train, about["name"]), *read_whole(test, about["name"]), **about)
    return dataclasses.replace(splits, unreadable=unreadable)


def _fashion_files(data_dir: str | Path | None) -> tuple[Path, ...]:
    """Of the idx format, unless it is prepared for TensorFlow Datasets and only that."""
    folder = idx.DEBIAN if data_dir is None else Path(data_dir)
    files = idx.find_files(folder)
    if not files and not is_prepared("fashion_mnist", data_dir):
        prepared = data_directory(data_dir)
        raise ValueError(
            f"no fashion_mnist in {folder}: put its four files there (train-images-idx3-ubyte.gz and so on; on Debian: apt-get "
            f"install dataset-fashion-mnist), or prepare it in {prepared} with: {preparing_command('fashion_mnist', prepared)}"
        )
    return files


def _about(name: str, images: int, validation: int | None, seed: int) -> dict[str, Any]:
    """What a data set is called and made into: the usual validation, unless a part of the data set is too small for it."""
    family = name.partition("/")[0].partition(":")[0]
    usual = _VALIDATION.get(family)
    if validation is None and usual is not None and images > 2 * usual:
        validation = usual
    mean, std = _COLOURS.get(family, (None, None))
    return {"name": name, "validation": validation, "seed": seed, "mean": mean, "std": std}


def _required(name: str, data_dir: str | Path | None, parts: str) -> Path:
    if data_dir is None:
        raise ValueError(f"{name} needs data_dir, the folder that holds {parts}")
    return Path(data_dir)

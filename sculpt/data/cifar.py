"""Prepares CIFAR-10 and CIFAR-100 for TensorFlow Datasets without TensorFlow.

    python -m sculpt.data.cifar cifar10 --data-dir DIR

downloads the official binary archive (A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009),
checks its SHA-256 against the one that TensorFlow Datasets records, and writes the data set under its official name and
version as array_record, so that `tfds.data_source` and `sculpt.load_data` read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import http.client
import io
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sculpt.data.prepared import data_directory

_PIXELS = 3 * 32 * 32
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class CifarArchive:
    """Where a data set comes from, and how its archive is laid out."""

    url: str
    sha256: str
    """As in the `url_checksums` of TensorFlow Datasets."""
    folder: str
    train: tuple[str, ...]
    """Files of records: one byte for each of `labels`, then red, green and blue planes of 32x32 bytes."""
    test: tuple[str, ...]
    labels: tuple[str, ...]
    """Features that the leading bytes of a record are."""
    names: tuple[str, ...]
    """File with the class names of each of `labels`."""


ARCHIVES = {
    "cifar10": CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
        labels=("label",),
        names=("batches.meta.txt",),
    ),
    "cifar100": CifarArchive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        labels=("coarse_label", "label"),
        names=("coarse_label_names.txt", "fine_label_names.txt"),
    ),
}


def prepare(
    name: str,
    data_dir: str | Path | None = None,
    archive: str | Path | None = None,
    *,
    url: str | None = None,
    sha256: str | None = None,
    timeout: float = 30.0,
) -> Path:
    """Writes `data_dir/name/version`; where that is complete nothing is downloaded, read or written.

    Args:
      name: "cifar10" or "cifar100".
      data_dir: by default where TensorFlow Datasets looks.
      archive: the binary archive, if it is already on disk; otherwise it is downloaded and not kept.
      url: a mirror of the official archive.
      sha256: what the archive must hash to, if not to the official value.
      timeout: seconds without a byte before a download is given up.

    Returns:
      The directory of the prepared data set.

    Raises:
      ValueError: for an unknown name, an archive of another SHA-256 or layout, or one that is not there; also as
        `find_complete`.
      OSError: if the download fails. In either case nothing is left behind.
    """
    if (complete := find_complete(name, data_dir)) is not None:
        return complete
    source, directory = ARCHIVES[name], data_directory(data_dir)
    expected = (sha256 or source.sha256).lower()
    with tempfile.TemporaryDirectory(prefix=f"sculpt-{name}-") as scratch:
        if archive is None:
            file = Path(scratch) / "archive.tar.gz"
            digest = _download(url or source.url, file, timeout)
        else:
            file = Path(archive)
            if not file.is_file():
                raise ValueError(f"no archive {file}: give the file of {source.url}")
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != expected:
            raise ValueError(
                f"{url or archive or source.url} has the SHA-256 {digest}, expected {expected}: not used"
            )
        return _write(name, source, _read(file, source), directory, Path(scratch))


def find_complete(name: str, data_dir: str | Path | None = None) -> Path | None:
    """The directory of a data set that `prepare` need not write again, or None.

    Raises:
      ValueError: for an unknown name, or a directory whose contents are damaged or of another file format.
    """
    if name not in ARCHIVES:
        raise ValueError(f"expected one of {', '.join(ARCHIVES)}, got {name!r}")
    directory = data_directory(data_dir)
    if not (directory / name).is_dir():
        return None  # before TensorFlow Datasets is imported, which takes seconds
    import tensorflow_datasets as tfds

    official: Any = tfds.builder_cls(name)
    try:
        builder = official(data_dir=directory, file_format="array_record")
    except Exception as error:  # what it raises depends on what is wrong
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{directory / name} cannot be used ({reason}): remove it first") from error
    written = Path(builder.data_dir)
    if not (written / "dataset_info.json").is_file():
        return None
    files = [Path(file) for split in builder.info.splits.values() for file in split.filepaths]
    lost = [file.name for file in files if not file.is_file()]
    if lost or not files:
        raise ValueError(f"{written} is not complete ({', '.join(lost) or 'no splits'}): remove it first")
    return written


def _download(url: str, file: Path, timeout: float) -> str:
    """Saves `url` and returns its SHA-256."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    digest = hashlib.sha256()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer, file.open("wb") as out:
            total = answer.headers.get("Content-Length")
            with Progress(*columns) as progress:
                task = progress.add_task(url.rpartition("/")[2], total=int(total) if total else None)
                while chunk := answer.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.advance(task, len(chunk))
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise OSError(
            f"cannot download {url}: {reason}; fetch it elsewhere and pass it with --archive FILE"
        ) from error
    return digest.hexdigest()


def _read(file: Path, source: CifarArchive) -> dict[str, bytes]:
    """The files of the archive that matter, by base name; nothing is unpacked to disk."""
    wanted = {f"{source.folder}/{name}": name for name in (*source.train, *source.test, *source.names)}
    contents = {}
    try:
        with tarfile.open(file, "r:gz") as tar:
            for member in tar:
                opened = tar.extractfile(member) if member.name in wanted else None
                if opened is not None:
                    contents[wanted[member.name]] = opened.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a readable .tar.gz archive: {error}") from error
    missing = sorted(set(wanted.values()) - set(contents))
    if missing:
        raise ValueError(
            f"{file} lacks {', '.join(missing)} in {source.folder}/: is it the *binary* version?"
        )
    for name in (*source.train, *source.test):
        if not contents[name] or len(contents[name]) % (len(source.labels) + _PIXELS):
            raise ValueError(
                f"{file}: {name} is no whole number of CIFAR records ({len(contents[name])} bytes)"
            )
    return contents


def _write(
    name: str, source: CifarArchive, contents: dict[str, bytes], directory: Path, scratch: Path
) -> Path:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official = tfds.builder_cls(name)

    def split_generators(builder: Any, manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        for label, names in zip(source.labels, source.names):
            builder.info.features[label].names = contents[names].decode().split()
        return {
            "train": _examples("train", source, [contents[file] for file in source.train]),
            "test": _examples("test", source, [contents[file] for file in source.test]),
        }

    # The official builder with its reading replaced: that is the only part of it that needs TensorFlow.
    with registered.skip_registration():
        builder_class: Any = type(official.__name__, (official,), {"_split_generators": split_generators})
        builder = builder_class(data_dir=directory, file_format="array_record")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_dir=scratch, download_config=config)
    return Path(builder.data_dir)


def _examples(
    split: str, source: CifarArchive, files: Sequence[bytes]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and record, in the official order, as the official builder yields them but for the PNG encoding."""
    from PIL import Image

    head = len(source.labels)
    records = np.concatenate([np.frombuffer(file, np.uint8).reshape(-1, head + _PIXELS) for file in files])
    for index, record in enumerate(records):
        encoded = io.BytesIO()
        Image.fromarray(record[head:].reshape(3, 32, 32).transpose(1, 2, 0)).save(encoded, "PNG")
        encoded.seek(0)
        labels = dict(zip(source.labels, record[:head].tolist()))
        yield index, {"id": f"{split}_{index:05d}", "image": encoded, **labels}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sculpt.data.cifar",
        description="Prepares CIFAR for TensorFlow Datasets, without TensorFlow.",
    )
    parser.add_argument("name", choices=list(ARCHIVES))
    parser.add_argument("--data-dir", type=Path, help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--archive", type=Path, help="the official binary .tar.gz, if it is already on disk")
    parser.add_argument("--url", help="a mirror of the official archive")
    parser.add_argument("--sha256", help="what the archive must hash to, if not to the official value")
    options = parser.parse_args(arguments)
    try:
        if (complete := find_complete(options.name, options.data_dir)) is not None:
            print(f"{options.name} is complete in {complete} already: nothing to do")
            return 0
        written = prepare(
            options.name, options.data_dir, options.archive, url=options.url, sha256=options.sha256
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.name} is ready in {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

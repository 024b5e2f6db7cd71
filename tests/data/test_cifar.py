"""The preparer without TensorFlow: official layout in, `tfds.data_source` and `load_data` out."""

from __future__ import annotations

import hashlib
import http.server
import io
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sculpt
from sculpt.data import cifar

TEN = "airplane automobile bird cat deer dog frog horse ship truck".split()


def digits_as_rgb() -> tuple[np.ndarray, np.ndarray]:
    """Sixty real images of CIFAR's shape, every class among the first ten of train and of test."""
    test = sculpt.load_data("digits").test
    order = (
        np.concatenate([np.flatnonzero(test.labels == c)[:6] for c in range(10)]).reshape(10, 6).T.reshape(-1)
    )
    images = np.kron(test.images[order, :, :, 0], np.ones((1, 4, 4), np.uint8))
    # Red, green and blue differ, so that mixed-up planes would show.
    return np.stack([images, 255 - images, images // 2], -1), test.labels[order]


IMAGES, LABELS = digits_as_rgb()


def records(start: int, stop: int, coarse: bool) -> bytes:
    out = b""
    for image, label in zip(IMAGES[start:stop], LABELS[start:stop]):
        head = bytes([label // 2, label]) if coarse else bytes([label])
        out += head + image.transpose(2, 0, 1).tobytes()
    return out


def contents(name: str) -> dict[str, bytes]:
    """Forty images of train and twenty of test, in the official layout."""
    if name == "cifar100":
        return {
            "cifar-100-binary/train.bin": records(0, 40, True),
            "cifar-100-binary/test.bin": records(40, 60, True),
            "cifar-100-binary/coarse_label_names.txt": "".join(f"group{i}\n" for i in range(20)).encode(),
            "cifar-100-binary/fine_label_names.txt": "".join(f"class{i}\n" for i in range(100)).encode(),
        }
    batches = {
        f"cifar-10-batches-bin/data_batch_{i + 1}.bin": records(8 * i, 8 * i + 8, False) for i in range(5)
    }
    return {
        **batches,
        "cifar-10-batches-bin/test_batch.bin": records(40, 60, False),
        "cifar-10-batches-bin/batches.meta.txt": ("\n".join(TEN) + "\n\n").encode(),
        "cifar-10-batches-bin/readme.html": b"not read",
    }


def archive(file: Path, members: dict[str, bytes]) -> tuple[Path, str]:
    with tarfile.open(file, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none of ours is left (TFDS leaves an empty folder of its own)."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The URL of a served CIFAR-10 archive, and its SHA-256."""
    folder = tmp_path / "served"
    folder.mkdir()
    _, sha256 = archive(folder / "cifar.tar.gz", contents("cifar10"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/cifar.tar.gz", sha256
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between the test and its own server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_the_checksums_are_those_that_tensorflow_datasets_records() -> None:
    import tensorflow_datasets as tfds

    for name, source in cifar.ARCHIVES.items():
        recorded = (Path(tfds.__file__).parent / "url_checksums" / f"{name}.txt").read_text().split("\t")
        assert (recorded[0], recorded[2]) == (source.url, source.sha256)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_a_local_archive_end_to_end(tmp_path: Path, scratch: Path, name: str, classes: int) -> None:
    file, sha256 = archive(tmp_path / "archive.tar.gz", contents(name))
    data_dir = tmp_path / "data"
    written = cifar.prepare(name, data_dir, file, sha256=sha256)
    assert written == data_dir / name / "3.0.2"
    assert list(data_dir.iterdir()) == [data_dir / name] and not list(scratch.glob("sculpt-*"))

    splits = sculpt.load_data(name, data_dir)
    assert splits.num_classes == classes and splits.mean == (0.485, 0.456, 0.406)
    assert len(splits.train.labels) == 36 and len(splits.validation.labels) == 4
    expected = {image.tobytes(): int(label) for image, label in zip(IMAGES, LABELS)}
    assert len(expected) == 60
    assert {image.tobytes() for image in splits.test.images} == {image.tobytes() for image in IMAGES[40:]}
    for split in (splits.train, splits.validation, splits.test):
        assert all(
            expected[image.tobytes()] == label for image, label in zip(np.asarray(split.images), split.labels)
        )

    stamp = (written / "dataset_info.json").stat().st_mtime_ns
    cifar.prepare(name, data_dir, file, sha256=sha256)
    assert (written / "dataset_info.json").stat().st_mtime_ns == stamp


def test_tensorflow_datasets_reads_it_under_its_official_name(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    file, sha256 = archive(tmp_path / "archive.tar.gz", contents("cifar10"))
    cifar.prepare("cifar10", tmp_path, file, sha256=sha256)
    builder = tfds.builder("cifar10", data_dir=tmp_path)
    assert builder.info.features is not None
    assert builder.info.full_name == "cifar10/3.0.2"
    assert builder.info.features["label"].names == TEN  # pyright: ignore[reportIndexIssue]
    decoders: Any = {"image": tfds.decode.SkipDecoding()}
    source: Any = tfds.data_source(
        "cifar10", split="test", data_dir=tmp_path, download=False, decoders=decoders
    )
    assert {example["id"] for example in source} == {f"test_{i:05d}".encode() for i in range(20)}
    assert "tensorflow" not in sys.modules


def test_a_download_end_to_end(tmp_path: Path, scratch: Path, server: tuple[str, str]) -> None:
    url, sha256 = server
    cifar.prepare("cifar10", tmp_path / "data", url=url, sha256=sha256)
    assert not list(scratch.glob("sculpt-*"))
    assert len(sculpt.load_data("cifar10", tmp_path / "data").test.labels) == 20


def test_what_is_complete_is_not_downloaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, sha256 = archive(tmp_path / "archive.tar.gz", contents("cifar10"))
    data = tmp_path / "data"
    written = cifar.prepare("cifar10", data, file, sha256=sha256)
    nowhere = f"http://127.0.0.1:{closed_port()}/cifar.tar.gz"
    assert cifar.prepare("cifar10", data, url=nowhere) == written
    arguments = ["cifar10", "--data-dir", str(data), "--url", nowhere]
    capsys.readouterr()
    assert cifar.main(arguments) == 0
    assert capsys.readouterr().out == f"cifar10 is complete in {written} already: nothing to do\n"
    (written / "cifar10-test.array_record-00000-of-00001").unlink()
    assert cifar.main(arguments) == 1
    assert "is not complete (cifar10-test.array_record-00000-of-00001): remove it" in capsys.readouterr().err
    (written / "dataset_info.json").write_text("{")
    assert cifar.main(arguments) == 1
    assert re.search(r"cannot be used \(.*\): remove it first", capsys.readouterr().err)


def test_another_sha256_is_refused_and_nothing_stays(
    tmp_path: Path, scratch: Path, server: tuple[str, str]
) -> None:
    url, sha256 = server
    with pytest.raises(
        ValueError, match=f"cifar.tar.gz has the SHA-256 {sha256}, expected c4a38c50.*: not used"
    ):
        cifar.prepare("cifar10", tmp_path / "data", url=url)
    with pytest.raises(ValueError, match="has the SHA-256"):
        cifar.prepare("cifar10", tmp_path / "data", tmp_path / "served" / "cifar.tar.gz")
    assert not (tmp_path / "data").exists() and not list(scratch.glob("sculpt-*"))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_no_network_is_one_line_at_once(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}/cifar.tar.gz"
    command = [
        sys.executable,
        "-m",
        "sculpt.data.cifar",
        "cifar10",
        "--data-dir",
        str(tmp_path / "data"),
        "--url",
        url,
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot download {url}: ") and done.stderr.count("\n") == 1
    assert "--archive FILE" in done.stderr and not (tmp_path / "data").exists()


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz"
        start = time.perf_counter()
        with pytest.raises(OSError, match=r"cannot download .* timed out"):
            cifar.prepare("cifar10", tmp_path / "data", url=url, timeout=0.3)
        assert time.perf_counter() - start < 5
    assert not list(scratch.glob("sculpt-*"))


def test_a_missing_page_is_an_error(tmp_path: Path, server: tuple[str, str]) -> None:
    with pytest.raises(OSError, match=r"cannot download .*: File not found"):
        cifar.prepare("cifar10", tmp_path / "data", url=server[0] + ".none")


def refused(tmp_path: Path, file: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cifar.prepare(
            "cifar10", tmp_path / "data", file, sha256=hashlib.sha256(file.read_bytes()).hexdigest()
        )
    assert not (tmp_path / "data").exists()


def test_archives_of_another_layout_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "archive.tar.gz"
    whole = contents("cifar10")
    batch = "cifar-10-batches-bin/test_batch.bin"
    archive(file, {name: data for name, data in whole.items() if name != batch})
    refused(tmp_path, file, "lacks test_batch.bin in cifar-10-batches-bin/: is it the \\*binary\\* version")
    for data in (whole[batch][:-1], b""):
        archive(file, {**whole, batch: data})
        refused(tmp_path, file, "test_batch.bin is no whole number of CIFAR records")
    archive(file, whole)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(tmp_path, file, "is not a readable .tar.gz archive")
    file.write_bytes(b"nothing of the kind")
    refused(tmp_path, file, "is not a readable .tar.gz archive")


def test_a_damaged_data_set_is_one_clear_error(tmp_path: Path) -> None:
    file, sha256 = archive(tmp_path / "archive.tar.gz", contents("cifar10"))
    written = cifar.prepare("cifar10", tmp_path / "data", file, sha256=sha256)
    (shard,) = written.glob("cifar10-test.array_record*")
    shard.unlink()
    with pytest.raises(ValueError, match=f"cifar10 in {tmp_path / 'data'} cannot be read"):
        sculpt.load_data("cifar10", tmp_path / "data")


def test_names_and_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected one of cifar10, cifar100, got 'mnist'"):
        cifar.prepare("mnist", tmp_path)
    assert cifar.main(["cifar10", "--data-dir", str(tmp_path), "--archive", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: no archive ")

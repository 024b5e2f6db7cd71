"""Whatever stands in a file, its reader gives what was written or raises a ValueError that names the file."""

from __future__ import annotations

import functools
import gzip
import io
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

import sculpt
from sculpt.data.decode import decode_image
from sculpt.data.idx import read_idx
from sculpt.data.parquet import read_parquet
from sculpt.export.params import load_metadata
from sculpt.latency.layer_latency import load_layers
from sculpt.report import RunDirectory
from sculpt.rows import encode_row
from sculpt.scoring.policy_file import COLUMNS, pack_rows, read_policies, read_rows, unpack_rows
from sculpt.training.checkpoint import Checkpoints

POLICIES = np.arange(12, dtype=np.int32).reshape(4, 3)
SCORES = [{"index": i, "policy": [i], **dict.fromkeys(COLUMNS, 0.5)} for i in range(3)]


def written(write: Callable[[Any], Any]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def run_file(name: str, folder: Path) -> bytes:
    """A file of a run directory."""
    run = RunDirectory(folder)
    run.settle("search", {"budget": 0.5})
    run.complete("search", {"policy": [1, 2], "score": 0.5})
    run.log("search", {"best": 0.5})
    return (folder / name).read_bytes()


def packed(folder: Path) -> bytes:
    (folder / "rows.jsonl").write_text("".join(encode_row(row) + "\n" for row in SCORES))
    pack_rows(folder / "rows.jsonl", folder / "packed.parquet")
    return (folder / "packed.parquet").read_bytes()


def images_in_parquet(folder: Path) -> bytes:
    image = written(lambda out: Image.new("RGB", (4, 4)).save(out, "PNG"))
    table = pyarrow.table({"image": [image] * 3, "label": [0, 1, 0]})
    return written(lambda out: pyarrow.parquet.write_table(table, out))


def read_checkpoints(file: Path) -> None:
    """With the file as `run.json`."""
    folder = file.parent / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(file.read_bytes())
    Checkpoints(folder, "mine")


READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], Any], str]] = {
    "policies.npy": (
        lambda _: written(lambda out: np.save(out, POLICIES)),
        lambda f: list(read_policies(f)),
        "",
    ),
    "policies.npz": (
        lambda _: written(lambda out: np.savez_compressed(out, policies=POLICIES)),
        lambda f: list(read_policies(f)),
        "",
    ),
    "policies.jsonl": (
        lambda _: b'[0, 1]\n{"policy": [1, 0]}\n',
        lambda f: list(read_policies(f)),
        "",
    ),
    "scores.jsonl": (
        lambda _: "".join(encode_row(row) + "\n" for row in SCORES).encode(),
        lambda f: list(read_rows(f)),
        "",
    ),
    "scores.parquet": (packed, lambda f: unpack_rows(f, f.with_name("rows.jsonl")), ""),
    "images.parquet": (images_in_parquet, read_parquet, ""),
    "arrays.safetensors": (
        lambda _: save({"a/b": POLICIES, "c": POLICIES.astype(np.float16)}),
        lambda f: (sculpt.load_params(f), load_metadata(f)),
        "",
    ),
    "layers.safetensors": (lambda _: save({"a": POLICIES}), load_layers, ""),
    "image.png": (
        lambda _: written(lambda out: Image.new("RGB", (4, 4)).save(out, "PNG")),
        decode_image,
        "image",
    ),
    "image.gif": (
        lambda _: written(lambda out: Image.new("P", (4, 4)).save(out, "GIF")),
        decode_image,
        "image",
    ),
    "image.tif": (
        lambda _: written(lambda out: Image.new("L", (4, 4)).save(out, "TIFF")),
        decode_image,
        "image",
    ),
    "image.webp": (
        lambda _: written(lambda out: Image.new("RGB", (4, 4)).save(out, "WEBP")),
        decode_image,
        "image",
    ),
    "image.jpg": (
        lambda _: written(lambda out: Image.new("RGB", (4, 4)).save(out, "JPEG")),
        decode_image,
        "image",
    ),
    "image.bmp": (
        lambda _: written(lambda out: Image.new("RGB", (4, 4)).save(out, "BMP")),
        decode_image,
        "image",
    ),
    "array-idx1-ubyte.gz": (
        lambda _: gzip.compress(struct.pack(">4Bi", 0, 0, 8, 1, 5) + bytes(5)),
        lambda f: read_idx(f, 1),
        "",
    ),
    "config.json": (functools.partial(run_file, "config.json"), lambda f: RunDirectory(f.parent).config, ""),
    "stages/search.json": (
        functools.partial(run_file, "stages/search.json"),
        lambda f: RunDirectory(f.parent.parent).record("search"),
        "",
    ),
    "metrics.jsonl": (
        functools.partial(run_file, "metrics.jsonl"),
        lambda f: RunDirectory(f.parent).metrics(),
        "",
    ),
    "model.json": (
        lambda _: json.dumps({"format": "x", "version": 1, "sha256": "0"}).encode(),
        sculpt.load_model,
        "",
    ),
    "program.stablehlo": (lambda _: bytes(range(200)), sculpt.load_stablehlo, ""),
    "run.json": (
        lambda _: json.dumps({"format": 1, "fingerprint": "mine"}).encode(),
        read_checkpoints,
        "checkpoints",
    ),
}
"""Name of a file -> its content, its reader, what messages call it where not by its name."""

CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.one_of(st.just(None), st.binary(min_size=0, max_size=4))),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, changes: list[tuple[float, bytes | None]]) -> bytes:
    """Bytes replaced at places from 0 to 1 of the length; None cuts off."""
    for place, new in changes:
        at = int(place * len(content))
        content = content[:at] if new is None else content[:at] + new + content[at + len(new) :]
    return content


def check(name: str, folder: Path, examples: int, seed: int) -> None:
    write, read, called = READERS[name]
    content = write(folder)
    file = folder / name
    file.parent.mkdir(exist_ok=True)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[*hypothesis.HealthCheck],  # type: ignore[list-item]
    )
    @hypothesis.given(st.one_of(CHANGES.map(functools.partial(changed, content)), st.binary(max_size=50)))
    def only_value_errors(damaged: bytes) -> None:
        file.write_bytes(damaged)
        try:
            read(file)
        except ValueError as error:
            if (called or file.name) not in str(error):
                raise AssertionError(f"a message without the file's name: {error}") from error

    only_value_errors()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, 20, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_named_for_half_a_minute(name: str, tmp_path: Path) -> None:
    begun, seed = time.monotonic(), 1
    while time.monotonic() < begun + 30:
        folder = tmp_path / str(seed)  # writers go by what is there
        folder.mkdir()
        check(name, folder, 100, seed)
        seed += 1


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "1" * 5000, '{"policy": "x"}', "5", "[1e400]", "[2147483648]"]
)
def test_lines_that_are_no_policy(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f"[0]\n{line}\n")
    with pytest.raises(ValueError, match=r"p.jsonl, line 2"):
        list(read_policies(tmp_path / "p.jsonl"))


def raw(entries: dict[str, str], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of one byte per array of these types."""
    header: dict[str, Any] = {
        name: {"dtype": kind, "shape": [1], "data_offsets": [i, i + 1]}
        for i, (name, kind) in enumerate(entries.items())
    }
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    return struct.pack("<Q", len(text)) + text + bytes(len(entries))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw({"a": "F8_E4M3"}), "a (cannot be read as an array|is of float8)"),
        (raw({"a": "F8_E5M2"}), "a (cannot be read as an array|is of float8)"),
        (raw({"x": "U8", "x/y": "U8"}), "x/y is below another array: load it with a template"),
        (raw({"x/y": "U8", "x": "U8"}), "(x is above other arrays|x/y is below another array)"),
        (raw({"/" * 3000: "U8"}), "has more than 100 parts"),
        (raw({"a": "U8"}, {"sculpt": "[" * 50_000}), "its metadata cannot be read"),
        (raw({"a": "U8"}, {"sculpt": '{"metadata": {"a": 1}}'}), "its metadata are not what was written"),
        (raw({"a": "U8"}, {"sculpt": '{"metadata": {}, "keys": {"a": "none"}}'}), "holds random keys"),
    ],
)
def test_foreign_arrays_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"foreign.safetensors.* {message}"):
        sculpt.load_params(tmp_path / "foreign.safetensors")


def test_foreign_names_beside_the_records_of_checkpoints_are_passed_over(tmp_path: Path) -> None:
    keeper = Checkpoints(tmp_path / "c", "mine")
    keeper.save(1, {"a": jnp.arange(3)})
    for name in ("x.json", "-1.json", "1.5.json"):
        (tmp_path / "c" / "records" / name).write_text("5")
    found = keeper.restore_latest({"a": jnp.zeros(3, jnp.int32)})
    keeper.close()
    assert found is not None and found[0] == 1

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.environment import cores
from sculpt.export import litert as litert_export
from sculpt.latency import engines
from sculpt.latency.engines import ENGINES, engine_of, prepared
from sculpt.model import Model
from tests.architectures.equality import distance, drawn_policy, outputs, prune
from tests.nets.test_prunable import NARROW, images, narrow
from tests.nets.test_prunable import space_of as narrow_space
from tests.networks import network

IMAGES = np.asarray(jax.random.normal(jax.random.key(11), (8, 8, 8, 3)))


def skip_unless_installed(engine: str) -> None:
    try:
        engine_of(engine)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.fast("xla", "openvino", "litert")
def test_a_model_in_an_engine_gives_its_logits(engine: str) -> None:
    skip_unless_installed(engine)
    model = network("separable")
    expected = outputs(model, jnp.asarray(IMAGES))
    for batch in (1, 8):
        call = prepared(engine, model, IMAGES[:batch], threads=1)
        assert distance(expected[:batch], np.asarray(call())) <= 1e-4
        # A second call gives the same.
        assert distance(expected[:batch], np.asarray(call())) <= 1e-4


@pytest.mark.parametrize("engine", ["openvino", "litert"])
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.fast(
    "mobilenet_v1-openvino",
    "mobilenet_v1-litert",
    "mobilenet_v2-openvino",
    "mobilenet_v2-litert",
    "mobilenet_v3_small-openvino",
    "mobilenet_v3_small-litert",
    "efficientnet_lite0-openvino",
    "efficientnet_lite0-litert",
    "deit_tiny_distilled_patch16-openvino",
    "deit_tiny_distilled_patch16-litert",
)
def test_named_networks_dense_and_compact(engine: str, name: str) -> None:
    skip_unless_installed(engine)
    x = np.random.default_rng(1).standard_normal((8, *images(name).shape[1:])).astype(np.float32)
    small = prune(narrow(name), narrow_space(name), drawn_policy(narrow_space(name), 1)).small
    for model in (narrow(name), small):
        expected = outputs(model, jnp.asarray(x))
        for batch in (1, len(x)):
            call = prepared(engine, model, x[:batch], threads=1)
            assert distance(expected[:batch], np.asarray(call())) <= 1e-4


@pytest.mark.parametrize("engine", ["xla", "onnxruntime"])
def test_latencies_say_what_measured_them(engine: str) -> None:
    models = {"one": network("plain"), "two": network("plain")}
    found = sculpt.compare_latency(models, IMAGES[:2], repeats=3, engine=engine, threads=1)
    assert list(found) == ["one", "two"]
    for latency in found.values():
        assert 0 < latency.spread[0] <= latency.median <= latency.spread[1]
        assert (latency.engine, latency.threads, latency.batch, latency.precision, latency.n) == (
            engine, 1, 2, "float32", 3,
        )  # fmt: skip
        assert latency.versions[ENGINES[engine].package] != "absent"


CONFINED = """
import os
from pathlib import Path
os.sched_setaffinity(0, range(os.cpu_count()))
import jax, jax.numpy as jnp
from sculpt.latency.engines import confined
from sculpt.environment import cores
tasks, before = Path("/proc/self/task"), os.sched_getaffinity(0)
jax.block_until_ready(jnp.ones(3) + 1.0)  # threads are there
with confined(1):
    assert {len(os.sched_getaffinity(int(t.name))) for t in tasks.iterdir()} == {1}
assert os.sched_getaffinity(0) == before
assert cores() == len(before)
"""


@pytest.mark.slow
def test_confined_to_some_cores_and_back() -> None:
    """In a process of its own, which has all cores: workers of the tests have one."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no list of threads on this system")
    subprocess.run([sys.executable, "-c", CONFINED], check=True)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("plain")
    with pytest.raises(
        ValueError, match="engine must be one of xla, onnxruntime, openvino, litert, got 'tensorrt'"
    ):
        sculpt.measure_latency(model, IMAGES, engine="tensorrt")
    with pytest.raises(ValueError, match=f"threads must be a whole number from 1 to {cores()}"):
        sculpt.measure_latency(model, IMAGES, threads=cores() + 1)
    unwritten = sculpt.from_function(lambda p, x: jnp.sort(x @ p, axis=-1), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="cannot write sort"):
        sculpt.measure_latency(unwritten, IMAGES, engine="onnxruntime")
    for engine, module in (
        ("openvino", "openvino"),
        ("litert", "litert_converter"),
        ("onnxruntime", "onnxruntime"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"{module}.*: pip install 'autosculpt\[\w+\]'"):
            sculpt.measure_latency(model, IMAGES, engine=engine)


def test_an_engine_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        package = "numpy"

        def require(self) -> None:
            pass

        def prepare(self, model: Model, x: np.ndarray, threads: int) -> engines.Call:
            return lambda: np.zeros((len(x), 5))

    monkeypatch.setitem(ENGINES, "wrong", Wrong())
    with pytest.raises(ValueError, match=r"the logits of wrong differ from the model's by .* of the largest"):
        sculpt.measure_latency(network("plain"), IMAGES, engine="wrong")


def test_a_litert_file_is_loaded_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_installed("litert")
    model, x = network("separable"), IMAGES[:2]
    file = tmp_path / "model.tflite"
    sculpt.export_litert(model, file, x)
    call = litert_export.interpreted(file.read_bytes(), x, 1)
    assert distance(outputs(model, jnp.asarray(x)), np.asarray(call())) <= 1e-4
    monkeypatch.setattr(litert_export, "model_logits", lambda model, x: 2.0 * outputs(model, jnp.asarray(x)))
    with pytest.raises(ValueError, match="the logits of the LiteRT file differ from the model's by"):
        sculpt.export_litert(model, tmp_path / "other.tflite", x)
    assert [f.name for f in file.parent.iterdir()] == ["model.tflite"]


def test_a_litert_file_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(ValueError, match=r"pip install 'autosculpt\[litert\]'"):
        sculpt.export_litert(network("plain"), tmp_path / "model.tflite", IMAGES)
    assert list(tmp_path.iterdir()) == []

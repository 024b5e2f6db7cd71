from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from tests.conftest import untrained_digits

IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))


def linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1) @ params["w"]


LINEAR = sculpt.from_function(linear, {"w": jax.random.normal(jax.random.key(0), (64, 3))})


def test_the_file_gives_the_logits_of_the_model_at_any_batch(tmp_path: Path) -> None:
    exported = sculpt.export_stablehlo(LINEAR, tmp_path / "linear.stablehlo", IMAGES)
    loaded = sculpt.load_stablehlo(tmp_path / "linear.stablehlo")
    assert loaded.batch is None
    assert loaded.input_shape == (8, 8, 1)
    assert set(exported.program.platforms) == {"cpu", "cuda", "tpu"}
    for batch in (1, 3, 4):
        np.testing.assert_allclose(loaded(IMAGES[:batch]), LINEAR(IMAGES[:batch]), rtol=1e-6, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_fixed_batch_is_that_of_the_example(tmp_path: Path) -> None:
    loaded = sculpt.export_stablehlo(LINEAR, tmp_path / "f", IMAGES[:3], fixed_batch=True)
    assert loaded.batch == 3
    np.testing.assert_allclose(loaded(IMAGES[:3]), LINEAR(IMAGES[:3]), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"takes float32\[3, 8, 8, 1\], got"):
        loaded(IMAGES[:1])


@pytest.mark.slow
def test_dense_and_compact_networks(tmp_path: Path) -> None:
    model = untrained_digits()
    space = sculpt.make_space(sculpt.trace(model, IMAGES))
    policy = sculpt.random_policies(space, jax.random.key(5), 1, budget=0.5)[0]
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    small = sculpt.compact(masked, space, policy)
    sizes = []
    for name, network in (("dense", model), ("compact", small)):
        exported = sculpt.export_stablehlo(network, tmp_path / name, IMAGES)
        np.testing.assert_allclose(
            exported(IMAGES), jax.jit(network.apply)(network.params, network.state, IMAGES), atol=1e-5
        )
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[1] < sizes[0]


def test_the_file_needs_nothing_of_this_library(tmp_path: Path) -> None:
    sculpt.export_stablehlo(LINEAR, tmp_path / "linear.stablehlo", IMAGES)
    code = (
        "import sys, jax, numpy as np; from jax import export\n"
        f"program = export.deserialize(bytearray(open({str(tmp_path / 'linear.stablehlo')!r}, 'rb').read()))\n"
        "print(program.call(np.ones((2, 8, 8, 1), np.float32)).tolist()); assert 'sculpt' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = np.asarray(LINEAR(jnp.ones((2, 8, 8, 1))))
    np.testing.assert_allclose(np.asarray(parsed(done.stdout)), expected, rtol=1e-5)


def parsed(text: str) -> list[list[float]]:
    import json

    return json.loads(text)


def test_a_program_that_differs_from_the_model_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    calls = []

    def fickle(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        calls.append(1)
        return linear(params, x) * float(len(calls))

    with pytest.raises(ValueError, match="differs from the model"):
        sculpt.export_stablehlo(sculpt.from_function(fickle, LINEAR.params), tmp_path / "f.stablehlo", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_one_clear_error(tmp_path: Path) -> None:
    def host(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((4, 3), jnp.float32), linear(params, x))

    with pytest.raises(ValueError, match="cannot be exported"):
        sculpt.export_stablehlo(sculpt.from_function(host, LINEAR.params), tmp_path / "f.stablehlo", IMAGES)
    with pytest.raises(ValueError, match=r"does not take the example input float32\[1, 5\]"):
        sculpt.export_stablehlo(LINEAR, tmp_path / "f.stablehlo", jnp.zeros((1, 5)))
    two = sculpt.from_function(lambda params, x: (x, x), LINEAR.params)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="returns one array, this one returns 2"):
        sculpt.export_stablehlo(two, tmp_path / "f.stablehlo", IMAGES)
    with pytest.raises(ValueError, match=r"one image or more, got float\d+\[\]"):
        sculpt.export_stablehlo(LINEAR, tmp_path / "f.stablehlo", 1.0)
    assert list(tmp_path.iterdir()) == []


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    loaded = sculpt.export_stablehlo(LINEAR, tmp_path / "linear.stablehlo", IMAGES)
    for wrong in (jnp.zeros((4, 8, 8, 3)), jnp.zeros((4, 8, 8, 1), jnp.int32), jnp.zeros((8, 8, 1))):
        with pytest.raises(ValueError, match=r"takes float32\[batch, 8, 8, 1\], got"):
            loaded(wrong)


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    file = tmp_path / "linear.stablehlo"
    sculpt.export_stablehlo(LINEAR, file, IMAGES)
    whole = file.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable StableHLO program"):
            sculpt.load_stablehlo(file)
    with pytest.raises(ValueError, match="no such file"):
        sculpt.load_stablehlo(tmp_path / "absent")

"""Model files: what is rebuilt from one is the model that was saved, in every use; what is not one is refused."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.export.model_file.files import document_checksum
from sculpt.model import Model
from sculpt.trees import leaf_paths
from tests.architectures.equality import distance, gradients, outputs
from tests.networks import NETWORKS, network, traced

IMAGES = jax.random.normal(jax.random.key(11), (5, 8, 8, 3))
QUICK = ("function-dense", "nnx-compact", "plain-compact")
CASES = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
    for case in (f"{name}-{kind}" for name in NETWORKS for kind in ("dense", "compact"))
]


@functools.cache
def saved(case: str) -> Model:
    """ "residual-compact" is the network of that name with some of its channels taken out."""
    name, kind = case.split("-")
    return network(name) if kind == "dense" else compacted(network(name), traced(name))


def compacted(model: Model, trace: sculpt.Trace) -> Model:
    space = sculpt.make_space(trace)
    policy = sculpt.random_policies(space, jax.random.key(1), 1, budget=0.6)[0]
    return sculpt.compact(
        sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy)), space, policy
    )


def again(model: Model, path: Path, example: Any = IMAGES[:2]) -> Model:
    """Saved and loaded."""
    sculpt.save_model(model, path / "model", example)
    return sculpt.load_model(path / "model")


def assert_equal(expected: Any, found: Any) -> None:
    """Trees of arrays, whatever mappings they are made of."""
    a, b = (dict(zip(leaf_paths(tree), jax.tree.leaves(tree))) for tree in (expected, found))
    assert a.keys() == b.keys()
    for name, array in a.items():
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            assert jax.random.key_data(array).tolist() == jax.random.key_data(b[name]).tolist()
            continue
        np.testing.assert_allclose(b[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.fast("function-dense")
def test_the_same_in_evaluation_and_training_and_backwards(case: str, tmp_path: Path) -> None:
    model = saved(case)
    loaded = again(model, tmp_path)
    assert_equal((model.params, model.state), (loaded.params, loaded.state))
    assert loaded.describe() == model.describe()
    for batch in (1, 5):
        x = IMAGES[:batch]
        assert distance(outputs(model, x), outputs(loaded, x)) <= 1e-6
    assert_equal(gradients(model, IMAGES, training=True), gradients(loaded, IMAGES, training=True))


def kinked(params: dict[str, jax.Array], x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """At zeros of both `relu`s: its derivative there is 0, that of a maximum 1/2; and a derivative of its own that is not that of
    what it computes."""
    x = jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"])
    return doubled(x) @ params["c"]


@jax.custom_vjp
def doubled(x: jax.Array) -> jax.Array:
    return x * x.shape[0]


doubled.defvjp(lambda x: (doubled(x), x), lambda x, g: (jnp.cos(x) * g,))


@pytest.mark.slow
def test_derivatives_of_their_own_and_at_exact_zeros(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(2), 3)
    shapes = {"a": (4, 8), "b": (8, 6), "c": (6, 3)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}
    params["a"] = params["a"].at[:, 4].set(0.0)
    dense = sculpt.from_function(kinked, params, apply_train=kinked)
    x = jax.random.normal(jax.random.key(3), (3, 4)).at[1].set(0.0)
    for model in (dense, compacted(dense, sculpt.trace(dense, x))):
        loaded = again(model, tmp_path, x[:2])
        expected, found = gradients(model, x, training=False), gradients(loaded, x, training=False)
        jax.tree.map(np.testing.assert_array_equal, expected, found)


@pytest.mark.slow
def test_loaded_models_are_traced_compacted_folded_and_saved_again(tmp_path: Path) -> None:
    loaded = again(saved("residual-dense"), tmp_path)
    trace = sculpt.trace(loaded, IMAGES)
    assert [g.size for g in trace.groups] == [g.size for g in traced("residual").groups]
    assert (trace.macs, [layer.name for layer in trace.layers]) == (
        traced("residual").macs,
        [layer.name for layer in traced("residual").layers],
    )
    small, expected = compacted(loaded, trace), saved("residual-compact")
    assert_equal(expected.params, small.params)
    again_loaded = again(small, tmp_path)
    assert distance(outputs(expected, IMAGES), outputs(again_loaded, IMAGES)) <= 1e-6
    folded = sculpt.fold(again_loaded, IMAGES)
    assert distance(outputs(expected, IMAGES), outputs(again(folded, tmp_path), IMAGES)) <= 1e-5
    assert sculpt.export_stablehlo(again_loaded, tmp_path / "small.stablehlo", IMAGES).batch is None


def test_what_was_loaded_twice_is_compiled_once(tmp_path: Path) -> None:
    first, second = again(saved("plain-dense"), tmp_path), sculpt.load_model(tmp_path / "model.json")
    other = again(saved("function-dense"), tmp_path)
    assert (first.apply, first.apply_train) == (second.apply, second.apply_train)
    assert hash(first.apply) == hash(second.apply)
    assert first.apply != other.apply and first.apply != first.apply_train
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(apply: Any, params: Any, state: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return apply(params, state, x)

    for model in (first, second):
        logits(model.apply, model.params, model.state, IMAGES)
    assert len(traces) == 1


def test_loops_branches_constants_and_scatters(tmp_path: Path) -> None:
    # Putting it on a device is part of the program.
    table, noise = jnp.arange(40.0).reshape(8, 5) / 40, jax.random.key(5)

    @jax.checkpoint
    def block(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.silu(x @ w)

    def looped(params: dict[str, Any], x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda c, w: (block(c, w), None), x, params["layers"][1])
        x = jax.lax.while_loop(lambda c: jnp.abs(c).max() > 2.0, lambda c: c / 2.0, x) + params["layers"][0]
        x = jax.lax.cond(x.sum() > 0, jnp.sin, lambda y: y * jnp.inf, x)
        x = jnp.concatenate([x, x[:, :3]], axis=1) @ jnp.asarray(table, device=jax.devices()[0])
        x = x.at[:, jnp.asarray([0, 2])].add(1.0).at[0, 0].set(x.mean())
        return jnp.sort(x, axis=1)[:, ::-1] + 0.1 * jax.random.normal(noise, x.shape)

    keys = jax.random.split(jax.random.key(1))
    arrays = [jnp.ones((1, 5)), jax.random.normal(keys[0], (3, 5, 5))]
    model = sculpt.from_function(looped, {"layers": arrays})
    loaded = again(model, tmp_path, jax.ShapeDtypeStruct((2, 5), jnp.float32))
    assert isinstance(loaded.params["layers"], list)
    for batch in (1, 4):
        x = jax.random.normal(keys[1], (batch, 5))
        np.testing.assert_array_equal(outputs(model, x), outputs(loaded, x))
    names = set(sculpt.load_params(tmp_path / "model.safetensors")["constants"])
    assert len(names) == 2, "the table and the key, once each"


def test_a_batch_size_that_is_not_open_and_keys_of_the_old_kind(tmp_path: Path) -> None:
    def fixed(params: jax.Array, x: jax.Array) -> jax.Array:
        return x.reshape(int(x.shape[0]), -1) @ params

    def drop(params: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, 0.5, (2, 3)), fixed(params, x), 0.0)

    model = sculpt.from_function(fixed, jnp.ones((4, 3)), apply_train=drop)
    x = jnp.arange(8.0).reshape(2, 2, 2)
    loaded = again(model, tmp_path, x)
    assert distance(outputs(model, x), outputs(loaded, x)) == 0.0
    for key in (jax.random.key(4), jax.random.PRNGKey(4)):
        expected, _ = model.apply_train(model.params, {}, x, key)
        np.testing.assert_array_equal(loaded.apply_train(loaded.params, {}, x, key)[0], expected)
    with pytest.raises(ValueError, match=r"takes float32\[2, 2, 2\], got float32\[1, 2, 2\]"):
        loaded(x[:1])
    with pytest.raises(ValueError, match=r"float32\[4, 3\] for parameters, got float32\[4, 2\]"):
        loaded.apply(jnp.ones((4, 2)), {}, x)
    with pytest.raises(ValueError, match="with 0; got 0/w"):
        loaded.apply({"w": loaded.params}, {}, x)


ELSEWHERE = """
import sys, sculpt, jax.numpy as jnp
model = sculpt.load_model("model")
print(model(jnp.ones((3, 8, 8, 3))).tolist())
assert not {"flax", "sculpt.nets", "tests"} & set(sys.modules)
"""


@pytest.mark.slow
def test_a_process_that_knows_no_network(tmp_path: Path) -> None:
    model = saved("plain-dense")
    sculpt.save_model(model, tmp_path / "model.safetensors", IMAGES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert distance(outputs(model, jnp.ones((3, 8, 8, 3))), json.loads(done.stdout)) <= 1e-5


def linear(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["w"])


LINEAR = sculpt.from_function(linear, {"w": jnp.ones((4, 3))})
EXAMPLE = jnp.ones((2, 2, 2))


def test_a_model_without_training_mode_says_why(tmp_path: Path) -> None:
    loaded = again(sculpt.fold(LINEAR, EXAMPLE), tmp_path, EXAMPLE)
    with pytest.raises(ValueError, match=r"no training mode.*a folded model has no training mode"):
        loaded.apply_train(loaded.params, loaded.state, EXAMPLE, jax.random.key(0))

    def on_the_host(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((2, 3), jnp.float32), linear(params, x))

    loaded = again(sculpt.from_function(linear, LINEAR.params, apply_train=on_the_host), tmp_path, EXAMPLE)
    assert distance(outputs(LINEAR, EXAMPLE), outputs(loaded, EXAMPLE)) == 0.0
    with pytest.raises(ValueError, match=r"no training mode: pure_callback at test_model_file.py:\d+"):
        loaded.apply_train(loaded.params, loaded.state, EXAMPLE, jax.random.key(0))


def test_what_cannot_be_written_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    def host(params: Any, x: jax.Array) -> jax.Array:
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((2, 3), jnp.float32), linear(params, x))

    def chosen(params: Any, x: jax.Array) -> jax.Array:
        keep = jax.checkpoint_policies.save_only_these_names("sums")
        return jax.checkpoint(linear, policy=keep)(params, x)

    for function, message in (
        (host, r"pure_callback at test_model_file.py:\d+ \(.*host\) cannot be written: "),
        (chosen, r"(checkpoint|remat2) at .* cannot be written: its parameter policy has a value of type"),
        (lambda params, x: (x, x), "returns one array"),
        (lambda params, x: x @ params["w"], "does not take the example"),
    ):
        with pytest.raises(ValueError, match=message):
            sculpt.save_model(sculpt.from_function(function, LINEAR.params), tmp_path / "model", EXAMPLE)
    assert not list(tmp_path.iterdir())


Change = Callable[[dict[str, Any]], Any]
FIRST = ("evaluation", "equations", 0)
DAMAGED: dict[str, tuple[Change, str]] = {
    "format": (lambda d: d.update(format="other"), '"format" is not'),
    "version": (lambda d: d.update(version=2), "of version 2 of the format, this library reads 1"),
    "arrays": (lambda d: d.update(arrays_sha256="0"), "not of the same model"),
    "no arrays": (lambda d: d.pop("arrays_sha256"), "not of the same model"),
    "primitive": (lambda d: at(d, *FIRST).update(primitive="os.system"), "unknown primitive 'os.system'"),
    "id": (lambda d: at(d, *FIRST).update(inputs=[99]), "id 99, which nothing has given"),
    "later id": (lambda d: at(d, *FIRST).update(inputs=at(d, *FIRST)["outputs"]), "which nothing has given"),
    "id twice": (lambda d: at(d, *FIRST).update(outputs=[0]), "each given once"),
    "param": (lambda d: at(d, *FIRST)["params"].update(new_sizes=["batch", 4]), "not a readable model file"),
    "class": (lambda d: at(d, *FIRST)["params"].update(x={"enum": ["Popen", "A"]}), "'Popen', which is none"),
    "kind": (lambda d: at(d, *FIRST)["params"].update(x={"pickle": "gASV"}), "kind 'pickle'"),
    "size": (lambda d: at(d, *FIRST)["params"].update(x={"size": "__import__('os')"}), "for a shape"),
    "power": (lambda d: at(d, *FIRST)["params"].update(x={"size": "batch^99999999"}), "for a shape"),
    "shape": (lambda d: at(d, "evaluation", "values").__setitem__(-1, "float32[7]"), "the program says"),
    "dtype": (lambda d: at(d, "evaluation", "values").__setitem__(0, "object[4, 3]"), "the dtype 'object'"),
    "path": (lambda d: d.update(params=[["v"]]), "w is not expected"),
    "paths": (lambda d: d.update(params=[]), "for 0 arrays"),
    "constants": (lambda d: d.update(constants={"0": "float32[90]"}), "constants/0 is missing"),
    "inputs": (lambda d: d["training"].update(inputs=d["training"]["inputs"][:-1]), "not a readable model"),
    "outputs": (lambda d: d["evaluation"].update(outputs=[0, 0]), "gives 2 arrays"),
    "nothing": (lambda d: d.pop("evaluation"), "'evaluation'"),
    "depth": (lambda d: nest(at(d, *FIRST), 60), "inside each other"),
}


def at(data: Any, *keys: Any) -> Any:
    return functools.reduce(lambda inner, key: inner[key], keys, data)


def nest(equation: dict[str, Any], depth: int) -> None:
    empty = {"values": [], "inputs": [], "constants": [], "outputs": []}
    program: dict[str, Any] = {**empty, "equations": []}
    for _ in range(depth):
        inner = {"primitive": "cond", "inputs": [], "outputs": [0], "params": {}, "bodies": [program]}
        program = {**empty, "values": ["float32[]"], "equations": [inner]}
    equation["bodies"] = [program]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Arrays and JSON of a model."""
    folder = tmp_path_factory.mktemp("linear")
    sculpt.save_model(LINEAR, folder / "model", EXAMPLE)
    return (folder / "model.safetensors").read_bytes(), (folder / "model.json").read_bytes()


@pytest.mark.parametrize("what", DAMAGED)
def test_files_that_make_no_sense(what: str, files: tuple[bytes, bytes], tmp_path: Path) -> None:
    change, message = DAMAGED[what]
    document = json.loads(files[1])
    change(document)
    document["sha256"] = document_checksum(document)  # as someone would who means it
    (tmp_path / "model.safetensors").write_bytes(files[0])
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as raised:
        sculpt.load_model(tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert "model.json" in str(raised.value)


def test_files_that_are_not_whole(files: tuple[bytes, bytes], tmp_path: Path) -> None:
    arrays, program = tmp_path / "model.safetensors", tmp_path / "model.json"
    with pytest.raises(ValueError, match=r"no such file: .*model\.json"):
        sculpt.load_model(tmp_path / "model")
    program.write_bytes(files[1])
    with pytest.raises(ValueError, match=r"no such file: .*model\.safetensors"):
        sculpt.load_model(tmp_path / "model")
    arrays.write_bytes(files[0][:-3])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        sculpt.load_model(tmp_path / "model")
    arrays.write_bytes(files[0][:-3] + b"abc")
    with pytest.raises(ValueError, match="does not match its checksum"):
        sculpt.load_model(tmp_path / "model")
    sculpt.save_params({"params": {"w": jnp.zeros((4, 3))}}, arrays)
    with pytest.raises(ValueError, match="not of the same model"):
        sculpt.load_model(tmp_path / "model")
    arrays.write_bytes(files[0])
    flipped = files[1].replace(b"[0.0]", b"[0.5]", 1)
    assert flipped != files[1]
    for damaged in (b"", b"\xff\xfe", files[1][:-20], flipped, b"[" * 100_000, b"[1]"):
        program.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.json is not a readable model file") as raised:
            sculpt.load_model(tmp_path / "model")
        assert "\n" not in str(raised.value)
    program.write_bytes(files[1])
    assert distance(outputs(LINEAR, EXAMPLE), outputs(sculpt.load_model(program), EXAMPLE)) == 0.0

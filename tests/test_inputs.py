"""Networks of several inputs give what the same network of one array gives, in every function that takes images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.inputs import as_text, number_of, rows
from sculpt.model import Model

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 3


def apart(x: Any) -> Any:
    """The two inputs that are one array."""
    return {"tokens": x[:, 2:], "extra": (x[:, :2],)}


def together(x: Any) -> Any:
    """The array of two inputs."""
    return jnp.concatenate([x["extra"][0], x["tokens"]], axis=1)


def apply(params: Any, state: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["a"] + params["c"][None] - state["mean"][None])
    return hidden @ params["b"]


def apply_train(params: Any, state: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    mean = (x @ params["a"]).mean(0)
    return apply(params, {"mean": mean}, x), {"mean": 0.9 * state["mean"] + 0.1 * mean}


@functools.cache
def models() -> tuple[Model, Model]:
    """The network of one array, and that of two inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (6, 8)),
        "b": jax.random.normal(keys[1], (8, 3)),
        "c": jax.random.normal(keys[2], (8,)),
    }
    state = {"mean": jnp.ones(8)}
    single = sculpt.from_function(apply, params, state, apply_train)
    several = sculpt.from_function(
        lambda p, s, x: apply(p, s, together(x)),
        params,
        state,
        lambda p, s, x, key: apply_train(p, s, together(x), key),
    )
    return single, several


@functools.cache
def spaces() -> tuple[sculpt.Space, sculpt.Space]:
    single, several = models()
    traces = sculpt.trace(single, X), sculpt.trace(several, apart(X))
    return tuple(sculpt.make_space(t, "channels") for t in traces)  # type: ignore[return-value]


def masks(model: Model, space: sculpt.Space) -> Any:
    return sculpt.make_masks(space, model.params, [4])


def compacted(model: Model, space: sculpt.Space) -> Model:
    small = masks(model, space)
    return sculpt.compact(sculpt.apply_masks(model, small), space, [4], check=False, masks=small)


POLICIES = np.asarray([[0], [3], [5]])
FUNCTIONS: dict[str, Callable[[Model, sculpt.Space, Any], Any]] = {
    "evaluate": lambda m, s, x: sculpt.evaluate(m, x, LABELS, 3),
    "policies": lambda m, s, x: sculpt.evaluate_policies(m, s, POLICIES, x, LABELS, x),
    "reconstructed": lambda m, s, x: sculpt.evaluate_policies(
        m, s, POLICIES, x, LABELS, x, repair="reconstruct"
    ),
    "race": lambda m, s, x: (
        sculpt.race_policies(
            m, s, POLICIES, x, LABELS, jax.random.key(0), first_images=4, calibration=x
        ).order
    ),
    "recalibrate": lambda m, s, x: sculpt.recalibrate(m, x, 4).state,
    "reconstruct": lambda m, s, x: sculpt.reconstruct(m, masks(m, s), x).params,
    "taylor": lambda m, s, x: sculpt.importance(m, s.trace, "taylor", images=x, labels=LABELS).scores,
    "activation": lambda m, s, x: sculpt.importance(m, s.trace, "activation", images=x).scores,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.fast("evaluate", "recalibrate", "activation")
def test_several_inputs_give_what_one_array_gives(name: str) -> None:
    (single, several), spaces_ = models(), spaces()
    found = FUNCTIONS[name](several, spaces_[1], apart(X))
    expected = FUNCTIONS[name](single, spaces_[0], X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_inputs_that_do_not_fit_are_refused_by_path() -> None:
    several, space = models()[1], spaces()[1]
    wrong = {"tokens": X[:, :3], "extra": (X[:, :2],)}
    expected = r"expected images .*\['tokens'\] float32\[n, 4\], got .*\['tokens'\] float32\[8, 3\]"
    with pytest.raises(ValueError, match=expected):
        sculpt.evaluate_policies(several, space, POLICIES, wrong, LABELS)
    with pytest.raises(ValueError, match="as in the trace"):
        sculpt.importance(several, space.trace, "activation", images=X)
    with pytest.raises(ValueError, match="every array with the same n"):
        sculpt.evaluate(several, {"tokens": X[:3], "extra": (X,)}, LABELS)
    with pytest.raises(ValueError, match=r"the model does not take images float32\[8, 6\]"):
        sculpt.evaluate(several, X, LABELS)


def test_examples_of_inputs() -> None:
    assert number_of(apart(X)) == 8
    assert rows(apart(X), slice(2))["extra"][0].shape == (2, 2)
    assert as_text(X) == "float32[8, 6]"
    assert as_text(apart(X)) == "['extra'][0] float32[8, 2], ['tokens'] float32[8, 4]"


def test_engines_and_files_take_several_inputs(tmp_path: Any) -> None:
    small, x = compacted(models()[1], spaces()[1]), jax.tree.map(jnp.asarray, apart(X))
    expected = small(x)
    close = functools.partial(np.testing.assert_allclose, desired=expected, atol=1e-5)
    close(sculpt.fold(small, x)(x))
    exported = sculpt.export_stablehlo(small, tmp_path / "a", x)
    close(exported(x))
    assert exported.batch is None and exported(rows(x, slice(3))).shape == (3, 3)
    with pytest.raises(
        ValueError, match=r"takes \['extra'\]\[0\] float32\[batch, 2\].*, got float32\[8, 6\]"
    ):
        exported(X)
    sculpt.save_model(small, tmp_path / "m", x)
    loaded = sculpt.load_model(tmp_path / "m")
    close(loaded(x))
    assert loaded(rows(x, slice(3))).shape == (3, 3)
    logits, state = loaded.apply_train(loaded.params, loaded.state, x, jax.random.key(0))
    wanted, wanted_state = small.apply_train(small.params, small.state, x, jax.random.key(0))
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    np.testing.assert_allclose(state["mean"], wanted_state["mean"], atol=1e-5)
    latency = sculpt.compare_latency({"a": small, "b": models()[1]}, x, 1)["a"]
    assert latency.batch == 8 and latency.precision == "float32"


@pytest.mark.slow
def test_latency_of_layers_takes_several_inputs() -> None:
    several, space = models()[1], spaces()[1]
    latency = sculpt.measure_layers(several, space, apart(X), jax.random.key(0), networks=3, repeats=1)
    assert latency.batch == 8
    with pytest.raises(ValueError, match=r"expected an example input \['extra'\]\[0\] float32\[batch, 2\]"):
        sculpt.measure_layers(several, space, X, jax.random.key(0))


def tokens_and_mask(params: Any, x: Any) -> jax.Array:
    hidden = jax.nn.gelu(params["table"][x["tokens"]] @ params["a"]) @ params["b"]
    mask = x["mask"][..., None].astype(hidden.dtype)
    return (hidden * mask).sum(1) / (mask.sum(1) + 1e-6)


def test_onnx_takes_tokens_and_a_mask(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    draw = np.random.default_rng(0).normal
    shapes = {"table": (11, 4), "a": (4, 6), "b": (6, 3)}
    params = {name: jnp.asarray(draw(size=shape), jnp.float32) for name, shape in shapes.items()}
    model = sculpt.from_function(tokens_and_mask, params)
    x = {"tokens": np.arange(10, dtype=np.int32).reshape(2, 5), "mask": np.tri(2, 5, 2, dtype=np.int32)}
    sculpt.export_onnx(model, tmp_path / "a.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert [i.name for i in session.get_inputs()] == ["mask", "tokens"]
    longer = jax.tree.map(lambda a: np.concatenate([a, a[::-1]]), x)
    np.testing.assert_allclose(session.run(["logits"], longer)[0], model(longer), atol=1e-5)
    assert sculpt.compare_latency({"a": model}, x, 1, engine="onnxruntime")["a"].batch == 2

"""What `trace` finds, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import sculpt
from tests.architectures.dense_prediction import UNet
from tests.networks import NETWORKS, Residual, network, traced

EXPECTED_GROUPS = {
    "plain": [8, 12],
    "biased": [6, 8, 10],
    "residual": [8, 8, 12, 4, 4, 12],
    "concatenated": [8, 4, 4, 6, 4],
    "dilated": [8, 8],
    "nnx": [8, 6],
    "function": [8, 6],
}


@pytest.mark.parametrize("name", EXPECTED_GROUPS)
def test_groups_have_the_sizes_that_follow_from_the_architecture(name: str) -> None:
    assert sorted(g.size for g in traced(name).groups) == sorted(EXPECTED_GROUPS[name])


def test_residual_stream_is_one_group_over_all_its_layers() -> None:
    trace = traced("residual")
    stream = max(trace.groups, key=lambda g: len(g.slots))
    paths = {trace.leaves[leaf].path for leaf, _ in stream.slots}
    assert {"Conv_6/kernel", "Conv_5/kernel", "Conv_4/kernel", "Dense_0/kernel"} <= paths


def test_every_frozen_axis_has_a_reason_and_standard_widths_are_prunable() -> None:
    for name in NETWORKS:
        trace = traced(name)
        assert all(f.reason for f in trace.frozen)
        free = {slot for g in trace.groups for slot in g.slots}
        for layer in trace.layers:
            out_axis = (layer.leaf, len(trace.leaves[layer.leaf].shape) - 1)
            last = layer.index == max(la.index for la in trace.layers if la.kind == "dense")
            assert out_axis in free or last, f"{name}: width of {layer.name} is frozen"


def test_input_and_output_are_frozen_with_their_own_reason() -> None:
    reasons = {f.name: f.reason for f in traced("plain").frozen}
    assert reasons["Conv_0/kernel:2"] == "network input"
    assert reasons["Dense_0/kernel:1"] == "network output"


def test_macs_of_closed_form_cases() -> None:
    layers = {la.name: la for la in traced("plain").layers}
    assert layers["Conv_0"].macs == 8 * 8 * 9 * 3 * 8
    assert layers["Conv_1"].macs == 8 * 8 * 9 * 8 * 12
    assert layers["Dense_0"].macs == 12 * 5
    depthwise = next(la for la in traced("separable").layers if la.name == "Conv_2")
    assert depthwise.macs == 8 * 8 * 9 * 16


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_convolutions_cost_what_their_input_positions_do(
    stride: int, window: int, padding: str
) -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        strides = (stride, 1)
        return jax.lax.conv_transpose(
            x, params["w"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    model = sculpt.from_function(apply, {"w": jnp.ones((window, 2, 3, 4))})
    trace = sculpt.trace(model, jnp.zeros((1, 5, 6, 3)))
    assert trace.macs == trace.layers[0].macs == (5 * window) * (6 * 2) * 3 * 4


def test_first_layer_of_a_generator_multiplies_its_single_position_once() -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.conv_transpose(
            x, params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    model = sculpt.from_function(apply, {"w": jnp.ones((4, 4, 3, 2))})
    assert sculpt.count_cost(model, jnp.zeros((1, 1, 1, 3))) == (4 * 4 * 3 * 2, 4 * 4 * 3 * 2)


def test_macs_of_a_u_net() -> None:
    image = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(UNet().init, jax.random.key(0), image)
    macs = {layer.name: layer.macs for layer in sculpt.trace(sculpt.from_linen(UNet(), shapes), image).layers}
    assert macs["ConvTranspose_0"] == (2 * 2) * (2 * 2) * 10 * 7
    assert macs["ConvTranspose_1"] == (4 * 4) * (3 * 3) * 9 * 5
    assert macs["Conv_3"] == (4 * 4) * 9 * (7 + 8) * 9


def test_tracing_allocates_and_runs_nothing() -> None:
    module = Residual()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    trace = sculpt.trace(sculpt.from_linen(module, shapes), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    assert [g.size for g in trace.groups] == [g.size for g in traced("residual").groups]


def test_renaming_parameters_changes_nothing_but_names() -> None:
    model = network("function")
    order = ["head", "second", "bias", "first"]
    renamed = {f"p{i}": model.params[n] for i, n in enumerate(order)}

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return model.apply({n: params[f"p{i}"] for i, n in enumerate(order)}, {}, x)

    trace = sculpt.trace(sculpt.from_function(apply, renamed), jnp.zeros((1, 8, 8, 3)))
    assert [g.size for g in trace.groups] == [g.size for g in traced("function").groups]
    assert trace.macs == traced("function").macs


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda y: jax.nn.softmax(y, axis=-1), "reduced over"),
        (lambda y: (jnp.exp(y) * jnp.arange(8.0)).sum(-1, keepdims=True) * y, "summed over while not zero"),
        (lambda y: jnp.sort(y, axis=-1), "sorted"),
        (lambda y: jnp.fft.fft(y).real, "transformed as a whole"),
        (lambda y: jnp.linalg.qr(y, mode="r"), "no rule for this operation"),
        (lambda y: jnp.cumsum(y, axis=-1), "running over"),
    ],
    ids=["softmax", "exp", "sort", "fft", "unknown", "cumsum"],
)
def test_channels_that_are_mixed_unsoundly_are_frozen(
    mix: Callable[[jax.Array], jax.Array], reason: str
) -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return mix(x @ params["first"]) @ params["second"]

    params = {"first": jnp.ones((3, 8)), "second": jnp.ones((8, 5))}
    with jax.numpy_rank_promotion("allow"):
        trace = sculpt.trace(sculpt.from_function(apply, params), jnp.zeros((1, 3)))
    assert not trace.groups
    assert any(reason in f.reason for f in trace.frozen if f.name == "first:1")


def test_unknown_operation_names_itself_and_its_line() -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.linalg.qr(x @ params["w"])[0] @ params["v"]

    params = {"w": jnp.ones((3, 8)), "v": jnp.ones((2, 5))}
    trace = sculpt.trace(sculpt.from_function(apply, params), jnp.zeros((1, 3)))
    assert any("qr at test_trace.py" in f.reason for f in trace.frozen)


def test_axes_without_a_prunable_unit_say_so() -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = jnp.concatenate([x @ params["one"], x @ params["other"]], axis=-1)
        return jnp.tanh(y @ params["both"]) @ params["head"]

    shapes = {"one": (3, 1), "other": (3, 1), "both": (2, 6), "head": (6, 5), "idle": (4,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    trace = sculpt.trace(sculpt.from_function(apply, params), jnp.zeros((1, 3)))
    assert [g.size for g in trace.groups] == [6]
    reasons = {f.name: f.reason for f in trace.frozen}
    assert reasons["both:0"] == "single units side by side"
    assert reasons["idle:0"] == "not read in evaluation"
    assert reasons["one:1"] == "size one"


def test_the_line_is_the_user_s_own_wherever_it_lies(tmp_path: Path) -> None:
    """Not that of a library, and not missing because a folder is called like one."""
    folder = tmp_path / "jax" / "flax"
    folder.mkdir(parents=True)
    file = folder / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n\ndef f(params, x):\n    return jnp.sort(x @ params['w'], -1) @ params['b']\n"
    )
    names: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    model = sculpt.from_function(names["f"], {"w": jnp.ones((3, 6)), "b": jnp.ones((6, 5))})
    reasons = {row.name: row.reason for row in sculpt.trace(model, jnp.zeros((1, 3))).frozen}
    assert reasons["w:1"] == "sorted (sort at mine.py:4 (f))"


def _two_layers(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def _image_by_image(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda image: _two_layers(params, image), x)


def _against_the_first(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["a"])
    return (hidden + hidden[:1] - hidden.mean(0, keepdims=True)) @ params["b"]


def _over_steps(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Two steps are no two images."""

    def step(y: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.tanh(y @ params["a"]) @ params["c"], None

    return jax.lax.scan(step, x, None, 2)[0] @ params["d"]


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (_two_layers, 8 * 12 + 12 * 5),
        (_image_by_image, 8 * 12 + 12 * 5),
        (_against_the_first, 8 * 12 + 12 * 5),
        (_over_steps, 2 * (8 * 12 + 12 * 8) + 8 * 5),
    ],
)
def test_macs_are_those_of_one_image_however_the_batch_is_gone_through(
    function: Callable[..., jax.Array], macs: int
) -> None:
    shapes = {"a": (8, 12), "b": (12, 5), "c": (12, 8), "d": (8, 5)}
    model = sculpt.from_function(function, {name: jnp.ones(shape) for name, shape in shapes.items()})
    assert sculpt.trace(model, jnp.zeros((1, 8))).macs == macs


def test_what_is_drawn_in_evaluation_keeps_its_size() -> None:
    def noisy(params: dict[str, jax.Array], state: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ params["a"])
        noise = jax.random.normal(state["key"], hidden.shape)
        return jax.nn.relu((hidden + 0.1 * noise) @ params["b"]) @ params["c"]

    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 6)), "c": jnp.ones((6, 5))}
    trace = sculpt.trace(sculpt.from_function(noisy, params, {"key": jax.random.key(0)}), jnp.zeros((1, 3)))
    assert [group.size for group in trace.groups] == [6]
    assert "random numbers (random_bits at test_trace.py" in {f.name: f.reason for f in trace.frozen}["a:1"]


def test_what_cannot_be_trained_can_be_traced() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no training mode")

    params = {"a": jnp.ones((8, 12)), "b": jnp.ones((12, 5)), "idle": jnp.ones(3)}
    trace = sculpt.trace(sculpt.from_function(_two_layers, params, apply_train=fails), jnp.zeros((1, 8)))
    assert [group.size for group in trace.groups] == [12]
    assert {f.name: f.reason for f in trace.frozen}["idle:0"] == "not read in evaluation"


def test_reasons_for_an_operation_end_with_its_line() -> None:
    for name in NETWORKS:
        for row in traced(name).frozen:
            alone = ("network input", "network output", "size one", "single units side by side")
            for reason in row.reason.split("; "):
                assert reason in alone or re.search(r" \(\w+ at \w+\.py:\d+ \(.+\)\)$", reason), row


@pytest.mark.slow
def test_several_inputs_and_outputs() -> None:
    def apply(params: dict[str, jax.Array], x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        words = jnp.take(params["table"], x["tokens"], axis=0) * x["mask"][:, :, None]
        joint = jnp.tanh(words.sum(1) + x["image"] @ params["image"])
        return {"joint": joint @ params["head"], "mean": joint.mean(-1)}

    shapes = {"table": (7, 6), "image": (3, 6), "head": (6, 5)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    x = {"tokens": jnp.ones((4, 2), jnp.int32), "mask": jnp.ones((4, 2)), "image": jnp.ones((4, 3))}
    model = sculpt.from_function(apply, params)
    trace = sculpt.trace(model, x)
    assert [(g.size, len(g.slots)) for g in trace.groups] == [(6, 3)]
    with pytest.raises(ValueError, match="takes 3"):
        _ = trace.input_shape
    space = sculpt.make_space(trace)
    policy = space.num_options - 1
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, params, policy))
    small = sculpt.compact(masked, space, policy)

    def outputs(model: sculpt.Model) -> Any:
        inputs: Any = x
        return model(inputs)

    for expected, found in zip(*(jax.tree.leaves(outputs(m)) for m in (masked, small)), strict=True):
        assert expected.shape == found.shape and jnp.allclose(expected, found, atol=1e-5)


def test_what_cannot_be_trained_compact_is_refused() -> None:
    def train(params: dict[str, jax.Array], x: jax.Array, key: jax.Array) -> jax.Array:
        y = x @ params["first"]
        return (y / (1.0 + jnp.square(y.max(-1, keepdims=True)))) @ params["head"]

    params = {"first": jnp.ones((3, 8)), "head": jnp.ones((8, 5))}
    model = sculpt.from_function(
        lambda params, x: x @ params["first"] @ params["head"], params, apply_train=train
    )
    x = jnp.ones((2, 3))
    space = sculpt.make_space(sculpt.trace(model, x))
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, params, space.num_options - 1))
    small = sculpt.compact(masked, space, space.num_options - 1)
    with pytest.raises(ValueError, match="cannot do so in training mode: reduced over"):
        small.apply_train(small.params, small.state, x, jax.random.key(0))


def test_closed_over_parameters_are_refused() -> None:
    weights = jnp.ones((3, 5))
    model = sculpt.from_function(lambda params, x: x @ weights, {"unused": jnp.ones(2)})
    with pytest.raises(ValueError, match="closing over"):
        sculpt.trace(model, jnp.zeros((1, 3)))


def test_mutable_arrays_are_refused_wherever_they_are(tmp_path: Path) -> None:
    def straight(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        hidden = jax.new_ref(x @ params["first"])
        hidden[...] = jnp.tanh(hidden[...])
        return hidden[...] @ params["head"]

    def in_loop(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        total = jax.new_ref(jnp.zeros((x.shape[0], 8)))

        def add(_: jax.Array, carry: jax.Array) -> jax.Array:
            total[...] += x @ params["first"]
            return carry

        jax.lax.fori_loop(0, 3, add, jnp.zeros(()))
        return jax.freeze(total) @ params["head"]

    params, x = {"first": jnp.ones((3, 8)), "head": jnp.ones((8, 5))}, jnp.ones((2, 3))
    for function in (straight, in_loop):
        model = sculpt.from_function(function, params)
        line = rf"^expected a network .* mutable array \(jax.new_ref\) at test_trace.py:\d+ .*{function.__name__}"
        with pytest.raises(ValueError, match=line):
            sculpt.trace(model, x)
        with pytest.raises(ValueError, match=line):
            sculpt.save_model(model, tmp_path / "model", x)


def test_any_output_will_do_and_all_of_it_is_frozen() -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        hidden = x @ params["w"]
        return {"features": hidden, "logits": (hidden @ params["inner"]) @ params["head"]}

    params = {"w": jnp.ones((3, 6)), "inner": jnp.ones((6, 8)), "head": jnp.ones((8, 5))}
    trace = sculpt.trace(sculpt.from_function(apply, params), jnp.zeros((1, 3)))
    assert [g.size for g in trace.groups] == [8]


def test_correctness_14_graph_has_skip_edges_shapes_and_couplings() -> None:
    from sculpt.tracing.graph import EDGE_KINDS, topology

    trace = traced("residual")
    graph = topology(trace)
    kinds = [EDGE_KINDS[k] for k in graph.kinds]
    adds = [n for n in graph.nodes if n.kind == "add"]
    assert len(adds) == 3 and kinds.count("skip") >= 2 and kinds.count("skip") == kinds.count("skip back")
    assert [n.owner for n in graph.nodes if n.kind == "axis"] == [g.index for g in trace.groups]
    assert len([n for n in graph.nodes if n.kind in ("conv", "dense")]) == len(trace.layers)
    for sender, receiver, kind in zip(graph.senders, graph.receivers, kinds):
        if kind in ("flow", "skip"):
            assert graph.nodes[sender].depth < graph.nodes[receiver].depth


def test_linen_without_a_training_mode() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(5)(nn.relu(nn.Dense(8)(x)))

    module = Net()
    model = sculpt.from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 3))))
    assert [g.size for g in sculpt.trace(model, jnp.zeros((1, 3))).groups] == [8]

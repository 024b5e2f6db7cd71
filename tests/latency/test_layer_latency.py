"""Latency of layers under the options of a space: against a clock that is known, and by the real one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.ir.program import flatten
from sculpt.latency import layer_latency, layer_sizes
from sculpt.latency.layer_latency import LayerLatency, load_layers, measure_layers, save_layers
from sculpt.latency.layer_points import layers_of
from sculpt.latency.layer_sizes import find_parts
from sculpt.pruning.space import make_choices
from tests.networks import network, traced

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
SECONDS_PER_WEIGHT, OVERHEAD = 1e-6, 5e-3


def kernels(model: sculpt.Model) -> list[jax.Array]:
    """Those of convolutions and dense layers, not biases and normalisation."""
    return [w for w in jax.tree.leaves(model.params) if w.ndim > 1]


def seconds_of_weights(kernel: jax.Array) -> float:
    return SECONDS_PER_WEIGHT * kernel.size


def seconds_in_fours(kernel: jax.Array) -> float:
    """As long as it takes what computes its channels in fours, and the rest very slowly."""
    return SECONDS_PER_WEIGHT * kernel.size * (1.0 + kernel.shape[-2] % 4)


def left(name: str, space: sculpt.Space, policy: np.ndarray) -> sculpt.Model:
    model = network(name)
    masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
    return sculpt.compact(masked, space, policy, check=False)


def taking(seconds: float) -> SimpleNamespace:
    """A latency."""
    return SimpleNamespace(median=seconds, device="a machine", versions={"jaxlib": "1"})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which time is proportional to weights, but for each call of a whole network."""
    install_clock(monkeypatch, seconds_of_weights)


def install_clock(monkeypatch: pytest.MonkeyPatch, seconds_of: Callable[[jax.Array], float]) -> None:
    class Engine:
        package = "jaxlib"
        channels_first = True

        def prepare(self, model: sculpt.Model, x: np.ndarray, threads: int) -> float:
            assert jax.eval_shape(model, x).shape  # a layer that runs at that size
            return seconds_of(model.params["kernel"])

    def whole(models: dict[str, sculpt.Model], *_: object, **__: object) -> dict[str, SimpleNamespace]:
        return {
            name: taking(OVERHEAD + 2 * sum(map(seconds_of, kernels(model))))
            for name, model in models.items()
        }

    monkeypatch.setattr(layer_latency, "engine_of", lambda name: Engine())
    monkeypatch.setattr(layer_latency, "seconds_beside", lambda own, other, repeats: (own / other, other))
    monkeypatch.setattr(layer_latency, "compare_latency", whole)


@pytest.mark.parametrize(
    ("name", "families", "min_keep", "within"),
    [
        ("function", ("channels", "rect"), 1, 1e-4),
        ("concatenated", ("channels",), 0, 1e-4),
        pytest.param("residual", ("channels", "rect"), 0, 1e-4, marks=pytest.mark.slow),
        pytest.param("separable", ("channels", "rect"), 0, 1e-4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("clock")
@pytest.mark.slow
def test_layers_add_up_to_networks(
    name: str, families: tuple[str, ...], min_keep: int, within: float
) -> None:
    """Time proportional to weights is linear in every size: interpolation is exact, whatever a policy leaves."""
    space = sculpt.make_space(traced(name), families, min_keep=min_keep)
    found = measure_layers(
        network(name), space, X, jax.random.key(0), networks=5, all_sizes=name == "function"
    )
    np.testing.assert_allclose(found.predicted, found.measured, rtol=within)
    assert found.error.max() < within
    policies = np.asarray(sculpt.random_policies(space, jax.random.key(1), 5))
    for policy, seconds in zip(policies, found.seconds(space, policies)):
        layers = sum(map(seconds_of_weights, kernels(left(name, space, policy))))
        assert float(seconds) == pytest.approx(OVERHEAD + 2 * layers, rel=within)
    limited = sculpt.with_resource(space, found.resource)
    assert float(sculpt.cost(limited, np.zeros(space.num_sites, np.int32)).used) == pytest.approx(
        1.0, rel=1e-5
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_are_those_of_the_batch(batch: int) -> None:
    """Even where one image makes another program, as in a transformer: its class token is then not spread over the batch."""
    module = sculpt.nets.create("vit_tiny_patch2", 5, depth=1, width=16, heads=2, hidden=24)
    x = jnp.zeros((batch, 8, 8, 3))
    model = sculpt.from_linen(module, jax.eval_shape(module.init, jax.random.key(0), x))
    program = flatten(model.apply, model.params, model.state, jax.eval_shape(lambda: x))
    space = sculpt.make_space(sculpt.trace(model, x), ("channels",))
    dense = [list(layers_of(space, (), part, batch))[-1][1] for part in find_parts(space, batch)]
    layers = [e for e in program.equations if e.name in ("conv_general_dilated", "dot_general")]
    assert dense == [[program.shape(i) for i in layer.inputs] for layer in layers]


def test_all_sizes_are_more_points_where_they_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    space = sculpt.make_space(traced("function"), ("channels", "rect"))

    def numbers(**asked: bool) -> list[int]:
        return [len(part.points) for part in find_parts(space, 4, **asked)]

    coarse, full = numbers(), numbers(all_sizes=True)
    assert sum(full) > sum(coarse) and max(full) <= 600
    for limit in ("_POINTS", "_WORK"):
        with monkeypatch.context() as patched:
            patched.setattr(layer_sizes, limit, 1)
            assert numbers(all_sizes=True) == coarse


@pytest.mark.parametrize(
    ("entry", "stride", "padding"),
    [
        ((1, 1), 1, "((0, 0), (0, 0))"),
        ((0, 1), 1, "((1, -1), (0, 0))"),
        ((2, 1), 1, "((1, -1), (0, 0))"),
        ((0, 0), 2, "((1, -1), (1, -1))"),
        ((2, 0), 2, "((-1, 1), (1, -1))"),
    ],
)
def test_windows_are_where_the_model_has_them(entry: tuple[int, int], stride: int, padding: str) -> None:
    """One entry at the centre is a matrix product, one at the edge, of whichever side, is none: unless every other is left out, mirror
    images take the same time."""

    def apply(params: jax.Array, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        found = jax.lax.conv_general_dilated(
            x, params, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
        )
        return found.mean((1, 2))

    kernel = jnp.full((3, 3, 3, 4), 0.1).at[entry].set(1.0)
    space = sculpt.make_space(sculpt.trace(sculpt.from_function(apply, kernel), X[:1]), "rect")
    (part,) = find_parts(space, 1)
    layers = dict(zip(part.points, layers_of(space, make_choices(space, kernel), part, 1)))
    _, shapes, params = layers[1, 1]
    assert shapes[1] == (1, 1, 3, 4)
    assert repr(tuple(map(tuple, params["padding"]))) == padding


@pytest.mark.usefixtures("clock")
@pytest.mark.slow
def test_what_was_disturbed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    space = sculpt.make_space(traced("plain"))
    expected = measure_layers(network("plain"), space, X, jax.random.key(0), networks=3)
    calls = 0

    def beside(own: float, other: float, repeats: int) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        slower = 3.0 if calls in (2, 5) else 1.0
        return own / (slower * other), slower * other

    monkeypatch.setattr(layer_latency, "seconds_beside", beside)
    found = measure_layers(network("plain"), space, X, jax.random.key(0), networks=3)
    np.testing.assert_allclose(found.resource.values, expected.resource.values, rtol=1e-6)


@pytest.mark.usefixtures("clock")
@pytest.mark.slow
def test_it_is_of_the_options_that_were_measured() -> None:
    space, other = (sculpt.make_space(traced("plain"), "channels", round_to) for round_to in (1, 4))
    found = measure_layers(network("plain"), space, X, jax.random.key(0), networks=3)
    assert found.is_of(space) and not found.is_of(other)


@pytest.mark.usefixtures("clock")
def test_a_file_keeps_it(tmp_path: Path) -> None:
    space = sculpt.make_space(traced("plain"))
    found = measure_layers(network("plain"), space, X, jax.random.key(0), networks=3)
    save_layers(found, tmp_path / "layers.safetensors")
    again = load_layers(tmp_path / "layers.safetensors")
    assert isinstance(again, LayerLatency) and again.versions == found.versions
    assert re.fullmatch(
        r"LayerLatency\(xla, batch 4, .* 3 networks predicted within .*% at the most\)", repr(again)
    )
    with pytest.raises(ValueError, match=r"expected a resource, got LayerLatency: give its \.resource"):
        sculpt.with_resource(space, again)  # type: ignore[arg-type]
    policies = np.asarray(sculpt.random_policies(space, jax.random.key(1), 5))
    np.testing.assert_array_equal(again.seconds(space, policies), found.seconds(space, policies))
    np.testing.assert_array_equal(again.error, found.error)
    sculpt.save_params({"a": np.zeros(3)[None].astype(np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no latency of layers"):
        load_layers(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_a_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few samples of so small networks may have any slope.
    for fit in ("_line", "_line_through_first"):
        monkeypatch.setattr(layer_latency, fit, lambda sums, seconds: np.asarray([0.0, 1.0]))
    space = sculpt.make_space(traced("function"), ("channels",))
    told: list[tuple[int, int]] = []
    found = measure_layers(
        network("function"),
        space,
        X,
        jax.random.key(0),
        networks=3,
        repeats=1,
        on_progress=lambda *at: told.append(at),
    )
    assert np.isfinite(found.resource.values).all() and (found.measured > 0).all()
    assert found.engine == "xla" and found.batch == len(X) and "jaxlib" in found.versions
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] == len(told) - 1
    limited = sculpt.with_resource(space, found.resource)
    assert limited.resource.name == "latency (xla, batch 4)"


def test_refusals() -> None:
    space = sculpt.make_space(traced("plain"))
    with pytest.raises(ValueError, match="networks must be a whole number of at least 3, got 2"):
        measure_layers(network("plain"), space, X, jax.random.key(0), networks=2)
    with pytest.raises(ValueError, match="engine must be one of"):
        measure_layers(network("plain"), space, X, jax.random.key(0), engine="tensorrt")
    with pytest.raises(ValueError, match=r"expected an example input float32\[batch, 8, 8, 3\].*got float32"):
        measure_layers(network("plain"), space, X[:, :4], jax.random.key(0))
    with pytest.raises(ValueError, match=r"got float32\[0, 8, 8, 3\]"):
        measure_layers(network("plain"), space, X[:0], jax.random.key(0))
    with pytest.raises(ValueError, match="got int32"):
        measure_layers(network("plain"), space, X.astype(np.int32), jax.random.key(0))
    zeros = sculpt.make_space(traced("plain"), ("2:4",))
    with pytest.raises(ValueError, match="no option of the families 2:4 makes a layer smaller"):
        measure_layers(network("plain"), zeros, X, jax.random.key(0))
    with pytest.raises(ValueError, match="parameters"):
        measure_layers(network("residual"), space, X, jax.random.key(0))


@pytest.mark.usefixtures("clock")
def test_a_machine_that_is_busy_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(models: dict[str, sculpt.Model], *_: object, **__: object) -> dict[str, SimpleNamespace]:
        return {
            name: taking(1.0 / sum(map(seconds_of_weights, kernels(model)))) for name, model in models.items()
        }

    monkeypatch.setattr(layer_latency, "compare_latency", slower)
    space = sculpt.make_space(traced("plain"), ("channels",))
    with pytest.raises(ValueError, match="do not hang together: leave the machine"):
        measure_layers(network("plain"), space, X, jax.random.key(0), networks=4)


@pytest.mark.usefixtures("clock")
@pytest.mark.slow
def test_filters_in_groups_take_the_time_of_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine on which time is proportional to multiply-accumulates."""

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(nn.Conv(32, (3, 3))(x))
            x = nn.relu(nn.Conv(48, (3, 3), use_bias=False)(x))
            return nn.Dense(5)(x.mean((1, 2)))

    def macs(model: sculpt.Model, x: np.ndarray) -> float:
        return float(sculpt.count_cost(model, x)[0])

    class Engine:
        package, channels_first = "jaxlib", False

        def prepare(self, model: sculpt.Model, x: np.ndarray, threads: int) -> float:
            return macs(model, x)

    def whole(models: dict[str, sculpt.Model], x: np.ndarray, *_: object, **__: object) -> object:
        return {name: taking(OVERHEAD + 3 * macs(model, x)) for name, model in models.items()}

    monkeypatch.setattr(layer_latency, "engine_of", lambda name: Engine())
    monkeypatch.setattr(layer_latency, "compare_latency", whole)
    module = Wide()
    model = sculpt.from_linen(module, module.init(jax.random.key(0), X[:1]))
    space = sculpt.make_space(sculpt.trace(model, X[:1]), ("rect_grouped",))
    found = measure_layers(model, space, X, jax.random.key(0), networks=6)
    assert found.error.max() < 1e-4 and np.ptp(found.measured) > 0.3 * found.measured[0]
    limited = sculpt.with_resource(space, found.resource)
    assert limited.reachable[0] < 0.5


class DenseBlock(nn.Module):
    """Every layer has all layers before it behind one another."""

    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            x = jnp.concatenate([x, nn.relu(nn.Conv(8, (1, 1), use_bias=False)(x))], -1)
        return nn.Dense(5)(x.mean((1, 2)))


def dense_block(layers: int) -> tuple[sculpt.Model, sculpt.Space]:
    module = DenseBlock(layers)
    model = sculpt.from_linen(module, module.init(jax.random.key(0), X[:1]))
    return model, sculpt.make_space(sculpt.trace(model, X[:1]), ("channels",))


@pytest.mark.slow
def test_numbers_of_channels_that_no_site_leaves_by_itself_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of 3 + 8 + 8 + 8 channels fewer may be any number: between those of the grid lie slower ones."""
    install_clock(monkeypatch, seconds_in_fours)
    model, space = dense_block(3)
    found = measure_layers(model, space, X, jax.random.key(0), networks=5)
    policies = np.asarray(sculpt.random_policies(space, jax.random.key(1), 20))
    for policy, seconds in zip(policies, found.seconds(space, policies)):
        masked = sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy))
        small = sculpt.compact(masked, space, policy, check=False)
        assert float(seconds) == pytest.approx(
            OVERHEAD + 2 * sum(map(seconds_in_fours, kernels(small))), rel=1e-4
        )


@pytest.mark.slow
def test_so_many_sizes_at_the_most() -> None:
    _, space = dense_block(12)
    parts = find_parts(space, 1)
    last = parts[-1]
    assert len(last.dimensions[0].sizes) == 1 + 12 * 7
    assert len(last.dimensions[0].examples) == 64 and len(last.points) <= 8 + 64
    assert max(len(part.points) for part in parts) <= 8 * 8 + 3 * 64


@pytest.mark.slow
def test_axes_of_many_sites_are_told_apart_by_their_sum() -> None:
    """As behind a dense block's concatenations, where all combinations of options are too many."""
    _, space = dense_block(12)
    last = find_parts(space, 1)[-1]
    policy = np.asarray(sculpt.random_policies(space, jax.random.key(1), 1))[0]
    (dimension,) = last.dimensions
    place = sum(own[policy[site]] for site, own in last.steps.items())
    kept = sum(site.options[policy[site.index]].counts[0] for site in space.sites)
    assert dimension.sizes[place] == 3 + kept and len(dimension.sizes) == 1 + 12 * 7

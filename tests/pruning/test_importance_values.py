"""Scores of small hand-made functions against numbers derived in numpy, straight from the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt

RNG = np.random.default_rng(0)
Arrays = dict[str, np.ndarray]


def arrays(**shapes: tuple[int, ...]) -> Arrays:
    """Normal numbers, each array of another scale, so that a missing normalisation shows."""
    return {n: (3.0**i * RNG.normal(size=s)).astype(np.float32) for i, (n, s) in enumerate(shapes.items())}


def scores_of(
    function: Callable[..., jax.Array], params: Arrays, kind: str, x: np.ndarray, **options: Any
) -> dict[str, np.ndarray]:
    """Group name -> scores."""
    model = sculpt.from_function(function, jax.tree.map(jnp.asarray, params))
    trace = sculpt.trace(model, jnp.asarray(x[:1]))
    result = sculpt.importance(model, trace, kind, images=x, **options)
    return dict(zip(result.groups, result.scores, strict=True))


def close(found: np.ndarray, expected: Any) -> None:
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, rtol=2e-5)


MLP = {**arrays(a=(3, 4), b=(4, 5)), **arrays(bias=(4,))}
POINTS = RNG.normal(size=(5, 3)).astype(np.float32)


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.maximum(x @ p["a"] + p["bias"][None, :], 0.0) @ p["b"]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("energy", lambda v: np.square(v).sum()),
        ("l1", lambda v: np.abs(v).sum()),
        ("l2", lambda v: np.sqrt(np.square(v).sum())),
    ],
)
def test_magnitudes_are_shares_of_every_kernel(kind: str, size: Callable[[np.ndarray], float]) -> None:
    found = scores_of(mlp, MLP, kind, POINTS)["a"]
    first = np.asarray([size(MLP["a"][:, u]) for u in range(4)])
    second = np.asarray([size(MLP["b"][u]) for u in range(4)])
    close(found, first / first.sum() + second / second.sum())


def test_geometric_median_is_the_sum_of_distances_to_all_others() -> None:
    found = scores_of(mlp, MLP, "geometric_median", POINTS)["a"]
    first, second = (w / np.sqrt(np.square(w).sum()) for w in (MLP["a"], MLP["b"]))
    units = [[*first[:, u], *second[u]] for u in range(4)]
    close(found, [sum(np.sqrt(sum((i - j) ** 2 for i, j in zip(u, v))) for v in units) for u in units])


def test_geometric_median_drops_the_unit_in_the_middle_not_the_smallest() -> None:
    params = {"a": np.asarray([[0.0, 1.0, 2.0, 3.0, 4.0]] * 3, np.float32), "b": np.ones((5, 2), np.float32)}
    found = scores_of(lambda p, x: x @ p["a"] @ p["b"], params, "geometric_median", POINTS)["a"]
    assert found.argsort().tolist()[0] == 2 and found[0] == found.max()


def test_geometric_median_of_a_flattened_axis_compares_like_with_like() -> None:
    """A unit of the flattened axis is one index per position; positions must not be mixed up between units."""
    params = arrays(a=(3, 4), b=(8, 5))

    def function(p: Any, x: jax.Array) -> jax.Array:
        y = jnp.einsum("nsc,cd->nsd", x, p["a"])
        return y.reshape(y.shape[0], -1) @ p["b"]

    found = scores_of(function, params, "geometric_median", np.ones((2, 2, 3), np.float32))["a"]
    first, second = (w / np.sqrt(np.square(w).sum()) for w in (params["a"], params["b"]))
    units = np.stack([np.concatenate([first[:, u], second[u], second[4 + u]]) for u in range(4)])
    close(found, [sum(np.linalg.norm(u - v) for v in units) for u in units])


def test_taylor_is_the_mean_over_batches_of_weight_times_gradient() -> None:
    labels = np.asarray([0, 4, 2, 2, 1])
    found = scores_of(mlp, MLP, "taylor", POINTS, labels=labels, images_per_batch=2)["a"]
    expected = np.zeros(4)
    for batch in ([0, 1], [2, 3], [4]):
        x, wanted = POINTS[batch].astype(np.float64), np.eye(5)[labels[batch]]
        before = x @ MLP["a"] + MLP["bias"]
        hidden = np.maximum(before, 0)
        odds = np.exp(hidden @ MLP["b"] - (hidden @ MLP["b"]).max(axis=1, keepdims=True))
        out = (odds / odds.sum(axis=1, keepdims=True) - wanted) / len(batch)
        inner = (out @ MLP["b"].T) * (before > 0)
        change = np.abs(MLP["a"] * (x.T @ inner)).sum(axis=0)
        change += np.abs(MLP["bias"] * inner.sum(axis=0))
        change += np.abs(MLP["b"] * (hidden.T @ out)).sum(axis=1)
        expected += change * len(batch) / len(labels)
    close(found, expected)


def test_taylor_scores_units_that_are_zero_as_zero_where_their_gradient_is_undefined() -> None:
    def function(params: Any, x: jax.Array) -> jax.Array:
        kernel = params["a"] / (jnp.linalg.norm(params["a"], axis=0, keepdims=True) + 1e-6)
        return jax.nn.relu(x @ kernel + params["bias"][None]) @ params["b"]

    params = {**MLP, "a": MLP["a"] * (np.arange(4) > 0), "bias": MLP["bias"] * (np.arange(4) > 0)}
    params["b"] = MLP["b"] * (np.arange(4) > 0)[:, None]
    found = scores_of(function, params, "taylor", POINTS, labels=np.asarray([0, 4, 2, 2, 1]))["a"]
    assert found[0] == 0 and (found[1:] > 0).any()


@pytest.mark.slow
def test_taylor_runs_in_evaluation_mode_over_all_arrays_of_the_group() -> None:
    from tests.networks import network, traced

    model, trace = network("plain"), traced("plain")
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    labels = np.asarray([1, 0, 3])
    wanted = jax.nn.one_hot(labels, 5)

    def loss(params: Any) -> jax.Array:
        return -(wanted * jax.nn.log_softmax(model.apply(params, model.state, images))).sum() / 3

    gradient = jax.grad(loss)(model.params)
    change = jax.tree.map(lambda w, g: np.abs(np.asarray(w) * np.asarray(g)), model.params, gradient)
    expected = change["Conv_1"]["kernel"].sum((0, 1, 2)) + change["Dense_0"]["kernel"].sum(1)
    expected += change["BatchNorm_1"]["scale"] + change["BatchNorm_1"]["bias"]
    result = sculpt.importance(model, trace, "taylor", images=images, labels=labels)
    np.testing.assert_allclose(result.scores[result.groups.index("Conv_1")], expected, rtol=1e-4)


def shares(entries: np.ndarray, axis: int) -> np.ndarray:
    """Sums over all axes but one, divided by the total."""
    sums = np.moveaxis(np.abs(entries), axis, 0).reshape(entries.shape[axis], -1).sum(axis=1)
    return sums / sums.sum()


def norms(x: np.ndarray) -> np.ndarray:
    """L2 norms of the last axis' channels over all others."""
    return np.sqrt(np.square(x.reshape(-1, x.shape[-1]).astype(np.float64)).sum(axis=0))


@pytest.mark.parametrize("images_per_batch", [1, 2, 3, 4, 64])
def test_activation_is_weight_times_norm_of_its_input_however_batched(images_per_batch: int) -> None:
    found = scores_of(mlp, MLP, "activation", POINTS, images_per_batch=images_per_batch)["a"]
    hidden = np.maximum(POINTS @ MLP["a"] + MLP["bias"], 0)
    assert 0.2 < (hidden > 0).mean() < 0.8
    first = MLP["a"] * norms(POINTS)[:, None]
    second = MLP["b"] * norms(hidden)[:, None]
    close(found, shares(first, 1) + shares(second, 0))


def test_activation_through_convolutions_with_stride_and_feature_groups() -> None:
    """Kernels laid out as OIHW, images as NHWC."""
    params = arrays(a=(4, 3, 3, 3), b=(6, 2, 1, 1), c=(6, 5))
    dims = ("NHWC", "OIHW", "NHWC")
    x = RNG.normal(size=(3, 5, 5, 3)).astype(np.float32)

    def first(p: Any, x: Any) -> jax.Array:
        return jax.nn.relu(jax.lax.conv_general_dilated(x, p["a"], (2, 2), "SAME", dimension_numbers=dims))

    def function(p: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            first(p, x), p["b"], (1, 1), "SAME", dimension_numbers=dims, feature_group_count=2
        )
        return y.mean((1, 2)) @ p["c"]

    found = scores_of(function, params, "activation", x)
    y = np.asarray(first(params, x))
    # Output o of the second convolution reads inputs 2 * (o // 3) and the next.
    z = np.stack(
        [(y[..., 2 * (o // 3) : 2 * (o // 3) + 2] * params["b"][o, :, 0, 0]).sum(-1) for o in range(6)], -1
    )
    a = params["a"] * norms(x)[None, :, None, None]
    b = np.stack([params["b"][o, :, 0, 0] * norms(y)[2 * (o // 3) : 2 * (o // 3) + 2] for o in range(6)])
    c = params["c"] * norms(z.mean((1, 2)))[:, None]
    # Units of a grouped convolution: its feature groups, inputs of a group, outputs of a group.
    per_input, total = np.abs(a).sum((1, 2, 3)) / np.abs(a).sum(), np.abs(b).sum()
    outer = [per_input[2 * g : 2 * g + 2].sum() + np.abs(b[3 * g : 3 * g + 3]).sum() / total for g in (0, 1)]
    outer += shares(c.reshape(2, 3, 5), 0)
    inner = per_input.reshape(2, 2).sum(0) + shares(b, 1)
    last = shares(b.reshape(2, 3, 2), 1) + shares(c.reshape(2, 3, 5), 1)
    by_size = sorted(found.values(), key=lambda s: (len(s), s.tolist()))
    expected = sorted(map(np.asarray, (outer, inner, last)), key=lambda s: (len(s), s.tolist()))
    for f, e in zip(by_size, expected, strict=True):
        close(f, e)


def test_activation_through_products_of_any_layout() -> None:
    """A transposed kernel, and one that sums over two axes at once, given as the first operand."""
    params = arrays(a=(6, 3), b=(5, 3, 2))

    def function(p: Any, x: jax.Array) -> jax.Array:
        y = (x @ p["a"].T).reshape(-1, 2, 3)
        return jnp.einsum("kdh,nhd->nk", p["b"], y)

    found = scores_of(function, params, "activation", POINTS)
    y = (POINTS @ params["a"].T).reshape(-1, 2, 3)
    a = (params["a"] * norms(POINTS)[None, :]).reshape(2, 3, 3)
    b = params["b"] * np.sqrt(np.square(y.astype(np.float64)).sum(0)).T[None]
    heads, dims = shares(a, 0) + shares(b, 2), shares(a, 1) + shares(b, 1)
    for f, e in zip(sorted(found.values(), key=len), (heads, dims), strict=True):
        close(f, e)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, lambda f: f])
def test_activation_inside_scans_and_rematerialised_regions(wrap: Callable[..., Any]) -> None:
    """Every step has kernels of its own, and units go in all steps alike."""
    params = arrays(up=(2, 3, 4), down=(2, 4, 3), head=(3, 5))

    def function(p: Any, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return x + wrap(lambda x, up, down: jax.nn.relu(x @ up) @ down)(x, w["up"], w["down"]), None

        x, _ = jax.lax.scan(block, x, {"up": p["up"], "down": p["down"]})
        return x @ p["head"]

    found = scores_of(function, params, "activation", POINTS)
    x, ups, downs = POINTS, [], []
    for up, down in zip(params["up"], params["down"]):
        hidden = np.maximum(x @ up, 0)
        ups.append(up * norms(x)[:, None])
        downs.append(down * norms(hidden)[:, None])
        x = x + hidden @ down
    (score,) = (s for s in found.values() if len(s) == 4)
    close(score, shares(np.stack(ups), 2) + shares(np.stack(downs), 1))


def test_activation_of_layers_that_are_not_observed_is_their_magnitude() -> None:
    params = arrays(a=(3, 4), b=(4, 5))

    def function(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, lambda x: x @ p["a"] @ p["b"], lambda x: x @ p["a"] @ p["b"], x)

    found = scores_of(function, params, "activation", POINTS)
    magnitude = scores_of(function, params, "l1", POINTS)
    (score,) = found.values()
    close(score, shares(params["a"], 1) + shares(params["b"], 0))
    close(score, next(iter(magnitude.values())))


def test_batch_norm_is_the_share_of_every_vector_that_multiplies_and_energy_without_one() -> None:
    """Names say nothing here; additions do not count, a scale inside a scan does."""
    params = arrays(a=(3, 4), u=(4,), v=(4,), w=(4,), b=(4, 6), c=(6, 5))

    def function(p: Any, x: jax.Array) -> jax.Array:
        y = x @ p["a"] * p["u"].reshape(1, 4) + p["v"][None, :]
        y = jax.nn.relu(y) * jnp.broadcast_to(p["w"], y.shape)
        return jnp.tanh(y @ p["b"]) @ p["c"]

    found = scores_of(function, params, "batch_norm", POINTS)
    close(found["a"], shares(params["u"], 0) + shares(params["w"], 0))
    close(found["b"], scores_of(function, params, "energy", POINTS)["b"])


def test_batch_norm_finds_scales_inside_scans_and_rematerialised_regions() -> None:
    params = arrays(up=(2, 3, 4), scale=(2, 4), shift=(2, 4), down=(2, 4, 3), head=(3, 5))

    def function(p: Any, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            scaled = jax.checkpoint(lambda y: y * w["scale"][None, :] + w["shift"][None, :])(x @ w["up"])
            return x + jax.nn.relu(scaled) @ w["down"], None

        x, _ = jax.lax.scan(block, x, {n: p[n] for n in ("up", "scale", "shift", "down")})
        return x @ p["head"]

    (score,) = (s for s in scores_of(function, params, "batch_norm", POINTS).values() if len(s) == 4)
    close(score, shares(params["scale"], 1))

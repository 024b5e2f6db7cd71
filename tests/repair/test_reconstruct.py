"""Reconstruction: against least squares worked out here, on every structure of network, and what it leaves alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.model import Model
from sculpt.repair import linear_layers
from sculpt.repair.reconstruction import BRIEF, RIDGE, _reconstructed
from tests.architectures.architecture import from_linen
from tests.networks import NETWORKS, network, traced

IMAGES = jax.random.normal(jax.random.key(2), (48, 8, 8, 3))


def outputs(model: Model, x: Any = IMAGES) -> np.ndarray:
    return np.asarray(model.apply(model.params, model.state, x), np.float64)


def distance(model: Model, other: Model) -> float:
    return float(np.square(outputs(model) - outputs(other)).mean())


@functools.cache
def pruned(name: str, families: tuple[str, ...]) -> tuple[Any, Model]:
    """Masks of about half of the MACs, and the masked network."""
    model, space = network(name), sculpt.make_space(traced(name), families)
    policy = sculpt.uniform_policy(space, max(0.5, space.reachable[0] + 0.01))
    masks = sculpt.make_masks(space, model.params, policy)
    return masks, sculpt.apply_masks(model, masks)


QUICK = ("residual", "separable", "biased")


@pytest.mark.parametrize(
    ("name", "families"),
    [
        pytest.param(name, ("channels", "rect"), marks=() if name in QUICK else pytest.mark.slow)
        for name in NETWORKS
    ]
    + [("residual", ("rect_grouped",)), ("residual", ("2:4",)), ("function", ("unstructured",))],
)
@pytest.mark.slow
def test_logits_come_closer_and_zeros_stay(name: str, families: tuple[str, ...]) -> None:
    masks, masked = pruned(name, families)
    fitted = sculpt.reconstruct(network(name), masks, IMAGES)
    for weights, mask in zip(*map(jax.tree.leaves, (fitted.params, masks))):
        assert not np.asarray(weights)[~np.asarray(mask)].any()
    assert distance(network(name), fitted) < 0.7 * distance(network(name), masked)


@pytest.mark.parametrize("shape", ["dense", "transposed", "heads", "conv"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.fast("True-heads", "False-dense", "False-transposed")
def test_one_layer_is_ridge_regression(shape: str, bias: bool) -> None:
    """Against NumPy's least squares on rows written out here."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5, 6, 4)).astype(np.float32)
    kernels = {"dense": (4, 6), "transposed": (6, 4), "heads": (4, 2, 3), "conv": (3, 2, 4, 6)}
    kernel = rng.normal(size=kernels[shape]).astype(np.float32)
    mask = np.ones(kernel.shape, bool)
    inputs = {"dense": 0, "transposed": 1, "heads": 0, "conv": 2}[shape]
    np.moveaxis(mask, inputs, 0)[1] = False

    def layer(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        if shape == "conv":
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                x, params["kernel"], (2, 1), ((1, 1), (0, 1)), dimension_numbers=dims
            )
        else:
            rule = {"dense": "nhwi,io->nhwo", "transposed": "nhwi,oi->nhwo", "heads": "nhwi,iab->nhwab"}
            y = jnp.einsum(rule[shape], x, params["kernel"])
        return y + jnp.reshape(params["bias"], (1, 1, 1, *params["bias"].shape)) if bias else y

    params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((2, 3) if shape == "heads" else 6)}
    params = params if bias else {"kernel": params["kernel"]}
    # Inputs hang together, so that those that stay tell something of the one that goes.
    x = x @ rng.normal(size=(4, 4)).astype(np.float32)
    model = sculpt.from_function(layer, params)
    masks = {"kernel": mask, **({"bias": np.ones(params["bias"].shape, bool)} if bias else {})}
    ridge = 1e-2
    fitted = sculpt.reconstruct(model, masks, x, ridge=ridge)

    if shape == "conv":
        padded = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
        rows = np.stack(
            [padded[:, i : i + 3, j : j + 2].reshape(40, -1) for i in (0, 2, 4) for j in range(6)], 1
        ).reshape(-1, 24)
        flat, kept = kernel.reshape(24, 6), mask.reshape(24, 6)[:, 0]
    else:
        rows = x.reshape(-1, 4)
        flat = kernel.T if shape == "transposed" else kernel.reshape(4, 6)
        kept = mask[0] if shape == "transposed" else mask.reshape(4, 6)[:, 0]
    rows = rows.astype(np.float64)
    missing = rows[:, ~kept] @ flat[~kept]
    left = rows[:, kept]
    if bias:
        left, missing = left - left.mean(0), missing - missing.mean(0)
    penalty = np.sqrt(ridge * np.square(left).sum() / left.shape[1]) * np.eye(left.shape[1])
    change = np.linalg.lstsq(
        np.concatenate([left, penalty]), np.concatenate([missing, np.zeros((len(penalty), 6))]), rcond=None
    )[0]
    found = np.asarray(fitted.params["kernel"], np.float64)
    found = found.T if shape == "transposed" else found.reshape(flat.shape)
    np.testing.assert_allclose(found[kept], flat[kept] + change, rtol=1e-3, atol=1e-4)
    assert np.abs(change).max() > 0.01
    if bias:
        shift = (rows @ flat - rows[:, kept] @ found[kept]).mean(0)
        np.testing.assert_allclose(np.ravel(fitted.params["bias"]), shift, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_copies_of_what_stays_are_made_up_for() -> None:
    """Every channel is there twice, and one of each two goes: nothing is lost."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            for _ in range(2):
                x = nn.Conv(8, (3, 3))(x)
                x = nn.tanh(nn.BatchNorm(use_running_average=not train)(x))
            return nn.Dense(5)(x.mean((1, 2)))

    model = from_linen(Twice())(jax.random.key(0))
    trace = sculpt.trace(model, IMAGES)
    leaves, structure = jax.tree.flatten(model.params)
    masks = [np.ones(leaf.shape, bool) for leaf in leaves]
    for group in trace.groups:
        for leaf, axis in group.slots:
            array, mask = np.asarray(leaves[leaf]).copy(), masks[leaf]
            produces = any(layer.leaf == leaf and axis in layer.out_axes for layer in trace.layers)
            first, second = (np.moveaxis(array, axis, 0)[start::2] for start in (0, 1))
            if produces or array.ndim == 1:
                second[...] = first
            np.moveaxis(mask, axis, 0)[1::2] = False
            leaves[leaf] = jnp.asarray(array)
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf[::2], 2), model.state)
    model = model.replace(params=jax.tree.unflatten(structure, leaves), state=state)
    fitted = sculpt.reconstruct(model, jax.tree.unflatten(structure, masks), IMAGES, ridge=1e-6)
    assert distance(model, fitted) < 1e-6 * np.square(outputs(model)).mean()


@pytest.mark.slow
def test_weights_that_are_read_twice_stay_as_masked() -> None:
    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["shared"]) @ params["shared"].T @ params["own"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"shared": jax.random.normal(keys[0], (6, 8)), "own": jax.random.normal(keys[1], (6, 4))}
    model, x = sculpt.from_function(apply, params), jax.random.normal(keys[2], (50, 6))
    masks = {"shared": np.arange(8)[None] % 2 * np.ones((6, 1)) > 0, "own": np.ones((6, 4), bool)}
    fitted = sculpt.reconstruct(model, masks, x)
    np.testing.assert_array_equal(fitted.params["shared"], np.where(masks["shared"], params["shared"], 0.0))
    assert (fitted.params["own"] != params["own"]).any()


def test_activations_that_are_not_finite_are_named() -> None:
    model = sculpt.from_function(lambda p, x: jnp.log(x) @ p["w"], {"w": jnp.ones((4, 3))})
    with pytest.raises(ValueError, match=r"layer w.* not finite"):
        sculpt.reconstruct(model, {"w": np.ones((4, 3), bool)}, jnp.zeros((8, 4)))


@pytest.mark.slow
def test_huge_kernels_stay_as_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"large": jax.random.normal(keys[0], (6, 9)), "small": jax.random.normal(keys[1], (9, 4))}
    masks = {name: np.arange(w.shape[0])[:, None] % 2 * np.ones(w.shape) > 0 for name, w in params.items()}
    x = jax.random.normal(keys[2], (40, 6))
    monkeypatch.setattr(linear_layers, "_MOST_WEIGHTS", 40)
    fitted = sculpt.reconstruct(
        sculpt.from_function(lambda p, x: jnp.tanh(x @ p["large"]) @ p["small"], params), masks, x
    ).params
    np.testing.assert_array_equal(fitted["large"], np.where(masks["large"], params["large"], 0.0))
    assert (fitted["small"] != np.where(masks["small"], params["small"], 0.0)).any()


def test_no_array_of_the_size_of_a_kernel_is_written_into_the_program() -> None:
    params = {"kernel": jnp.ones((3, 3, 32, 64)), "head": jnp.ones((64, 500))}

    def network(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        return y.mean((1, 2)) @ p["head"]

    masks = jax.tree.map(lambda w: np.ones(w.shape, bool), params)
    lowered = _reconstructed.lower(
        lambda p, state, x: network(p, x),
        BRIEF,
        params,
        {},
        masks,
        jnp.ones((8, 6, 6, 32)),
        jnp.float32(RIDGE),
    )
    assert len(lowered.as_text()) < 100_000


def test_the_first_layer_that_is_not_finite_is_named() -> None:
    model = sculpt.from_function(
        lambda p, x: jax.nn.relu(jnp.sqrt(x) @ p["z"]["k"]) @ p["a"]["k"],
        {"z": {"k": jnp.ones((4, 3))}, "a": {"k": jnp.ones((3, 2))}},
    )
    with pytest.raises(ValueError, match="layer z reads or gives numbers that are not finite"):
        sculpt.reconstruct(
            model, jax.tree.map(lambda w: np.ones(w.shape, bool), model.params), -jnp.ones((8, 4))
        )


@pytest.mark.parametrize("kind", ["checkpoint", "custom_vjp"])
@pytest.mark.slow
def test_layers_with_a_backward_pass_of_their_own_are_fitted(kind: str) -> None:
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w)

    wrapped: Any = jax.checkpoint(layer)
    if kind == "custom_vjp":
        wrapped = jax.custom_vjp(layer)
        wrapped.defvjp(lambda x, w: (layer(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"first": jax.random.normal(keys[0], (6, 8)), "second": jax.random.normal(keys[1], (8, 4))}
    x = jax.random.normal(keys[2], (60, 6))
    masks = {
        "first": np.arange(8)[None] % 2 * np.ones((6, 1)) > 0,
        "second": np.arange(8)[:, None] % 2 * np.ones(4) > 0,
    }
    fitted = [
        sculpt.reconstruct(
            sculpt.from_function(lambda p, x, f=f: f(f(x, p["first"]), p["second"]), params), masks, x
        )
        for f in (layer, wrapped)
    ]
    np.testing.assert_allclose(fitted[0].params["second"], fitted[1].params["second"], rtol=1e-5, atol=1e-5)
    assert (np.asarray(fitted[1].params["second"])[1::2] != np.asarray(params["second"])[1::2]).all()


def test_a_mean_is_not_moved_into_a_bias_that_another_output_lacks() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jax.random.normal(keys[0], (6, 4)), "b": jnp.zeros(4)}
    model = sculpt.from_function(lambda p, x: (x @ p["w"] + p["b"][None], x @ p["w"]), params)
    both = sculpt.from_function(lambda p, x: ((y := x @ p["w"]) + p["b"][None], y), params)
    x = 1.0 + jax.random.normal(keys[1], (50, 6))
    masks = {"w": np.arange(6)[:, None] % 2 * np.ones(4) > 0, "b": np.ones(4, bool)}
    assert not np.asarray(sculpt.reconstruct(both, masks, x).params["b"]).any()
    assert (
        sculpt.reconstruct(model, masks, x).params["w"] == sculpt.apply_masks(model, masks).params["w"]
    ).all()


@pytest.mark.slow
def test_nothing_pruned_changes_nothing() -> None:
    model = network("residual")
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), model.params)
    fitted = sculpt.reconstruct(model, masks, IMAGES)
    assert distance(model, fitted) <= 1e-10


@pytest.mark.slow
def test_attention_and_loops() -> None:
    """What is inside a loop is masked and left; the layers around it are fitted."""

    class Looped(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.Dense(16)(x.reshape(len(x), -1, 3))
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            weights = self.param("loop", nn.initializers.lecun_normal(), (2, 16, 16))
            x, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, weights)
            return nn.Dense(5)(x.mean(1))

    model = from_linen(Looped())(jax.random.key(0))
    space = sculpt.make_space(sculpt.trace(model, IMAGES), ("channels",))
    masks = sculpt.make_masks(space, model.params, sculpt.uniform_policy(space, 0.5))
    masked, fitted = sculpt.apply_masks(model, masks), sculpt.reconstruct(model, masks, IMAGES)
    assert distance(model, fitted) < 0.7 * distance(model, masked)


@pytest.mark.slow
def test_what_is_compacted_is_the_same_network() -> None:
    model, space = network("residual"), sculpt.make_space(traced("residual"), ("channels",))
    policy = sculpt.uniform_policy(space, 0.5)
    masks = sculpt.make_masks(space, model.params, policy)
    fitted = sculpt.reconstruct(model, masks, IMAGES)
    small = sculpt.compact(fitted, space, policy, masks=masks)
    np.testing.assert_allclose(outputs(small), outputs(fitted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "ridge", "says"),
    [
        (IMAGES, 0.0, "ridge must be a number above 0"),
        (IMAGES[:0], 1e-3, r"images of one example or more, got float32\[0, 8, 8, 3\]"),
        (np.zeros((4, 8, 8, 3), np.uint8), 1e-3, "normalise them first"),
        (IMAGES[..., :2], 1e-3, "the model does not take images"),
        ({"image": IMAGES}, 1e-3, r"the model does not take images \['image'\] float32\["),
    ],
)
def test_refusals(images: Any, ridge: float, says: str) -> None:
    masks, _ = pruned("residual", ("channels", "rect"))
    with pytest.raises(ValueError, match=says):
        sculpt.reconstruct(network("residual"), masks, images, ridge=ridge)


@pytest.mark.slow
def test_layers_of_size_zero_are_passed_over() -> None:
    rng = np.random.default_rng(0)
    shapes = {"first": (4, 6), "empty": (4, 0), "back": (0, 3), "last": (6, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        kept = jax.nn.relu(x @ params["first"]) @ params["last"]
        return kept + jax.nn.relu(x @ params["empty"]) @ params["back"]

    model, x = sculpt.from_function(network, params), jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
    masks = {name: jnp.ones(shape, bool) for name, shape in shapes.items()}
    masks["last"] = masks["last"].at[2:].set(False)
    fitted, masked = sculpt.reconstruct(model, masks, x), sculpt.apply_masks(model, masks)
    dense = network(params, x)
    near, far = (np.square(network(m.params, x) - dense).mean() for m in (fitted, masked))
    assert near < far

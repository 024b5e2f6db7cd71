"""The contract of one pruned network: masked and compact compute the same, forwards and backwards, at the claimed cost."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.model import ApplyFn, Model, Params, State, TrainFn
from sculpt.pruning.importance.scores import Importance


@functools.partial(jax.jit, static_argnums=0)
def _outputs(apply: ApplyFn, params: Params, state: State, x: jax.Array) -> jax.Array:
    return apply(params, state, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(
    apply: ApplyFn, train: TrainFn | None, params: Params, state: State, x: jax.Array
) -> tuple[Any, Params]:
    def loss(params: Params) -> tuple[jax.Array, Any]:
        if train is None:
            outputs, new_state = apply(params, state, x), state
        else:
            outputs, new_state = train(params, state, x, jax.random.key(0))
        return jnp.square(outputs).mean(), (outputs, new_state)

    gradient, results = jax.grad(loss, has_aux=True)(params)
    return results, gradient


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A policy carried out in both ways."""

    space: sculpt.Space
    policy: np.ndarray
    masks: Any
    masked: Model
    small: Model

    def kept(self, tree: Params) -> list[np.ndarray]:
        """The surviving entries of a tree like the dense parameters, flat."""
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(self.masks))
        return [np.asarray(leaf)[mask] for leaf, mask in pairs]

    def assert_same_outputs(self, x: jax.Array, tolerance: float = 1e-4) -> np.ndarray:
        """Compares the outputs, and returns those of the masked model."""
        expected, found = (outputs(model, x) for model in (self.masked, self.small))
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert np.isfinite(expected).all()
        assert distance(expected, found) <= tolerance
        return expected

    def assert_same_gradients(self, x: jax.Array, training: bool, tolerance: float = 1e-4) -> None:
        """Compares outputs, new state and the gradient of a loss at the surviving entries."""
        (expected, state), gradient = gradients(self.masked, x, training)
        (found, small_state), small_gradient = gradients(self.small, x, training)
        assert distance(expected, found) <= tolerance
        assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, self.small.state)
        assert jax.tree.structure(state) == jax.tree.structure(small_state)
        survivors = self.kept(gradient)
        scale = max(np.abs(leaf).max(initial=0.0) for leaf in survivors)
        assert np.isfinite(scale) and scale > 0
        for big, cut in zip(survivors, jax.tree.leaves(small_gradient), strict=True):
            np.testing.assert_allclose(np.ravel(cut), big, rtol=0, atol=10 * tolerance * scale)

    def assert_claimed_cost(self, x: jax.Array) -> None:
        """Compares the closed form with the compact model's own program."""
        claimed = sculpt.cost(self.space, self.policy)
        macs, params = sculpt.count_cost(self.small, x)
        assert float(claimed.macs_realised) == pytest.approx(macs, rel=1e-5)
        assert float(claimed.params) == pytest.approx(params, rel=1e-5)
        assert params == sum(leaf.size for leaf in jax.tree.leaves(self.small.params))

    def assert_counted_by_xla(self, x: jax.Array) -> None:
        """Compares the compact model's own program with what XLA counts, which compiles its contractions."""
        assert sculpt.count_cost(self.small, x)[0] == counted_macs(self.small, x)


def outputs(model: Model, x: jax.Array) -> np.ndarray:
    """Evaluation-mode outputs."""
    return np.asarray(_outputs(model.apply, model.params, model.state, x))


def gradients(model: Model, x: jax.Array, training: bool) -> tuple[Any, Params]:
    """((outputs, new state), gradient of the mean square of the outputs), in evaluation or training mode."""
    return _gradients(model.apply, model.apply_train if training else None, model.params, model.state, x)


def distance(expected: Any, found: Any) -> float:
    """Largest difference relative to the largest value expected."""
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    assert np.abs(a).max() > 0, "all zero: nothing to compare"
    return float(np.abs(a - b).max() / np.abs(a).max())


def drawn_importance(trace: sculpt.Trace, seed: int) -> Importance:
    """Scores drawn at random, so that any units may be the ones that stay."""
    generator = np.random.default_rng(seed)
    return Importance(
        "drawn",
        tuple(group.name for group in trace.groups),
        tuple(generator.uniform(0.1, 1.0, group.size) for group in trace.groups),
    )


def drawn_policy(space: sculpt.Space, seed: int) -> np.ndarray:
    """Any option at every site, at least one of which prunes."""
    policy = np.random.default_rng(seed).integers(0, space.num_options).astype(np.int32)
    return policy if policy.any() else np.ones_like(policy)


def leanest_policy(space: sculpt.Space) -> np.ndarray:
    """The last option everywhere: of groups of up to eleven units a single one stays."""
    return (space.num_options - 1).astype(np.int32)


def single_site_policy(space: sculpt.Space, site: int, option: int = -1) -> np.ndarray:
    """One option at one site, everything else dense."""
    policy = np.zeros(space.num_sites, np.int32)
    policy[site] = option % len(space.sites[site].options)
    return policy


def prune(model: Model, space: sculpt.Space, policy: np.ndarray, check: bool = False) -> Pruned:
    """Masks a model by a policy and compacts it."""
    masks = jax.device_get(sculpt.make_masks(space, model.params, policy))
    # By numpy: operation by operation every shape would be compiled anew.
    params = jax.tree.map(lambda w, mask: jax.device_put(np.asarray(w) * mask), model.params, masks)
    masked = model.replace(params=params)
    return Pruned(space, policy, masks, masked, sculpt.compact(masked, space, policy, check=check))


def in_double(model: Model) -> Model:
    """The model with float64 arrays; wants `jax.enable_x64`."""

    def widen(leaf: Any) -> Any:
        return (
            jax.device_put(np.asarray(leaf, np.float64)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        )

    return model.replace(params=jax.tree.map(widen, model.params), state=jax.tree.map(widen, model.state))


def counted_macs(model: Model, x: jax.Array) -> int:
    """Multiply-accumulates for one image: half of the operations that XLA's cost analysis finds in the convolutions and
    matrix products of the model's jaxpr. Every branch of a condition counts, the body of a `while` once."""
    image = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    jaxpr = jax.make_jaxpr(model.apply)(model.params, model.state, image).jaxpr
    by_repeats: dict[int, list[Any]] = defaultdict(list)
    for eqn, repeats in _contractions(jaxpr, set(jaxpr.invars), 1):
        by_repeats[repeats].append(eqn)
    flops = sum(repeats * _flops(equations) for repeats, equations in by_repeats.items())
    assert flops % 2 == 0
    return flops // 2


def _contractions(jaxpr: Any, depends: set[Any], repeats: int) -> Iterator[tuple[Any, int]]:
    """Convolutions and matrix products with how often they run, leaving out what depends on neither the parameters nor
    the image: it can be computed beforehand."""
    for eqn in jaxpr.eqns:
        if not any(not hasattr(v, "val") and v in depends for v in eqn.invars):
            continue
        depends.update(eqn.outvars)
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            yield eqn, repeats
        inner_repeats = repeats * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _contractions(inner, set(inner.invars), inner_repeats)


def _flops(equations: Sequence[Any]) -> int:
    """Of all these equations, each on operands of its own."""
    calls = [_padded(eqn) for eqn in equations]

    def program(operands: list[list[jax.Array]]) -> list[Any]:
        return [
            eqn.primitive.bind(*xs, **params)
            for eqn, (_, params), xs in zip(equations, calls, operands, strict=True)
        ]

    analysis = jax.jit(program).lower([shapes for shapes, _ in calls]).cost_analysis()
    assert analysis is not None
    return int(analysis["flops"])


def _padded(eqn: Any) -> tuple[list[jax.ShapeDtypeStruct], dict[str, Any]]:
    """Operands and parameters. XLA counts no products with padding, Sculpt does: it is made part of the input. Of a transposed
    convolution Sculpt counts every product of a position of the input with a tap of the window: XLA does, where there is so much
    padding that no output is cut off."""
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    if eqn.primitive.name == "dot_general":
        return operands, eqn.params
    params, image = dict(eqn.params), list(operands[0].shape)
    numbers = params["dimension_numbers"]
    paddings, gaps = list(params["padding"]), list(params["lhs_dilation"])
    for d, (dim, out, tap) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
    ):
        reach = (operands[1].shape[tap] - 1) * params["rhs_dilation"][d]
        transposed = gaps[d] > 1 or (reach > 0 and min(paddings[d]) >= reach)
        if transposed and eqn.outvars[0].aval.shape[out] > image[dim]:
            assert params["window_strides"][d] == 1
            paddings[d] = (reach, reach)
        else:
            image[dim] = (image[dim] - 1) * gaps[d] + 1 + sum(paddings[d])
            paddings[d], gaps[d] = (0, 0), 1
    params.update(padding=tuple(paddings), lhs_dilation=tuple(gaps))
    return [jax.ShapeDtypeStruct(tuple(image), operands[0].dtype), operands[1]], params

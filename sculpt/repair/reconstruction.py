"""Layer-wise reconstruction: fits the kept weights of each layer to the outputs of the dense layer, without gradients.

Layer by layer in the order of the network, the weights W that a mask leaves of a kernel, and the bias b behind it, minimise

    sum over images and places of |x' W + b - y|^2 + ridge |W - W_masked|^2

where y is what the dense layer gives in the dense network and x' what the layer reads in the pruned one, whose layers before it have been
fitted already (He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks", arXiv 1707.06168, for one layer at a
time and channels; here for whatever a mask leaves). The minimum is approached by conjugate gradients, for all outputs side by side,
each with its own mask: matrix products alone, so that many policies can be fitted inside one compiled program; and few steps do as well
as many, for what they leave out are the directions that few images tell little of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, is_real
from sculpt.inputs import as_text, check_finite, check_finite_images, check_images
from sculpt.ir.lowering import bind_lowered
from sculpt.ir.program import Equation, Literal, Operand, flatten, inlined
from sculpt.model import ApplyFn, Model
from sculpt.pruning.masks import apply_masks, check_masks, mask_params
from sculpt.repair.linear_layers import LinearLayer, LinearNetwork, find_linear_layers
from sculpt.tracing.tracer import leaves_of
from sculpt.trees import shapes_of


@dataclasses.dataclass(frozen=True)
class Effort:
    """How closely layers are fitted."""

    rows: int
    """Places (images, and positions in them) that a layer is fitted on, at most."""
    steps: int
    """Of conjugate gradients."""


RIDGE = 1e-3
"""How strongly weights are held where they were, in parts of the mean square of a layer's inputs."""
FULL, BRIEF = Effort(16_384, 30), Effort(2048, 10)
"""For one network that is to be used, and for each of many that are to be compared."""


class NotFinite(ValueError):
    """A network that is no longer finite on some images."""


@checked
def reconstruct(model: Model, masks: Any, images: Any, *, ridge: float = RIDGE) -> Model:
    """Applies masks, and fits what they leave of every layer to what the dense layer gave on some images.

    Left as masked are layers inside loops, convolutions in groups, and kernels that are read more than once, are computed from other
    parameters, or have more than 8,388,608 weights. BatchNorm keeps its statistics: what its layers give has been fitted to what they were taken of.

    Args:
      model: the dense network.
      masks: what `make_masks` returned: booleans like `model.params`.
      images: `[n, ...]`, normalised as the model expects, or a pytree of arrays where the network takes one; a few hundred of the train
        split. Labels are not needed.
      ridge: how strongly weights are held where they were, in parts of the mean square of a layer's inputs; above 0.

    Returns:
      The model with masked weights exactly zero, and the others fitted.

    Raises:
      ValueError: if the masks are not of the model, the model does not take the images, there is none, `ridge` is not above 0, or
        activations are not finite (`NotFinite`).
    """
    if not is_real(ridge) or not ridge > 0:
        raise ValueError(f"ridge must be a number above 0, got {ridge!r}")
    check_masks(model, masks)
    check_finite(model)
    x = check_images(model, images)
    check_finite_images(x)
    try:
        jax.eval_shape(model.apply, model.params, model.state, x)
    except Exception as error:  # each framework has its own
        raise ValueError(f"the model does not take images {as_text(x)}: {error}") from error
    params, finite = _reconstructed(
        model.apply, FULL, model.params, model.state, masks, x, jnp.asarray(ridge, jnp.float32)
    )
    if not np.all(finite):
        network = linear_network(model.apply, model.params, model.state, x, FULL.rows)
        layer = list(network.layers.values())[np.asarray(finite).argmin()]
        raise NotFinite(f"layer {layer.name} reads or gives numbers that are not finite on these images")
    return apply_masks(model.replace(params=params), masks)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reconstructed(
    apply: ApplyFn, effort: Effort, params: Any, state: Any, masks: Any, images: Any, ridge: jax.Array
) -> tuple[Any, list[jax.Array]]:
    network = linear_network(apply, params, state, images, effort.rows)
    wanted = dense_rows(network, params, state, images)
    return fit_params(network, params, masks, state, images, wanted, ridge, effort.steps)


def linear_network(apply: ApplyFn, params: Any, state: Any, images: Any, rows: int) -> LinearNetwork:
    """The layers of a network that can be fitted on such images (shapes are enough), on `rows` places of each."""
    params, state = shapes_of((params, state))
    # Whatever is computed again in the backward pass, or has a derivative of its own, is evaluated as it is written.
    program = inlined(flatten(apply, params, state, shapes_of(images)))
    return find_linear_layers(program, leaves_of(params), rows, len(jax.tree.leaves(images)))


def dense_rows(network: LinearNetwork, params: Any, state: Any, images: Any) -> list[jax.Array]:
    """What each layer gives in the dense network: float32 `[rows, outputs]` each. Pure."""
    found = []

    def visit(layer: LinearLayer, read: jax.Array, given: jax.Array, leaves: list[Any]) -> None:
        found.append(layer.rows_given(given).astype(jnp.float32))

    _run(network, jax.tree.leaves(params), state, images, visit)
    return found


def fit_params(
    network: LinearNetwork,
    params: Any,
    masks: Any,
    state: Any,
    images: Any,
    wanted: Sequence[jax.Array],
    ridge: jax.Array | float,
    steps: int,
) -> tuple[Any, list[jax.Array]]:
    """Fits the parameters that masks leave. Pure: for use inside jit.

    Args:
      network: what `linear_network` found for such images.
      params: of the dense network.
      masks: booleans like `params`.
      images: those that `wanted` is of.
      wanted: what `dense_rows` gave.
      ridge: as for `reconstruct`.
      steps: of conjugate gradients.

    Returns:
      The parameters, and for each layer, in the order of the program, whether all its numbers were finite (boolean scalars).
    """
    kept = [jnp.asarray(mask) for mask in jax.tree.leaves(masks)]
    targets, finite = iter(wanted), []

    def visit(layer: LinearLayer, read: jax.Array, given: jax.Array, leaves: list[Any]) -> None:
        rows = layer.rows_read(read).astype(jnp.float32)
        missing = next(targets) - layer.rows_given(given).astype(jnp.float32)
        finite.append(jnp.isfinite(rows).all() & jnp.isfinite(missing).all())
        mean_row, mean_missing = rows.mean(axis=0, keepdims=True), missing.mean(axis=0, keepdims=True)
        if layer.bias is not None:
            rows, missing = rows - mean_row, missing - mean_missing
        own = layer.kernel.leaf
        change = _solve(rows, missing, layer.matrix(kept[own].astype(jnp.float32)), ridge, steps)
        leaves[own] = _added(leaves[own], layer.of_matrix(change, leaves[own]))
        if layer.bias is not None:
            leaf, units = layer.bias
            with jax.default_matmul_precision("highest"):
                shift = (mean_missing - mean_row @ change)[0]
            # Where one number is added to several outputs it moves by their mean.
            times = np.maximum(np.bincount(units, minlength=leaves[leaf].size), 1).astype(np.float32)
            means = jnp.zeros(times.shape, jnp.float32).at[units].add(shift) / times
            moved = _added(leaves[leaf], means.reshape(leaves[leaf].shape))
            leaves[leaf] = jnp.where(kept[leaf], moved, jnp.zeros((), moved.dtype))

    leaves = jax.tree.leaves(mask_params(params, masks))
    _run(network, leaves, state, images, visit)
    return jax.tree.unflatten(jax.tree.structure(params), leaves), finite


def _added(leaf: jax.Array, change: jax.Array) -> jax.Array:
    """Their sum, computed in float32."""
    return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)


def _solve(
    rows: jax.Array, missing: jax.Array, mask: jax.Array, ridge: jax.Array | float, steps: int
) -> jax.Array:
    """Conjugate gradients for the change of the weights that stay, float32 `[inputs, outputs]`, from none on.

    Minimises `|rows @ change - missing|^2 + ridge s |change|^2` where `mask` is 1 and not 0, with s the sum of squares of an input, in the mean of those
    that an output reads; preconditioned by the diagonal (Shewchuk 1994, "An introduction to the conjugate gradient method").
    """
    with jax.default_matmul_precision("highest"):
        gram = rows.T @ rows
        squares = jnp.diag(gram)[:, None]
        held = ridge * _ratio((squares * mask).sum(axis=0, keepdims=True), mask.sum(axis=0, keepdims=True))
        scale = _ratio(mask, squares + held)

        def step(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            change, residual, direction, power = carry
            image = mask * (gram @ direction + held * direction)
            length = _ratio(power, (direction * image).sum(axis=0, keepdims=True))
            change, residual = change + length * direction, residual - length * image
            scaled = scale * residual
            left = (residual * scaled).sum(axis=0, keepdims=True)
            return change, residual, scaled + _ratio(left, power) * direction, left

        residual = mask * (rows.T @ missing)
        direction = scale * residual
        power = (residual * direction).sum(axis=0, keepdims=True)
        start = (jnp.zeros_like(residual), residual, direction, power)
        return jax.lax.fori_loop(0, steps, step, start)[0]


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0: outputs that are solved exactly, or keep nothing, have no way to go."""
    return jnp.where(b > 0.0, a / jnp.where(b > 0.0, b, 1.0), 0.0)


def _run(
    network: LinearNetwork,
    leaves: list[Any],
    state: Any,
    images: Any,
    visit: Callable[[LinearLayer, jax.Array, jax.Array, list[Any]], None],
) -> None:
    """Runs the program on these leaves of the parameters. `visit` is shown each layer, what it reads and what it gives, and may put
    other leaves in their place, with which the layer is then computed again."""
    program = network.program
    values: dict[int, Any] = dict(program.constants)
    values.update(
        zip(program.inputs[len(leaves) :], [*jax.tree.leaves(state), *jax.tree.leaves(images)], strict=True)
    )

    def read(operand: Operand) -> Any:
        if isinstance(operand, Literal):
            return operand.value
        view = network.views.get(operand)
        return values[operand] if view is None else view.seen(leaves[view.leaf])

    def applied(eqn: Equation) -> list[Any]:
        operands = [read(operand) for operand in eqn.inputs]
        if eqn.function is not None:
            return eqn.function(*operands)
        results = bind_lowered("lax", "float32", eqn, operands, eqn.params)
        return list(results) if eqn.primitive.multiple_results else [results]

    for eqn in program.equations:
        if eqn.outputs[0] in network.views:
            continue
        results, layer = applied(eqn), network.layers.get(id(eqn))
        if layer is not None:
            kernel = leaves[layer.kernel.leaf]
            visit(layer, read(eqn.inputs[1 - layer.operand]), results[0], leaves)
            if leaves[layer.kernel.leaf] is not kernel:
                results = applied(eqn)
        values.update(zip(eqn.outputs, results, strict=True))

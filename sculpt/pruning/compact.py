"""Compaction: masked units taken out, the program rewritten for the smaller shapes; the same function, really smaller.

The compact model is the dense program bound to smaller operands with rewritten static shapes, never the user's class at
a smaller width: divisors, scales and other constants that the dense network wrote down stay what they were. The batch
size is one of those constants, so the program is traced anew for every input shape.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.model import ApplyFn, Model, Params, State
from sculpt.pruning.masks import make_masks
from sculpt.pruning.space import Space
from sculpt.tracing.axes import Atom
from sculpt.tracing.program import Equation, Literal, flatten, run
from sculpt.tracing.rules import Flow
from sculpt.tracing.trace import Trace, axis_flow, leaf_paths, shapes_of

TOLERANCE = 1e-4
"""Largest difference between masked and compact logits, relative to the largest logit."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What is kept of every array of a dense model."""

    params: Any
    """Tree of `ShapeDtypeStruct`: the dense parameters."""
    state: Any
    """Likewise, the dense state."""
    keeps: tuple[tuple[np.ndarray, ...], ...]
    """For every leaf of (params, state), per axis: boolean `[dense size]`."""
    rows: tuple[str, ...]

    def slice(self, tree: tuple[Params, State]) -> tuple[Params, State]:
        leaves, treedef = jax.tree.flatten(tree)
        small = [_take(leaf, keep) for leaf, keep in zip(leaves, self.keeps, strict=True)]
        return jax.tree.unflatten(treedef, small)


@dataclasses.dataclass(frozen=True, eq=False)
class CompactFunction:
    """The rewritten program of one function of a dense model. Called with the small arrays."""

    function: Callable[..., Any]
    """The dense model's `apply` or `apply_train`."""
    plan: _Plan
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Params, state: State, x: jax.Array, *key: jax.Array) -> Any:
        rest = [jax.ShapeDtypeStruct(jnp.shape(a), jax.dtypes.result_type(a)) for a in (x, *key)]
        signature = tuple((a.shape, a.dtype) for a in rest)
        if signature not in self._programs:
            self._programs[signature] = _rewritten(self.function, self.plan, rest)
        program, changed, out_tree = self._programs[signature]
        leaves = jax.tree.leaves((params, state))
        outputs = run(
            program, [*leaves, x, *key], lambda eqn, operands: _bind(eqn, operands, changed[id(eqn)])
        )
        return jax.tree.unflatten(out_tree, outputs)

    def describe(self) -> tuple[str, ...]:
        """One line per kernel: path, dense shape and compact shape."""
        return self.plan.rows


def compact(model: Model, space: Space, policy: Any, check: bool = True) -> Model:
    """Takes the zeros of a policy out of a masked model: channels go, windows become smaller kernels.

    Args:
      model: a model that carries the zeros of the policy (`apply_masks`, `finetune`), dense shapes.
      space: the search space that the policy belongs to.
      policy: integers `[sites]`.
      check: compare masked and compact logits on random images.

    Returns:
      A `Model` of smaller arrays under the same tree paths; jit-, grad- and vmap-able, trainable, and traceable again.

    Raises:
      ValueError: if the model does not carry the policy's zeros, or (a fault of this library) the outputs differ.
    """
    masks = make_masks(space, model.params, policy)
    paths = leaf_paths(model.params)
    for path, weight, mask in zip(paths, jax.tree.leaves(model.params), jax.tree.leaves(masks)):
        wrong = int(jnp.sum((jnp.asarray(weight) != 0) & ~mask))
        if wrong:
            raise ValueError(
                f"compact expected a model with the policy's zeros in place, but {path} has {wrong} non-zero weights where "
                "the policy removes them; apply sculpt.apply_masks(model, masks) or fine-tune with those masks first"
            )
    plan = _make_plan(model, space, masks)
    params, state = plan.slice((model.params, model.state))
    small = Model(CompactFunction(model.apply, plan), CompactFunction(model.apply_train, plan), params, state)
    if check:
        image = jax.random.normal(jax.random.key(0), (2, *space.trace.input_shape), jnp.float32)
        difference = max_difference(model, small, image)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"compacted and masked outputs differ by {difference:.2e} of the largest logit (at most {TOLERANCE} "
                "expected); please report this network"
            )
    return small


def max_difference(model: Model, other: Model, x: jax.Array) -> float:
    """Largest absolute difference of two models' logits on `x`, relative to the largest logit (at least 1)."""
    a, b = (_logits(m.apply, m.params, m.state, x) for m in (model, other))
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(a)), 1.0))


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply: ApplyFn, params: Params, state: State, x: jax.Array) -> jax.Array:
    return apply(params, state, x)


def _make_plan(model: Model, space: Space, masks: Any) -> _Plan:
    traced, axes = space.trace, space.trace.axes
    kept = _kept_atoms(traced, space, masks)
    terms = [traced.flow.terms[v] for v in traced.program.inputs[:-1]]
    keeps = tuple(tuple(np.asarray(axes.keep(axis, kept)) for axis in term) for term in terms)
    rows = []
    for leaf, keep in zip(traced.leaves, keeps):
        small = tuple(int(k.sum()) for k in keep)
        if len(leaf.shape) > 1:
            rows.append(f"{leaf.path} {list(leaf.shape)} -> {list(small)}")
    return _Plan(shapes_of(model.params), shapes_of(model.state), keeps, tuple(rows))


def _kept_atoms(traced: Trace, space: Space, masks: Any) -> dict[Atom, np.ndarray]:
    """What is kept of each atom, read back from the masks."""
    pruned = set(space.atoms)
    kept: dict[Atom, np.ndarray] = {}
    for leaf, mask in zip(traced.leaves, jax.tree.leaves(masks)):
        mask = np.asarray(mask)
        for dim, axis in enumerate(traced.leaf_term(leaf.index)):
            if pruned & set(traced.axes.atoms(axis)):
                used = np.asarray(mask.any(axis=tuple(d for d in range(mask.ndim) if d != dim)))
                traced.axes.infer(axis, used, kept)
    return kept


def _take(array: Any, keep: tuple[np.ndarray, ...]) -> Any:
    for dim, units in enumerate(keep):
        if not units.all():
            array = jnp.take(array, np.flatnonzero(units), axis=dim)
    return array


def _rewritten(function: Callable[..., Any], plan: _Plan, rest: list[Any]) -> tuple[Any, Any, Any]:
    """Traces `function` at full width for these input shapes and rewrites its static shapes."""
    program = flatten(function, plan.params, plan.state, *rest)
    out_tree = jax.tree.structure(jax.eval_shape(function, plan.params, plan.state, *rest))
    flow = axis_flow(program)
    kept: dict[Atom, np.ndarray] = {}
    inputs = [flow.terms[v] for v in program.inputs[: len(plan.keeps)]]
    # New statistics are of the same units as the old ones, whatever the program does with them.
    if len(program.outputs) > 1:
        old_state = inputs[len(jax.tree.leaves(plan.params)) :]
        for output, term in zip(program.outputs[1:], old_state):
            for new, old in zip(flow.term(output), term):
                flow.axes.unify(new, old, "new state and old state differ in structure")
    for term, keep in zip(inputs, plan.keeps):
        for axis, units in zip(term, keep):
            flow.axes.infer(axis, units, kept)
    for term, keep in zip(inputs, plan.keeps):
        for axis, units in zip(term, keep):
            if not np.array_equal(flow.axes.keep(axis, kept), units):
                raise ValueError("the training program couples axes otherwise than the evaluation program")
    rewrite = _Rewrite(flow, kept)
    changed = {id(eqn): rewrite.params(eqn) for eqn in program.equations}
    constants = {
        value: _take(array, tuple(rewrite.units(axis) for axis in flow.terms[value]))
        for value, array in program.constants.items()
    }
    return dataclasses.replace(program, constants=constants), changed, out_tree


def _bind(eqn: Equation, operands: list[Any], params: dict[str, Any]) -> Any:
    if eqn.name == "conv_general_dilated" and any(low < 0 or high < 0 for low, high in params["padding"]):
        operands[0], params = _cropped(operands[0], params)
    return eqn.primitive.bind(*operands, **params)


def _cropped(image: jax.Array, params: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    """Negative padding as a slice of the input: XLA's CPU convolution reads out of bounds where low padding is negative."""
    starts, limits = [0] * image.ndim, list(image.shape)
    for dim, (low, high) in zip(params["dimension_numbers"].lhs_spec[2:], params["padding"]):
        starts[dim], limits[dim] = max(-low, 0), image.shape[dim] + min(high, 0)
    padding = tuple((max(low, 0), max(high, 0)) for low, high in params["padding"])
    return jax.lax.slice(image, starts, limits), {**params, "padding": padding}


class _Rewrite:
    """The static parameters of equations at the new sizes."""

    def __init__(self, flow: Flow, kept: dict[Atom, np.ndarray]) -> None:
        self.flow = flow
        self.kept = kept

    def units(self, axis: Any) -> np.ndarray:
        return self.flow.axes.keep(axis, self.kept)

    def shape(self, value: int) -> tuple[int, ...]:
        return tuple(int(self.units(axis).sum()) for axis in self.flow.terms[value])

    def params(self, eqn: Equation) -> dict[str, Any]:
        method = getattr(self, f"_{eqn.name}", None)
        return eqn.params if method is None else {**eqn.params, **method(eqn)}

    def _term(self, eqn: Equation, index: int = 0) -> Any:
        operand = eqn.inputs[index]
        return () if isinstance(operand, Literal) else self.flow.terms[operand]

    def _broadcast_in_dim(self, eqn: Equation) -> dict[str, Any]:
        return {"shape": self.shape(eqn.outputs[0])}

    _iota = _random_bits = _broadcast_in_dim

    def _reshape(self, eqn: Equation) -> dict[str, Any]:
        return {"new_sizes": self.shape(eqn.outputs[0])}

    def _slice(self, eqn: Equation) -> dict[str, Any]:
        starts, limits = [], []
        strides = eqn.params["strides"] or (1,) * len(eqn.params["start_indices"])
        for axis, start, limit, stride in zip(
            self._term(eqn), eqn.params["start_indices"], eqn.params["limit_indices"], strides
        ):
            units = self.units(axis)
            starts.append(start if stride != 1 else int(units[:start].sum()))
            limits.append(limit if stride != 1 else int(units[:limit].sum()))
        return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}

    def _split(self, eqn: Equation) -> dict[str, Any]:
        axis = eqn.params["axis"]
        return {"sizes": tuple(self.shape(o)[axis] for o in eqn.outputs)}

    def _pad(self, eqn: Equation) -> dict[str, Any]:
        config = []
        for axis, (low, high, interior) in zip(self.flow.terms[eqn.outputs[0]], eqn.params["padding_config"]):
            if low >= 0 and high >= 0 and not interior:
                units = self.units(axis)
                low, high = int(units[:low].sum()), int(units[len(units) - high :].sum())
            config.append((low, high, interior))
        return {"padding_config": tuple(config)}

    def _conv_general_dilated(self, eqn: Equation) -> dict[str, Any]:
        numbers = eqn.params["dimension_numbers"]
        lhs, rhs = self._term(eqn, 0), self._term(eqn, 1)
        padding = []
        for dim, (low, high), dilation in zip(
            numbers.rhs_spec[2:], eqn.params["padding"], eqn.params["rhs_dilation"]
        ):
            window = np.flatnonzero(self.units(rhs[dim]))
            size = self.flow.axes.size(rhs[dim])
            if window[-1] - window[0] + 1 != len(window):
                raise ValueError(
                    f"a kernel keeps positions {window.tolist()} of {size}, which is not a window"
                )
            # What the kernel lost at an edge, the padding loses too (below zero it crops).
            padding.append((low - int(window[0]) * dilation, high - int(size - 1 - window[-1]) * dilation))
        features = int(self.units(lhs[numbers.lhs_spec[1]]).sum())
        inputs = int(self.units(rhs[numbers.rhs_spec[1]]).sum())
        return {"padding": tuple(padding), "feature_group_count": features // inputs}

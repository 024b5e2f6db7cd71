"""Static sizes of a program, rewritten for axes that lost units; run by `ir/interpreter.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.interpreter import Executable
from sculpt.ir.jax_calls import apply
from sculpt.ir.program import CONTRACTIONS, Equation, FlatProgram, Literal, Operand
from sculpt.pruning.compaction.picks import picking, result_dim
from sculpt.tracing.axes import Atom, Axis, Term
from sculpt.tracing.flow import Flow


def units_left(kept: Mapping[Atom, np.ndarray], orders: Mapping[Atom, np.ndarray]) -> dict[Atom, np.ndarray]:
    """The units that stay, in their new order, of every atom that lost units (`kept`) or whose units change places (`orders`)."""
    return {**{atom: np.flatnonzero(units) for atom, units in kept.items()}, **orders}


class Sizes:
    """What is kept of every value of a program."""

    def __init__(
        self,
        flow: Flow,
        program: FlatProgram,
        kept: Mapping[Atom, np.ndarray],
        orders: Mapping[Atom, np.ndarray] | None = None,
    ) -> None:
        self.flow = flow
        self.program = program
        """The program to be run: that of `flow`, or the same one with symbolic sizes."""
        self.kept = kept
        """Boolean `[atom size]` of every atom that lost units."""
        self.orders = orders or {}
        """The units that stay, in their new order, of every atom whose units changed places."""
        self._left = units_left(kept, self.orders)

    def moves(self, axis: Axis) -> bool:
        """Whether units are lost or change places."""
        return any(atom in self.kept or atom in self.orders for atom in self.flow.axes.atoms(axis))

    def places(self, axis: Axis) -> np.ndarray:
        """int `[left]`: the units of an axis that stay, in their new order."""
        return self.flow.axes.places(axis, self._left)

    def shrinks(self, axis: Axis) -> bool:
        return any(atom in self.kept for atom in self.flow.axes.atoms(axis))

    def units(self, axis: Axis) -> np.ndarray:
        """Boolean `[dense size]`: which units of an axis stay."""
        return np.asarray(self.flow.axes.keep(axis, self.kept))

    def count(self, axis: Axis, dense: Any) -> Any:
        """Size of an axis whose dense size is `dense`; sizes that may be symbolic pass through."""
        return int(self.units(axis).sum()) if self.shrinks(axis) else dense

    def shape(self, value: int) -> tuple[Any, ...]:
        """The new shape of a value."""
        return tuple(map(self.count, self.flow.terms[value], self.program.avals[value].shape))

    def nothing(self, value: Operand) -> bool:
        """Whether a value has lost all units of one of its axes."""
        if isinstance(value, Literal):
            return False
        return any(self.shrinks(axis) and not self.units(axis).any() for axis in self.flow.terms[value])

    def term(self, eqn: Equation, index: int = 0) -> Term:
        operand = eqn.inputs[index]
        return () if isinstance(operand, Literal) else self.flow.terms[operand]

    def changes(self, eqn: Equation) -> bool:
        """Whether anything that the equation reads or gives has lost units, or has them in another order."""
        values = [v for v in (*eqn.inputs, *eqn.outputs) if not isinstance(v, Literal)]
        return any(self.moves(axis) for v in values for axis in self.flow.terms[v])


Rewrite = Callable[[Sizes, Equation], dict[str, Any]]
REWRITES: dict[str, Rewrite] = {}
"""Primitive name -> the static parameters that change with the sizes of its operands. Others have none."""


def rewrite_rule(*names: str) -> Callable[[Rewrite], Rewrite]:
    """Registers a rewrite for primitives of these names."""

    def register(function: Rewrite) -> Rewrite:
        for name in names:
            REWRITES[name] = function
        return function

    return register


def rewrite(
    flow: Flow,
    program: FlatProgram,
    kept: Mapping[Atom, np.ndarray],
    orders: Mapping[Atom, np.ndarray] | None = None,
) -> Executable:
    """The program at the sizes that are left.

    Args:
      flow: axes of the program at known sizes.
      program: the program itself, or the same one traced with symbolic sizes.
      kept: boolean `[atom size]` of every atom that lost units.
      orders: the units that stay, in their new order, of every atom whose units change places.
    """
    sizes = Sizes(flow, program, kept, orders)
    params: dict[int, dict[str, Any]] = {}
    bodies: dict[int, tuple[Executable, ...]] = {}
    derivatives: dict[int, Executable] = {}
    instead: dict[int, Equation] = {}
    whole: set[Any] = set()
    for known, eqn in zip(flow.program.equations, program.equations):
        # Tables are computed as they were written, and where nothing shrinks so is the rest.
        if program.is_table(eqn):
            whole.update(eqn.inputs)
        elif eqn.bodies:
            inner = flow.bodies[id(known)]
            if sizes.changes(eqn) or any(_has_other_constants(body, kept, orders) for body in inner):
                bodies[id(eqn)] = tuple(rewrite(f, b, kept, orders) for f, b in zip(inner, eqn.bodies))
                if id(known) in flow.derivatives:
                    backward = flow.derivatives[id(known)]
                    derivatives[id(eqn)] = rewrite(
                        backward, eqn.own_derivative or backward.program, kept, orders
                    )
        elif places := _picked_places(sizes, eqn, flow.picks.get(id(known), {})):
            instead[id(eqn)] = picking(eqn, {**eqn.params, **_changed(sizes, eqn)}, places)
        elif eqn.name in CONTRACTIONS and any(map(sizes.nothing, (*eqn.inputs, *eqn.outputs))):
            instead[id(eqn)] = _zeros(program, eqn, sizes.shape(eqn.outputs[0]))
        elif eqn.name == "reduce_max" and sizes.nothing(eqn.inputs[0]):
            instead[id(eqn)] = _zeros(program, eqn, sizes.shape(eqn.outputs[0]))
        elif eqn.name in REWRITES and sizes.changes(eqn):
            params[id(eqn)] = {**eqn.params, **_changed(sizes, eqn)}
    # A program is kept: what is worked out while one is traced must not be of that trace.
    with jax.ensure_compile_time_eval():
        constants = {
            value: array if value in whole else take(array, sizes, flow.terms[value])
            for value, array in program.constants.items()
        }
    tables = {
        value: functools.partial(take, sizes=sizes, term=flow.terms[value])
        for value in program.tables
        if value in whole or value not in constants
        if any(map(sizes.moves, flow.terms[value]))
    }
    return Executable(program, constants, params, bodies, derivatives, tables, instead)


def _zeros(program: FlatProgram, eqn: Equation, shape: tuple[Any, ...]) -> Equation:
    """In place of a contraction that sums over nothing, or gives nothing, and of the largest of values that were all zero."""
    zero = Literal(np.zeros((), program.avals[eqn.outputs[0]].dtype))
    params = {"shape": shape, "broadcast_dimensions": (), "sharding": None}
    return Equation(jax.lax.broadcast_in_dim_p, (zero,), eqn.outputs, params, eqn.source)


def _changed(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    return REWRITES[eqn.name](sizes, eqn) if eqn.name in REWRITES else {}


def _picked_places(sizes: Sizes, eqn: Equation, picks: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """For each axis that an equation takes known units of, if units have gone: the places of those that stay in what is left of it."""
    places = {}
    for dim, units in picks.items():
        before, after = sizes.term(eqn)[dim], sizes.flow.terms[eqn.outputs[0]][result_dim(eqn, dim)]
        if sizes.moves(before) or sizes.moves(after):
            left = sizes.places(before)
            where = np.zeros(sizes.flow.axes.size(before), np.int32)
            where[left] = np.arange(len(left))
            places[dim] = where[units[sizes.places(after)]]
    return places


def _has_other_constants(
    flow: Flow, kept: Mapping[Atom, np.ndarray], orders: Mapping[Atom, np.ndarray] | None
) -> bool:
    sizes = Sizes(flow, flow.program, kept, orders)
    return any(sizes.moves(axis) for value in flow.program.constants for axis in flow.terms[value])


def take(array: Any, sizes: Sizes, term: Term) -> Any:
    """The units of an array that stay, in their new order."""
    for dim, axis in enumerate(term):
        if sizes.moves(axis):
            # Clipped, not filled: nothing is out of bounds, and what is zero everywhere is seen to stay so.
            array = jnp.take(array, sizes.places(axis), axis=dim, mode="clip")
    return array


@rewrite_rule("broadcast_in_dim", "rng_uniform")
def _shape(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    return {"shape": sizes.shape(eqn.outputs[0])}


@rewrite_rule("random_bits")
def _random_bits(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    """Of each key so many."""
    keys = sizes.program.shape(eqn.inputs[0])
    return {"shape": sizes.shape(eqn.outputs[0])[len(keys) :]}


@rewrite_rule("reshape")
def _reshape(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    return {"new_sizes": sizes.shape(eqn.outputs[0])}


@rewrite_rule("slice")
def _slice(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    starts, limits = list(eqn.params["start_indices"]), list(eqn.params["limit_indices"])
    for dim, axis in enumerate(sizes.term(eqn)):
        if sizes.shrinks(axis):
            units = sizes.units(axis)
            starts[dim], limits[dim] = int(units[: starts[dim]].sum()), int(units[: limits[dim]].sum())
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


@rewrite_rule("split")
def _split(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    axis = eqn.params["axis"]
    return {"sizes": tuple(sizes.shape(output)[axis] for output in eqn.outputs)}


@rewrite_rule("pad")
def _pad(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    config = []
    for axis, (low, high, interior) in zip(sizes.flow.terms[eqn.outputs[0]], eqn.params["padding_config"]):
        if sizes.shrinks(axis):
            units = sizes.units(axis)
            low, high = int(units[:low].sum()), int(units[len(units) - high :].sum())
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


@rewrite_rule("tile")
def _tile(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    before, after = sizes.program.shape(eqn.inputs[0]), sizes.shape(eqn.outputs[0])
    reps = eqn.params["reps"]
    return {"reps": tuple(new if old == 1 else times for old, new, times in zip(before, after, reps))}


@rewrite_rule("gather")
def _gather(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    batching = eqn.params["dimension_numbers"].operand_batching_dims
    slices = eqn.params["slice_sizes"]
    kept = [
        n if d in batching else sizes.count(axis, n)
        for d, (axis, n) in enumerate(zip(sizes.term(eqn), slices))
    ]
    return {"slice_sizes": tuple(kept)}


@rewrite_rule("dynamic_slice")
def _dynamic_slice(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    return {"slice_sizes": sizes.shape(eqn.outputs[0])}


@rewrite_rule("conv_general_dilated")
def _convolution(sizes: Sizes, eqn: Equation) -> dict[str, Any]:
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs = sizes.term(eqn, 0), sizes.term(eqn, 1)
    padding = []
    for dim, (low, high), dilation in zip(
        numbers.rhs_spec[2:], eqn.params["padding"], eqn.params["rhs_dilation"]
    ):
        units = sizes.units(rhs[dim])
        window = np.flatnonzero(units)
        if window[-1] - window[0] + 1 != len(window):
            raise ValueError(
                f"a kernel keeps positions {window.tolist()} of {len(units)}, which is not a window"
            )
        # What the kernel lost at an edge, the padding loses too (below zero it crops).
        last = len(units) - 1 - int(window[-1])
        padding.append((low - int(window[0]) * dilation, high - last * dilation))
    features = int(sizes.units(lhs[numbers.lhs_spec[1]]).sum())
    inputs = int(sizes.units(rhs[numbers.rhs_spec[1]]).sum())
    return {"padding": tuple(padding), "feature_group_count": features // inputs}


def bind(eqn: Equation, operands: list[Any], params: dict[str, Any]) -> Any:
    """Applies one primitive. Negative padding becomes a slice: XLA's CPU convolution reads out of bounds where low padding
    is negative."""
    if eqn.name == "conv_general_dilated" and any(low < 0 or high < 0 for low, high in params["padding"]):
        operands, params = _cropped(operands, params)
    return apply(eqn.primitive, operands, params)


def _cropped(operands: list[Any], params: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    image, kernel = operands
    config = [(0, 0, 0)] * image.ndim
    padding, spread = list(params["padding"]), list(params["lhs_dilation"])
    for place, dim in enumerate(params["dimension_numbers"].lhs_spec[2:]):
        low, high = padding[place]
        if low < 0 or high < 0:
            config[dim] = (min(low, 0), min(high, 0), spread[place] - 1)
            padding[place], spread[place] = (max(low, 0), max(high, 0)), 1
    image = jax.lax.pad(image, jnp.zeros((), image.dtype), config)
    return [image, kernel], {**params, "padding": tuple(padding), "lhs_dilation": tuple(spread)}

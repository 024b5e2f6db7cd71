"""Permutes channels so that n:m patterns keep more of the weights; the function of the network does not change.

N:m patterns look at m consecutive inputs. Which channels lie side by side is an accident of training, and coupled axes may be put in
any order as long as all of their arrays are (Pool and Yu 2021, "Channel permutations for N:M sparsity", NeurIPS).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from sculpt.arguments import checked, is_whole
from sculpt.model import Model
from sculpt.pruning.families.family import kernel_of
from sculpt.pruning.importance.units import fitting_leaves
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.flow import Flow
from sculpt.tracing.tracer import Trace

_LEAST_GAIN = 1e-4
"""Sweeps end when one adds less than this share of the energy."""


@checked
def permute_channels(
    model: Model, trace: Trace, key: jax.Array, *, pattern: tuple[int, int] = (2, 4), sweeps: int = 20
) -> Model:
    """The same network with its channels in an order in which a pattern n:m keeps more of the weights' energy.

    Every group of coupled axes is put in an order of its own, found by assignments: one channel is taken out of each m consecutive
    ones, and all of them are put back where together they are worth most. That is repeated; the energy kept never falls. The arrays
    keep their shapes: the model trains, is masked and exported as before, and a space of the trace fits it; importance, which is of
    channels in their order, has to be measured again.

    Args:
      model: the network, dense, with arrays.
      trace: its trace.
      key: decides which channels are taken out first.
      pattern: (n, m): n of every m consecutive inputs will stay.
      sweeps: how often channels are taken out and put back, at the most.

    Returns:
      The model with its parameters and state in the new order.

    Raises:
      ValueError: if the model is not of the trace, or for no pattern 0 < n < m.
    """
    kept, group = pattern
    if not (is_whole(kept, 1) and is_whole(group, kept + 1)):
        raise ValueError(f"permute_channels expected a pattern (n, m) with 0 < n < m, got {pattern!r}")
    fitting_leaves(trace, model.params)
    orders: dict[Atom, np.ndarray] = {}
    for index, (atom, energy) in enumerate(_energies(model, trace, group)):
        seed = np.asarray(jax.random.key_data(jax.random.fold_in(key, index))).tolist()
        orders[atom] = best_order(energy, kept, group, np.random.default_rng(seed), sweeps)
    return _in_order(model, trace, orders)


def best_order(
    energy: np.ndarray, kept: int, group: int, rng: np.random.Generator, sweeps: int = 20
) -> np.ndarray:
    """An order int `[channels]` of channels in which the largest `kept` of every `group` consecutive ones have much of the energy.

    Args:
      energy: float32 `[channels, rows]`, not negative; `group` divides the number of channels.
      kept: n of the pattern.
      group: m of the pattern.
      rng: decides which channel of a group is taken out.
      sweeps: how often all members of all groups are taken out and put back, at the most.
    """
    members = np.arange(len(energy)).reshape(-1, group)
    total = max(float(energy.sum()), np.finfo(np.float32).tiny)
    before = -np.inf
    for _ in range(sweeps):
        members = rng.permuted(members, axis=1)
        for place in range(group):
            others = np.delete(members, place, axis=1)
            rest = np.sort(energy[others], axis=1)
            # Beside its others a channel adds what it has above the weakest of those that would stay.
            worth = _above(jnp.asarray(energy[members[:, place]]), jnp.asarray(rest[:, group - 1 - kept]))
            channels, groups = optimize.linear_sum_assignment(np.asarray(worth), maximize=True)
            moved = np.empty(len(members), members.dtype)
            moved[groups] = members[channels, place]
            members[:, place] = moved
        after = float(np.sort(energy[members], axis=1)[:, group - kept :].sum())
        if after - before < _LEAST_GAIN * total:
            break
        before = after
    return members.reshape(-1)


@jax.jit
def _above(energy: jax.Array, threshold: jax.Array) -> jax.Array:
    """float32 `[channels, groups]`: the sum over rows of what the energy `[channels, rows]` has above each threshold `[groups, rows]`."""
    return jax.lax.map(lambda row: jnp.maximum(energy - row[None], 0.0).sum(axis=1), threshold).T


def movable_atom(traced: Trace, axis: Axis) -> Atom | None:
    """The atom of an axis, if its units may change places: if no array of the network joins it with others into an axis."""
    atoms = traced.axes.atoms(axis)
    if len(atoms) != 1 or traced.axes.frozen(atoms[0]) is not None:
        return None
    arrays = [traced.flow.terms[value] for value in traced.program.inputs]
    mentions = [traced.axes.resolve(other) for term in arrays for other in term]
    alone = all(other == ((atoms[0],),) for other in mentions if atoms[0] in traced.axes.atoms(other))
    return atoms[0] if alone else None


def _energies(model: Model, trace: Trace, group: int) -> Iterator[tuple[Atom, np.ndarray]]:
    """Every atom that may change its order, and float32 `[units, rows]`: the squares of all that is multiplied by each of its units,
    those of a layer summing to one."""
    written = _in_tables(trace.flow)
    leaves = jax.tree.leaves(model.params)
    found: dict[Atom, list[np.ndarray]] = {}
    for layer in trace.layers:
        if not layer.in_axes:
            continue
        innermost = trace.leaf_term(layer.leaf)[max(layer.in_axes)]
        atom = movable_atom(trace, innermost)
        if atom is None or atom in written or trace.axes.atom_size(atom) % group:
            continue
        kernel = kernel_of(trace, layer)
        squares = np.square(np.asarray(kernel.view(leaves[layer.leaf]), np.float32))
        units = squares.reshape(*squares.shape[:2], -1, kernel.last_input, squares.shape[-1])
        rows = np.moveaxis(units, 3, 0).reshape(kernel.last_input, -1)
        found.setdefault(atom, []).append(rows / max(float(rows.sum()), np.finfo(np.float32).tiny))
    for atom, rows in found.items():
        yield atom, np.concatenate(rows, axis=1)


def _in_tables(flow: Flow) -> set[Atom]:
    """The atoms of arrays that the program itself holds or computes: those do not come in another order."""
    bodies = [body for inner in flow.bodies.values() for body in inner]
    found = {
        atom for value in flow.program.tables for axis in flow.terms[value] for atom in flow.axes.atoms(axis)
    }
    return found.union(*map(_in_tables, bodies))


def _in_order(model: Model, trace: Trace, orders: Mapping[Atom, np.ndarray]) -> Model:
    leaves, structure = jax.tree.flatten((model.params, model.state))
    moved = []
    for leaf, value in zip(leaves, trace.program.inputs):
        for dim, axis in enumerate(trace.flow.terms[value]):
            places = trace.axes.places(axis, orders)
            if (np.diff(places) < 0).any():
                leaf = jnp.take(leaf, places, axis=dim)
        moved.append(leaf)
    params, state = jax.tree.unflatten(structure, moved)
    return dataclasses.replace(model, params=params, state=state)

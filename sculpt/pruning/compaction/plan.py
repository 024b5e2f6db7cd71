"""The compaction plan: the units that every array keeps, and the groups of filters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sculpt.model import Model, Params, State
from sculpt.pruning.compaction.filter_groups import OVERHEAD, FilterGroup, in_order, mask_groups
from sculpt.pruning.compaction.rewriting import units_left
from sculpt.pruning.families.family import Site
from sculpt.pruning.permutation import movable_atom
from sculpt.pruning.space import Space
from sculpt.tracing.axes import Atom
from sculpt.trees import shapes_of


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is kept of every array of a dense model."""

    params: Any
    """Tree of `ShapeDtypeStruct`: the dense parameters."""
    state: Any
    """Likewise, the dense state."""
    places: tuple[tuple[np.ndarray, ...], ...]
    """For every leaf of (params, state), per axis: the units that stay, in their new order."""
    emptied: tuple[tuple[tuple[int, ...], ...], ...]
    """Likewise: which of the atoms of an axis, by their order in it, have lost all units."""
    groups: dict[int, tuple[FilterGroup, ...]]
    """For the leaf of a kernel whose filters keep windows of their own, those that are computed together."""
    rows: tuple[str, ...]
    """A line for every layer, in words: its kernel's shape before and after, and why what stays stays."""

    def slice(self, tree: tuple[Params, State]) -> tuple[Params, State]:
        leaves, treedef = jax.tree.flatten(tree)
        return jax.tree.unflatten(treedef, map(sliced, leaves, self.places))


def sliced(leaf: ArrayLike, places: tuple[np.ndarray, ...]) -> jax.Array:
    """The units that stay along every axis, on the devices that the leaf was on. On the host: on a device each shape would be compiled for."""
    if all(np.array_equal(units, np.arange(n)) for units, n in zip(places, np.shape(leaf))):
        return jnp.asarray(leaf)
    small = np.asarray(leaf)[np.ix_(*places)]
    # An array that nobody has put on a device may be moved to others: where others of a computation are.
    placed = isinstance(leaf, jax.Array) and leaf.committed
    return jax.device_put(small, _fitting(leaf.sharding, small.shape) if placed else None)  # type: ignore[union-attr]


def _fitting(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
    """The sharding, for an array of this shape: axes that devices cannot share evenly are on all of them whole."""
    if not isinstance(sharding, NamedSharding):
        return sharding if sharding.is_fully_replicated else None
    sizes, spec = sharding.mesh.shape, []
    for part, size in zip(sharding.spec, shape):
        names = part if isinstance(part, tuple) else (part,)
        even = part is not None and size % math.prod(sizes[name] for name in names) == 0
        spec.append(part if even else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def grouped_kernels(space: Space) -> list[str]:
    """The paths of the kernels whose filters `rect_grouped` may give windows of their own, sorted."""
    return sorted(space.trace.leaves[leaf].path for _, leaf in _grouped_sites(space))


def _grouped_sites(space: Space) -> list[tuple[Site, int]]:
    """The sites of `rect_grouped`, and the leaf of the kernel of each."""
    return [
        (site, site.kernel.leaf)
        for site in space.sites
        if site.family == "rect_grouped" and site.kernel is not None
    ]


def make_plan(
    model: Model,
    space: Space,
    policy: np.ndarray,
    masks: Any,
    overheads: Mapping[str, int | None],
    reorder: bool = True,
) -> Plan:
    """What stays of a model's arrays under a policy and its masks. Filters with windows of their own are put into groups by `overheads`
    (kernel -> what a group costs, as in `group_filters`), and channels in the groups' order if `reorder`."""
    traced, axes = space.trace, space.trace.axes
    kept = _kept_atoms(space, policy, masks)
    arrays = len(jax.tree.leaves((model.params, model.state)))
    terms = [traced.flow.terms[v] for v in traced.program.inputs[:arrays]]
    groups, orders = _filter_groups(space, masks, kept, overheads, reorder)
    left = units_left(kept, orders)
    places = tuple(tuple(axes.places(axis, left) for axis in term) for term in terms)
    empty = {atom for atom, units in kept.items() if not units.any()}
    emptied = tuple(
        tuple(tuple(i for i, atom in enumerate(axes.atoms(axis)) if atom in empty) for axis in term)
        for term in terms
    )
    rows = _rows(space, policy, places, groups)
    return Plan(shapes_of(model.params), shapes_of(model.state), places, emptied, groups, rows)


def _rows(
    space: Space,
    policy: np.ndarray,
    places: Sequence[tuple[np.ndarray, ...]],
    groups: Mapping[int, tuple[FilterGroup, ...]],
) -> tuple[str, ...]:
    """`Plan.rows`."""
    traced, rows = space.trace, []
    windowed = {leaf for site, leaf in _grouped_sites(space) if policy[site.index] > 0}
    excluded = {atom for site in space.excluded for atom in site.atoms}
    for layer in traced.layers:
        leaf, term = traced.leaves[layer.leaf], traced.leaf_term(layer.leaf)
        small = [len(units) for units in places[layer.leaf]]
        notes = [
            f"axis {f.axis} stays{' in part' if f.in_part else ''}: {f.reason}"
            for f in traced.frozen
            if f.leaf == layer.leaf and f.size > 1 and f.axis not in layer.window_axes
        ]
        notes += [
            f"axis {axis} stays: excluded by you"
            for axis in range(len(term))
            if not excluded.isdisjoint(traced.axes.atoms(term[axis]))
        ]
        if layer.leaf in groups:
            notes.append(f"in groups: {', '.join(map(str, groups[layer.leaf]))}")
        elif layer.leaf in windowed and all(small):
            notes.append("in one piece: groups of filters would cost more than they save")
        rows.append("; ".join([f"{leaf.path} {list(leaf.shape)} -> {small}", *notes]))
    return tuple(rows)


def _filter_groups(
    space: Space,
    masks: Any,
    kept: Mapping[Atom, np.ndarray],
    overheads: Mapping[str, int | None],
    reorder: bool,
) -> tuple[dict[int, tuple[FilterGroup, ...]], dict[Atom, np.ndarray]]:
    """Groups of the filters that stay, for every kernel whose filters have windows of their own, and the units that stay of channels
    that are put in the order of the groups (none unless `reorder`): then nothing has to be put back in order when the network runs.
    """
    traced, leaves = space.trace, jax.tree.leaves(masks)
    groups: dict[int, tuple[FilterGroup, ...]] = {}
    orders: dict[Atom, np.ndarray] = {}
    for site, leaf in _grouped_sites(space):
        layer = traced.layers[site.owner]
        term, (outputs,) = traced.leaf_term(leaf), layer.out_axes
        left = units_left(kept, orders)
        mask = leaves[leaf][np.ix_(*(traced.axes.places(axis, left) for axis in term))]
        overhead = overheads.get(traced.leaves[leaf].path, OVERHEAD)
        found = mask_groups(mask, outputs, layer.window_axes, overhead) if mask.size else ()
        atom = movable_atom(traced, term[outputs]) if reorder else None
        if found and atom is not None and atom not in orders:
            first = traced.axes.places(term[outputs], left)
            orders[atom] = first[[index for group in found for index in group.filters]]
            found = in_order(found)
        groups[leaf] = found
    return {leaf: found for leaf, found in groups.items() if found}, orders


def _kept_atoms(space: Space, policy: np.ndarray, masks: Any) -> dict[Atom, np.ndarray]:
    """What is kept of each atom, read back from the masks: the units that any of their arrays keeps.

    Where single entries were chosen, one array alone may happen to lose all entries of a unit. An array that lost all of them says
    nothing: where nothing stays of one of its axes, that says the policy.
    """
    traced, pruned = space.trace, set(space.atoms)
    kept: dict[Atom, np.ndarray] = {
        atom: np.zeros(size, bool)
        for site in space.sites
        for atom, size, count in zip(site.atoms, site.sizes, site.options[policy[site.index]].counts)
        if count == 0
    }
    for leaf, mask in zip(traced.leaves, jax.tree.leaves(masks)):
        if not mask.any():
            continue
        for dim, axis in enumerate(traced.leaf_term(leaf.index)):
            atoms = pruned & set(traced.axes.atoms(axis))
            if atoms:
                used = mask.any(axis=tuple(d for d in range(mask.ndim) if d != dim))
                found: dict[Atom, np.ndarray] = {}
                traced.axes.infer(axis, used, found)
                for atom in atoms:
                    units = found.get(atom, np.ones(traced.axes.atom_size(atom), bool))
                    kept[atom] = kept.get(atom, np.zeros_like(units)) | units
    return {atom: units for atom, units in kept.items() if not units.all()}

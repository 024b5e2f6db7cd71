"""The sizes that a layer can be left with by the options of a space, and those at which it is measured.

Time is no smooth function of the number of channels: libraries compute so many at once, and 56 of 64 may take longer than all. With up
to two dimensions that shrink, a layer is measured at all sizes of either. Of more, all sizes of the two that have most, the others whole,
are a correction to a coarse grid of all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import interpolate

from sculpt.pruning import Space
from sculpt.pruning.rewrite import REWRITES, Sizes
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.program import Equation, Literal

_LAYERS = ("conv_general_dilated", "dot_general")
_LEVELS = 8
"""Sizes along a dimension, at the most, at which a layer is measured."""
_FEWER_LEVELS = 3
"""The same of the coarse grid of a layer with more than two dimensions that shrink."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A contraction, and the sites that its size depends on."""

    equation: Equation
    sites: tuple[int, ...]
    options: np.ndarray
    """int32 `[combinations, sites]`: every combination of their options, the last site's changing fastest."""
    dimensions: Mapping[Axis, int]
    """Which dimension the size of an axis of its operands belongs to; none for axes that stay."""
    sizes: np.ndarray
    """int64 `[combinations, dimensions]`: the size along each; where several that go together are one dimension, as in a grouped
    convolution, their product."""
    levels: tuple[np.ndarray, ...]
    """Sizes along each dimension of the grid on which it is measured, rising; no layer of size 0 is."""
    fine: Mapping[int, np.ndarray]
    """Of those dimensions of which the grid has not all, more sizes, at which it is measured with the others whole."""

    @property
    def points(self) -> list[tuple[int, ...]]:
        """The sizes along every dimension at which it is measured: those of the grid, then the finer ones; the last dimension's changing
        fastest."""
        whole = [levels[-1:] for levels in self.levels]
        finer = [self.fine.get(dim, levels) for dim, levels in enumerate(whole)]
        grids = [self.levels, finer] if self.fine else [self.levels]
        return [tuple(map(int, point)) for grid in grids for point in itertools.product(*grid)]

    def interpolated(self, measured: np.ndarray) -> np.ndarray:
        """Values under every combination of options, float64 `[combinations]`, from those at its points; 0 where nothing is left."""
        if not self.levels:
            return np.full(len(self.sizes), measured[0])
        count = math.prod(map(len, self.levels))
        coarse = interpolate.RegularGridInterpolator(
            self.levels, measured[:count].reshape([len(levels) for levels in self.levels])
        )
        sizes = np.maximum(self.sizes, [levels[0] for levels in self.levels])
        found = coarse(sizes)
        if self.fine:
            dims = list(self.fine)
            finer = interpolate.RegularGridInterpolator(
                list(self.fine.values()), measured[count:].reshape([len(self.fine[dim]) for dim in dims])
            )
            others_whole = np.tile([levels[-1] for levels in self.levels], (len(sizes), 1))
            others_whole[:, dims] = sizes[:, dims]
            found = found * finer(sizes[:, dims]) / coarse(others_whole)
        return np.where((self.sizes == 0).any(axis=1), 0.0, found)


class _GridSizes(Sizes):
    """What is kept where every dimension has a size of its own, whether or not one policy gives them all, and of so many images."""

    def __init__(self, space: Space, part: Part, point: Sequence[int], batch: int) -> None:
        flow = space.trace.flow
        super().__init__(flow, flow.program, {})
        self._batch = batch
        images = flow.terms[flow.program.inputs[-1]][0]
        self._images, self._traced_batch = set(flow.axes.atoms(images)), flow.axes.size(images)
        self._dimensions = part.dimensions
        self._kept = []
        for column, size in zip(part.sizes.T, point):
            example = int(np.flatnonzero(column == size)[0])
            self._kept.append(_kept(space, part.sites, part.options[example]))

    def shrinks(self, axis: Axis) -> bool:
        return axis in self._dimensions

    def count(self, axis: Axis, dense: int) -> int:
        count = super().count(axis, dense)
        if self._images.issubset(self.flow.axes.atoms(axis)):
            return count * self._batch // self._traced_batch
        return count

    def units(self, axis: Axis) -> np.ndarray:
        kept = self._kept[self._dimensions[axis]] if axis in self._dimensions else {}
        return np.asarray(self.flow.axes.keep(axis, kept))


def find_parts(space: Space) -> list[Part]:
    """The contractions of a network.

    Raises:
      ValueError: if there is none outside loops.
    """
    flow = space.trace.flow
    site_of = {
        atom: int(site)
        for atom, site, compacts in zip(space.atoms, space.atom_site, space.compacts)
        if compacts
    }
    parts = []
    for eqn in flow.program.equations:
        if eqn.name not in _LAYERS or flow.program.is_table(eqn):
            continue
        axes = [axis for value in eqn.inputs if not isinstance(value, Literal) for axis in flow.terms[value]]
        atoms = {atom for axis in axes for atom in flow.axes.atoms(axis)}
        sites = tuple(sorted({site_of[atom] for atom in atoms if atom in site_of}))
        counts = [len(space.sites[site].options) for site in sites]
        options = (
            np.indices(counts, np.int32).reshape(len(counts), -1).T if counts else np.zeros((1, 0), np.int32)
        )
        parts.append(_part(space, eqn, axes, sites, options))
    if not parts:
        raise ValueError("this network has no layers outside loops that could be measured by themselves")
    return parts


def sizes_of(space: Space, part: Part, batch: int) -> Iterator[tuple[list[tuple[int, ...]], dict[str, Any]]]:
    """Shapes of a part's operands for so many images, and its parameters, at each of its points."""
    eqn = part.equation
    for point in part.points:
        sizes = _GridSizes(space, part, point, batch)
        shapes = [np.shape(i.value) if isinstance(i, Literal) else sizes.shape(i) for i in eqn.inputs]
        rewritten = REWRITES[eqn.name](sizes, eqn) if eqn.name in REWRITES and part.levels else {}
        params = {**eqn.params, **rewritten}
        if eqn.name == "conv_general_dilated":
            # Kernels of every image's own are groups, as many as images.
            numbers = params["dimension_numbers"]
            groups = shapes[0][numbers.lhs_spec[1]] // shapes[1][numbers.rhs_spec[1]]
            params["feature_group_count"] = groups
        yield shapes, params


def _part(
    space: Space, eqn: Equation, axes: Sequence[Axis], sites: tuple[int, ...], options: np.ndarray
) -> Part:
    counts = {
        atom: np.asarray([option.counts[place] for option in space.sites[site].options])[options[:, column]]
        for column, site in enumerate(sites)
        for place, atom in enumerate(space.sites[site].atoms)
    }
    site_of = {atom: site for site in sites for atom in space.sites[site].atoms}
    flow_axes = space.trace.axes
    joined: list[tuple[set[int], dict[Axis, np.ndarray]]] = []
    for axis in dict.fromkeys(axes):
        size = np.zeros(len(options), np.int64)
        for coefficient, atoms in flow_axes.monomials(axis):
            size += coefficient * math.prod(counts.get(atom, flow_axes.atom_size(atom)) for atom in atoms)
        if (size != size[0]).any():
            found = site_of.keys() & set(flow_axes.atoms(axis))
            own = {site_of[atom] for atom in found if space.sites[site_of[atom]].family == "channels"}
            members = {axis: size}
            # Axes of the same channels go together; a window's height and width are looked at apart.
            for other in [other for other in joined if other[0] & own]:
                joined.remove(other)
                own, members = own | other[0], {**other[1], **members}
            joined.append((own, members))
    columns = []
    for _, members in joined:
        distinct = {np.unique(size, return_inverse=True)[1].tobytes(): size for size in members.values()}
        columns.append(np.prod([*distinct.values()], axis=0))
    distinct_sizes = [np.unique(column[column > 0]) for column in columns]
    most, fine = (_LEVELS, {}) if len(columns) <= 2 else (_FEWER_LEVELS, _finer(distinct_sizes))
    return Part(
        eqn,
        sites,
        options,
        {axis: dim for dim, (_, members) in enumerate(joined) for axis in members},
        np.stack(columns, axis=1) if columns else np.zeros((len(options), 0), np.int64),
        tuple(_evenly(sizes, most) for sizes in distinct_sizes),
        fine,
    )


def _finer(sizes: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """All sizes, `_LEVELS` at the most, of the two dimensions that have most of them."""
    most = sorted(range(len(sizes)), key=lambda dim: -len(sizes[dim]))[:2]
    return {dim: _evenly(sizes[dim], _LEVELS) for dim in sorted(most) if len(sizes[dim]) > _FEWER_LEVELS}


def _kept(space: Space, sites: Sequence[int], options: np.ndarray) -> dict[Atom, np.ndarray]:
    """Which units of the sites' atoms stay: how many is what counts, and that those of a window are neighbours."""
    return {
        atom: np.arange(size) < count
        for site, option in zip(sites, options)
        for atom, size, count in zip(
            space.sites[site].atoms, space.sites[site].sizes, space.sites[site].options[option].counts
        )
        if count < size
    }


def _evenly(values: np.ndarray, number: int) -> np.ndarray:
    """So many of rising values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(number, len(values))).round().astype(int)
    return values[places]

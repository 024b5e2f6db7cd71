"""The sizes that a layer can have under the options of a space, and those that are measured.

Time is no smooth function of the number of channels: libraries compute so many at once, and 56 of 64 may take longer than all; a window of
2 x 3 is computed in other ways than one of 3 x 3. So a layer can be measured at all its sizes together, up to eight of each dimension, where
they are not too many and it is not too large. Else all sizes of the two dimensions that have most, the others whole, correct what a coarse
grid of all dimensions says. Channels that several sites add up to may be any number, 49 of 64 among them, which can take twice as long as
48: all these numbers, with some of the other channels' and whole windows, are a correction too. Filters in groups (`rect_grouped`) are
another, measured on the whole layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sculpt.ir.program import CONTRACTIONS, Equation, FlatProgram, Literal
from sculpt.latency.layer_grid import Dimension, Part
from sculpt.pruning.space import Space
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.layers import transposed_dimensions
from sculpt.tracing.tracer import TRACED_BATCH

_LEVELS = 8
"""Sizes along a dimension, at the most, at which a layer is measured."""
_FEWER_LEVELS = 3
"""The same of the coarse grid of a large layer with more than two dimensions that shrink."""
_WORK = 1e11
"""Multiply-accumulates of the whole layer times the points of a grid, up to which all sizes are measured together."""
_SUMS = 64
"""Sizes, at the most, at which a layer is measured along a dimension that several sites add up to."""
_POINTS = 600
"""The same of the points: each is compiled, and takes a tenth of a second at the least."""


def find_parts(space: Space, batch: int, all_sizes: bool = False) -> list[Part]:
    """The contractions of a network, to be measured on so many images, where `all_sizes` says so at all sizes together.

    Raises:
      ValueError: if there is none outside loops.
    """
    flow, counts = space.trace.flow, _Counts(space)
    grouped = {
        id(space.trace.layers[site.owner].equation): site
        for site in space.sites
        if site.family == "rect_grouped"
    }
    parts = []
    for eqn in flow.program.equations:
        if eqn.name not in CONTRACTIONS or flow.program.is_table(eqn) or eqn.name == "ragged_dot_general":
            continue
        axes = [axis for value in eqn.inputs if not isinstance(value, Literal) for axis in flow.terms[value]]
        dimensions = tuple(_dimensions(counts, eqn, axes))
        sizes = [dimension.regular for dimension in dimensions]
        levels, corrections = tuple(_evenly(found, _LEVELS) for found in sizes), []
        points = math.prod(map(len, levels))
        work = float(points) * _macs(flow.program, eqn) * batch / TRACED_BATCH
        if len(sizes) > 2 and (not all_sizes or work > _WORK or points > _POINTS):
            levels = tuple(_evenly(found, _FEWER_LEVELS) for found in sizes)
            corrections = [finer] if (finer := _finer(sizes)) else []
        beside = levels if all_sizes else [_evenly(own, _FEWER_LEVELS) for own in sizes]
        corrections += [
            _summed(dimensions, beside, dim)
            for dim, dimension in enumerate(dimensions)
            if len(dimension.examples) > len(dimension.regular)
        ]
        parts.append(Part(eqn, dimensions, levels, tuple(corrections), grouped.get(id(eqn))))
    if not parts:
        raise ValueError("this network has no layers outside loops that could be measured by themselves")
    return parts


def _macs(program: FlatProgram, eqn: Equation) -> int:
    """Multiply-accumulates at the sizes that the program was traced with."""
    first, kernel = (program.shape(value) for value in eqn.inputs)
    numbers, result = eqn.params["dimension_numbers"], list(program.shape(eqn.outputs[0]))
    if eqn.name == "conv_general_dilated":
        summed = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        for i, o, transposed in zip(
            numbers.lhs_spec[2:], numbers.out_spec[2:], transposed_dimensions(eqn, kernel)
        ):
            result[o] = min(result[o], first[i]) if transposed else result[o]
    else:
        summed = math.prod(first[dim] for dim in numbers[0][0])
    return math.prod(result) * summed


class _Counts:
    """Sizes of axes under options of sites."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.axes = space.trace.axes
        self.site_of = {
            atom: int(site)
            for atom, site, compacts in zip(space.atoms, space.atom_site, space.compacts)
            if compacts
        }

    def sites(self, axes: Iterable[Axis]) -> list[int]:
        """The sites whose options change these axes, or could."""
        atoms = {atom for axis in axes for atom in self.axes.atoms(axis)}
        return sorted({self.site_of[atom] for atom in atoms if atom in self.site_of})

    def size(self, axis: Axis, options: Mapping[int, int]) -> int:
        """The size of an axis under these options of sites, all else whole."""
        return sum(
            c * math.prod(self._count(atom, options) for atom in atoms)
            for c, atoms in self.axes.monomials(axis)
        )

    def shrinks(self, axis: Axis) -> bool:
        """Whether any option of a site changes its size."""
        return any(
            self.size(axis, {site: option}) != self.axes.size(axis)
            for site in self.sites([axis])
            for option in range(len(self.space.sites[site].options))
        )

    def is_sum(self, axis: Axis) -> bool:
        """Whether every site adds to the size of an axis by itself."""
        return all(
            len({self.site_of[atom] for atom in atoms if atom in self.site_of}) <= 1
            for _, atoms in self.axes.monomials(axis)
        )

    def _count(self, atom: Atom, options: Mapping[int, int]) -> int:
        chosen = options.get(self.site_of.get(atom, -1))
        if chosen is None:
            return self.axes.atom_size(atom)
        site = self.space.sites[self.site_of[atom]]
        return site.options[chosen].counts[site.atoms.index(atom)]


def _dimensions(counts: _Counts, eqn: Equation, axes: Iterable[Axis]) -> Iterator[Dimension]:
    """One for all axes of one size, if it is a sum over sites; one for every site of axes that it multiplies."""
    alike: dict[Any, list[Axis]] = {}
    in_groups = eqn.params.get("feature_group_count", 1) > 1
    for axis in filter(counts.shrinks, dict.fromkeys(axes)):
        window = all(counts.space.sites[site].family != "channels" for site in counts.sites([axis]))
        # The channels of a convolution in groups depend on one another, those of other layers do not.
        size = tuple(sorted(counts.axes.monomials(axis)))
        alike.setdefault(None if in_groups and not window else size, []).append(axis)
    for size, members in alike.items():
        sites = counts.sites(members)
        if size is not None and len(sites) > 1 and counts.is_sum(members[0]):
            yield _sum_dimension(counts, tuple(members), sites)
        else:
            yield from (_site_dimension(counts, members, site) for site in sites)


def _site_dimension(counts: _Counts, axes: Sequence[Axis], site: int) -> Dimension:
    """What the options of one site leave of the axes that it changes; their size is taken with all other sites whole."""
    own = tuple(axis for axis in axes if site in counts.sites([axis]))
    examples = [{site: option} for option in range(len(counts.space.sites[site].options))]
    sizes = [counts.size(own[0], options) for options in examples]
    rising = _rising(dict(zip(sizes, examples)))
    return Dimension(own, {site: np.arange(len(sizes))}, np.asarray(sizes), rising, np.asarray(list(rising)))


def _sum_dimension(counts: _Counts, axes: tuple[Axis, ...], sites: Sequence[int]) -> Dimension:
    """The size of axes that is a sum over sites."""
    dense = counts.axes.size(axes[0])
    numbers = {site: len(counts.space.sites[site].options) for site in sites}
    less = {
        site: np.asarray([dense - counts.size(axes[0], {site: option}) for option in range(number)])
        for site, number in numbers.items()
    }
    unit = math.gcd(*(int(n) for own in less.values() for n in own))
    most = sum(int(own.max()) for own in less.values())
    # The same level of all sites gives sizes all the way down.
    together = [
        {site: min(level, number - 1) for site, number in numbers.items()}
        for level in range(max(numbers.values()))
    ]
    regular = {counts.size(axes[0], options): options for options in together}
    others = {dense - lost: options for lost, options in _losses(less).items() if dense - lost not in regular}
    some = _evenly(np.asarray(sorted(others)), max(0, _SUMS - len(regular)))
    steps = {site: own // unit for site, own in less.items()}
    return Dimension(
        axes,
        steps,
        dense - unit * np.arange(most // unit + 1),
        _rising(regular | {int(size): others[int(size)] for size in some}),
        np.asarray(list(_rising(regular))),
    )


def _losses(less: Mapping[int, np.ndarray]) -> dict[int, dict[int, int]]:
    """All that sites may take away together -> options that do."""
    found: dict[int, dict[int, int]] = {0: {}}
    for site, own in less.items():
        more: dict[int, dict[int, int]] = {}
        for lost, options in found.items():
            for option, number in enumerate(own):
                if lost + int(number) not in more:
                    more[lost + int(number)] = {**options, site: option}
        found = more
    return found


def _rising(examples: Mapping[int, Mapping[int, int]]) -> dict[int, Mapping[int, int]]:
    return {size: examples[size] for size in sorted(examples) if size > 0}


def _evenly(values: np.ndarray, number: int) -> np.ndarray:
    """So many of rising values, the first and the last among them."""
    places = np.linspace(0, len(values) - 1, min(number, len(values))).round().astype(int)
    return values[places]


def _summed(dimensions: Sequence[Dimension], levels: Sequence[np.ndarray], dim: int) -> dict[int, np.ndarray]:
    """All sizes of a dimension that several sites add up to, with these levels of the largest other one: how slow 49 channels are depends
    on how many there are on the other side."""
    others = sorted(
        (other for other in range(len(levels)) if other != dim), key=lambda other: -levels[other][-1]
    )
    own = {dim: np.asarray(list(dimensions[dim].examples))} | {other: levels[other] for other in others[:1]}
    return {which: own[which] for which in sorted(own)}


def _finer(sizes: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """All sizes, `_LEVELS` at the most, of the two dimensions that have most of them."""
    most = sorted(range(len(sizes)), key=lambda dim: -len(sizes[dim]))[:2]
    return {dim: _evenly(sizes[dim], _LEVELS) for dim in sorted(most) if len(sizes[dim]) > _FEWER_LEVELS}

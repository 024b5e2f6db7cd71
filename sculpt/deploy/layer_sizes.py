"""The sizes that a layer can be left with by the options of a space, and those at which it is measured.

Time is no smooth function of the number of channels: libraries compute so many at once, and 56 of 64 may take longer than all; a window of
2 x 3 is computed in other ways than one of 3 x 3. So a layer can be measured at all its sizes together, up to eight of each dimension, where
they are not too many and it is not too large. Else all sizes of the two dimensions that have most, the others whole, correct what a coarse
grid of all dimensions says. Channels that several sites add up to may be any number, 49 of 64 among them, which can take twice as long as
48: all these numbers, with those of the other channels and the windows whole, are a correction too. Filters in groups (`rect_grouped`) are another, measured on the whole
layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import interpolate

from sculpt.deploy.layer_alone import Layer
from sculpt.pruning import Site, Space
from sculpt.pruning.family import Choice
from sculpt.pruning.filter_groups import in_groups, mask_groups
from sculpt.pruning.rewrite import REWRITES, Sizes
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.program import CONTRACTIONS, Equation, Literal, Program

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


@dataclasses.dataclass(frozen=True, eq=False)
class Dimension:
    """A size of a layer that the options of one site change, or of several that add up to it. Its place in tables is the sum of what the
    option of every site adds."""

    axes: tuple[Axis, ...]
    """Those of the operands that it changes."""
    steps: Mapping[int, np.ndarray]
    """Site -> int64 `[options]`: what each adds to the place."""
    sizes: np.ndarray
    """int64 `[places]`."""
    examples: Mapping[int, Mapping[int, int]]
    """Rising sizes above 0 -> the options of the sites that give them; the layer can be measured there."""
    regular: np.ndarray
    """int64, rising: those of them that grids consist of."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A contraction, and what its time depends on."""

    equation: Equation
    dimensions: tuple[Dimension, ...]
    levels: tuple[np.ndarray, ...]
    """Sizes along each dimension of the grid on which it is measured, rising."""
    corrections: tuple[Mapping[int, np.ndarray], ...]
    """More rising sizes along some of the dimensions, at which it is measured with the others whole."""
    grouped: Site | None
    """The site that gives its filters windows of their own."""

    @property
    def points(self) -> list[tuple[int, ...]]:
        """The sizes along every dimension at which it is measured: those of the grid, then those of every correction; the last
        dimension's changing fastest."""
        return [
            point for grid in self._grids for point in itertools.product(*(map(int, own) for own in grid))
        ]

    @property
    def _grids(self) -> list[list[np.ndarray]]:
        whole = [levels[-1:] for levels in self.levels]
        corrected = [[own.get(dim, last) for dim, last in enumerate(whole)] for own in self.corrections]
        return [list(self.levels), *corrected]

    @property
    def steps(self) -> dict[int, np.ndarray]:
        """Site -> int64 `[options]`: what each adds to the place in `table`."""
        lengths = [len(dimension.sizes) for dimension in self.dimensions]
        steps: dict[int, np.ndarray] = {}
        if self.grouped is not None:
            steps[self.grouped.index] = np.arange(len(self.grouped.options))
        below = math.prod(len(site.options) for site in (self.grouped,) if site is not None)
        for dimension, length in reversed(list(zip(self.dimensions, lengths))):
            for site, own in dimension.steps.items():
                steps[site] = steps.get(site, 0) + below * own
            below *= length
        return steps

    def table(self, measured: np.ndarray) -> np.ndarray:
        """Values at every place, float64 `[places]`, from those at its points and those of the options of `grouped` but the first; 0 where
        nothing is left."""
        count = len(self.points)
        values = self._interpolated(measured[:count])
        if self.grouped is None:
            return values
        whole = self.points.index(tuple(int(levels[-1]) for levels in self.levels))
        factors = np.concatenate([[1.0], measured[count:] / measured[whole]])
        return (values[:, None] * factors[None, :]).reshape(-1)

    def _interpolated(self, measured: np.ndarray) -> np.ndarray:
        if not self.dimensions:
            return measured
        # What the grid says, times what corrects it there: each factor is 1 where it was right already.
        factors: list[Callable[[np.ndarray], np.ndarray]] = []
        done = 0
        for grid in self._grids:
            points = _product(grid)
            found = measured[done : done + len(points)]
            factors.append(_interpolator(grid, found / math.prod(factor(points) for factor in factors)))
            done += len(points)
        places = _product([dimension.sizes for dimension in self.dimensions])
        values = math.prod(factor(places) for factor in factors)
        return np.where((places == 0).any(axis=1), 0.0, values)


def _product(grid: Sequence[np.ndarray]) -> np.ndarray:
    """All points of a grid, `[points, dimensions]`, the last dimension changing fastest."""
    return np.stack([sizes.reshape(-1) for sizes in np.meshgrid(*grid, indexing="ij")], axis=1)


def _interpolator(grid: Sequence[np.ndarray], values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From points `[number, dimensions]` to values `[number]`; where a grid has one size it is the same at all others."""
    dims = [dim for dim, levels in enumerate(grid) if len(levels) > 1]
    if not dims:
        return lambda points: np.broadcast_to(values, (len(points),))
    levels = [grid[dim] for dim in dims]
    between = interpolate.RegularGridInterpolator(levels, values.reshape([len(own) for own in levels]))
    lowest, highest = (np.asarray([own[end] for own in levels]) for end in (0, -1))
    return lambda points: between(np.clip(points[:, dims], lowest, highest))


class _SizesAtPoint(Sizes):
    """What is kept where every dimension has a size of its own, whether or not one policy gives them all, and of so many images."""

    def __init__(
        self, space: Space, choices: Sequence[Choice], part: Part, point: Sequence[int], batch: int
    ) -> None:
        flow = space.trace.flow
        super().__init__(flow, flow.program, {})
        self._batch = batch
        images = flow.terms[flow.program.inputs[-1]][0]
        self._images, self._traced_batch = set(flow.axes.atoms(images)), flow.axes.size(images)
        self._kept: dict[Axis, dict[Atom, np.ndarray]] = {}
        windows = _windows(space, choices, part, point)
        for dimension, size in zip(part.dimensions, point):
            kept = _kept(space, dimension.examples[size]) | windows
            for axis in dimension.axes:
                self._kept.setdefault(axis, {}).update(kept)

    def shrinks(self, axis: Axis) -> bool:
        return axis in self._kept

    def count(self, axis: Axis, dense: int) -> int:
        count = super().count(axis, dense)
        if self._images.issubset(self.flow.axes.atoms(axis)):
            return count * self._batch // self._traced_batch
        return count

    def units(self, axis: Axis) -> np.ndarray:
        return np.asarray(self.flow.axes.keep(axis, self._kept.get(axis, {})))


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
    images = flow.terms[flow.program.inputs[-1]][0]
    parts = []
    for eqn in flow.program.equations:
        if eqn.name not in CONTRACTIONS or flow.program.is_table(eqn):
            continue
        axes = [axis for value in eqn.inputs if not isinstance(value, Literal) for axis in flow.terms[value]]
        dimensions = tuple(_dimensions(counts, eqn, axes))
        sizes = [dimension.regular for dimension in dimensions]
        levels, corrections = tuple(_evenly(found, _LEVELS) for found in sizes), []
        points = math.prod(map(len, levels))
        work = float(points) * _macs(flow.program, eqn) * batch / flow.axes.size(images)
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


def _macs(program: Program, eqn: Equation) -> int:
    """Multiply-accumulates at the sizes that the program was traced with."""
    first, kernel = (program.shape(value) for value in eqn.inputs)
    numbers = eqn.params["dimension_numbers"]
    if eqn.name == "conv_general_dilated":
        summed = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    else:
        summed = math.prod(first[dim] for dim in numbers[0][0])
    return math.prod(program.shape(eqn.outputs[0])) * summed


def layers_of(space: Space, choices: Sequence[Choice], part: Part, batch: int) -> Iterator[Layer]:
    """A part for so many images at each of its points, then whole under each option of its `grouped` site but the first, as chosen."""
    for point in part.points:
        yield _layer(part.equation, _SizesAtPoint(space, choices, part, point, batch), bool(point))
    if part.grouped is None:
        return
    site, layer = part.grouped, space.trace.layers[part.grouped.owner]
    entries = np.asarray(choices[site.index].entries)
    whole = tuple(int(levels[-1]) for levels in part.levels)
    _, shapes, static = _layer(part.equation, _SizesAtPoint(space, choices, part, whole, batch), bool(whole))
    for option in range(1, len(site.options)):
        groups = mask_groups((entries >> option) & 1 > 0, layer.out_axes[0], layer.window_axes)
        yield part.equation, shapes, in_groups(static, groups) if groups else static


def _layer(eqn: Equation, sizes: Sizes, shrinks: bool) -> Layer:
    shapes = [np.shape(i.value) if isinstance(i, Literal) else sizes.shape(i) for i in eqn.inputs]
    rewritten = REWRITES[eqn.name](sizes, eqn) if eqn.name in REWRITES and shrinks else {}
    params = {**eqn.params, **rewritten}
    if eqn.name == "conv_general_dilated":
        # Kernels of every image's own are groups, as many as images.
        numbers = params["dimension_numbers"]
        params["feature_group_count"] = shapes[0][numbers.lhs_spec[1]] // shapes[1][numbers.rhs_spec[1]]
    return eqn, shapes, params


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


def _kept(space: Space, options: Mapping[int, int]) -> dict[Atom, np.ndarray]:
    """Which units of the sites' atoms stay: how many is what counts, and that those of a window are neighbours."""
    return {
        atom: np.arange(size) < count
        for site, option in options.items()
        for atom, size, count in zip(
            space.sites[site].atoms, space.sites[site].sizes, space.sites[site].options[option].counts
        )
        if count < size
    }


def _windows(
    space: Space, choices: Sequence[Choice], part: Part, point: Sequence[int]
) -> dict[Atom, np.ndarray]:
    """What stays of the atoms of windows, whose sides are dimensions of their own: where an option has both, the window that it is here,
    for one entry in the centre is a matrix product, which at the edge it is not. Of mirror images, where they take the same time, always one."""
    counts: dict[int, dict[Atom, int]] = {}
    for dimension, size in zip(part.dimensions, point):
        atoms = {atom for axis in dimension.axes for atom in space.trace.axes.atoms(axis)}
        for index, option in dimension.examples[size].items():
            site = space.sites[index]
            if site.family != "channels":
                own = dict(zip(site.atoms, site.options[option].counts))
                counts.setdefault(index, {}).update(
                    {atom: count for atom, count in own.items() if atom in atoms}
                )
    params, windows = part.equation.params, {}
    even = all(low == high for low, high in params.get("padding", ()))
    mirrors = even and all(stride == 1 for stride in params.get("window_strides", ()))
    for index, asked in counts.items():
        site = space.sites[index]
        for option, keeps in zip(site.options, zip(*map(np.asarray, choices[index].keeps))):
            own = dict(zip(site.atoms, option.counts))
            if all(own[atom] == count for atom, count in asked.items()):
                windows |= {
                    atom: np.asarray(max(tuple(keep), tuple(keep[::-1]))) if mirrors else keep
                    for atom, keep in zip(site.atoms, keeps)
                }
                break
    return windows


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

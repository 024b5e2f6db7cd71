"""The grid of sizes at which a layer is measured, and interpolation between them.

A grid of all dimensions comes first. What is measured besides corrects what the grid says there: the other dimensions are then whole.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import interpolate

from sculpt.ir.program import Equation
from sculpt.pruning.families.family import Site
from sculpt.tracing.axes import Axis


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

"""A layer at the points of its grid: kept units of its operands, and static parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from sculpt.ir.program import Equation, Literal
from sculpt.latency.layer_alone import Layer
from sculpt.latency.layer_grid import Part
from sculpt.pruning.compaction.filter_groups import in_groups, mask_groups
from sculpt.pruning.compaction.rewriting import REWRITES, Sizes
from sculpt.pruning.families.family import Choice
from sculpt.pruning.space import Space
from sculpt.tracing.axes import Atom, Axis
from sculpt.tracing.tracer import TRACED_BATCH


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


class _SizesAtPoint(Sizes):
    """What is kept where every dimension has a size of its own, whether or not one policy gives them all, and of so many images."""

    def __init__(
        self, space: Space, choices: Sequence[Choice], part: Part, point: Sequence[int], batch: int
    ) -> None:
        flow = space.trace.flow
        super().__init__(flow, flow.program, {})
        self._batch = batch
        images = flow.program.inputs[-len(jax.tree.leaves(space.trace.inputs)) :]
        # The atoms of the batch of each input.
        self._images = [set(flow.axes.atoms(flow.terms[value][0])) for value in images]
        if not all(self._images):
            raise ValueError(
                "latencies of layers are measured for a batch of any size, and this network takes its batch apart, image by image: "
                "choose another resource"
            )
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
        atoms = self.flow.axes.atoms(axis)
        if any(batch.issubset(atoms) for batch in self._images):
            return count * self._batch // TRACED_BATCH
        return count

    def units(self, axis: Axis) -> np.ndarray:
        return np.asarray(self.flow.axes.keep(axis, self._kept.get(axis, {})))


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

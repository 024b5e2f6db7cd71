"""The table of pattern families, and the families `channels` and `rect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sculpt.ir.program import Equation, Operand
from sculpt.pruning.families import sparse
from sculpt.pruning.families.family import Choice, Family, Limits, Option, Site, entry_energy, rank_of
from sculpt.pruning.families.filter_windows import choose_filter_windows, filter_window_sites
from sculpt.pruning.importance.scores import Importance
from sculpt.pruning.importance.weights import unit_energy, window_energy
from sculpt.pruning.widths import kept_counts
from sculpt.tracing.branches import branch_atoms
from sculpt.tracing.layers import RENAMING
from sculpt.tracing.tracer import Trace

ROUND_TO = {"cpu": 8, "gpu": 8, "tpu": 128}
"""Multiples of columns that fill what a device computes with at once: registers of AVX2 (float32), tensor cores in half precision, the
matrix units of TPUs."""


def _channel_sites(trace: Trace, limits: Limits) -> list[Site]:
    sites = []
    branches = branch_atoms(trace, limits.kept_leaves) if limits.min_keep == 0 else frozenset()
    offered = kept_counts(trace, limits)
    for group in trace.groups:
        if group.atom not in offered:
            continue
        counts = offered[group.atom]
        if group.atom in branches:
            levels = group.size if limits.levels == "all" else limits.levels
            counts = {**counts, 0: f"0/{levels}"}
        options = tuple(Option(label, count / group.size, (count,)) for count, label in counts.items())
        if len(options) > 1:
            sites.append(Site(0, group.name, "channels", (group.atom,), (group.size,), group.index, options))
    return sites


def _channel_scores(
    trace: Trace, site: Site, leaves: Sequence[Any], importance: Importance | None
) -> jax.Array:
    if importance is None:
        return unit_energy(trace, trace.groups[site.owner], leaves)
    return jnp.asarray(importance.scores[site.owner])


def _choose_channels(options: tuple[Option, ...], scores: jax.Array) -> Choice:
    """The units of highest score; of equal ones the first."""
    rank = rank_of(scores)
    counts = jnp.asarray([option.counts[0] for option in options], jnp.int32)
    keep = rank[None, :] < counts[:, None]
    worth = jnp.maximum(scores, 0.0)
    # Where no unit is worth anything they count alike, so that keeping all still retains all.
    worth = jnp.where(worth.sum() > 0, worth, 1.0)
    return Choice((keep,), jnp.where(keep, worth[None, :], 0.0).sum(axis=1) / worth.sum())


def window_shapes(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The windows offered for a kernel, largest first: (3, 3) gives 3x3, 2x3, 3x2, 2x2, 3x1, 1x3, 1x1.

    Each side may keep all, about two thirds, or about one third of its length. Of the shapes that mix two thirds with one
    third (2x1) none is offered: the measured gain over their neighbours is nil.
    """
    sides = [tuple(dict.fromkeys((n, -(-2 * n // 3), -(-n // 3)))) for n in kernel]
    shapes: list[tuple[int, ...]] = [()]
    for side in sides:
        shapes = [(*shape, n) for shape in shapes for n in side]
    level = [{n: i for i, n in enumerate(side)} for side in sides]
    offered = [s for s in shapes if {level[d][n] for d, n in enumerate(s)} != {1, 2}]
    return sorted(offered, key=lambda s: (-_product(s), max(s) - s[-1], s))


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _rect_sites(trace: Trace, limits: Limits) -> list[Site]:
    sites, seen = [], set()
    uses: dict[int, int] = {}
    for layer in trace.layers:
        uses[layer.leaf] = uses.get(layer.leaf, 0) + 1
    readers: dict[Operand, list[Equation]] = {}
    for eqn in trace.program.equations:
        for value in eqn.inputs:
            readers.setdefault(value, []).append(eqn)

    def reads(value: Operand) -> int:
        """How often a kernel is read, as it is or cast, transposed or reshaped."""
        return sum(reads(eqn.outputs[0]) if eqn.name in RENAMING else 1 for eqn in readers.get(value, ()))

    for layer in trace.layers:
        # A kernel used twice, or used other than by a convolution, keeps its window.
        read_elsewhere = reads(trace.program.inputs[layer.leaf]) > 1
        if not layer.window or layer.leaf in seen or uses[layer.leaf] > 1 or read_elsewhere:
            continue
        seen.add(layer.leaf)
        sizes = tuple(trace.axes.atom_size(a) for a in layer.window)
        options = tuple(
            Option("x".join(map(str, shape)), _product(shape) / _product(sizes), shape)
            for shape in window_shapes(sizes)
        )
        if len(options) > 1:
            sites.append(Site(0, layer.name, "rect", layer.window, sizes, layer.index, options))
    return sites


def _window_scores(
    trace: Trace, site: Site, leaves: Sequence[Any], importance: Importance | None
) -> jax.Array:
    """Energy, whatever the importance, which is of channels and says nothing of windows."""
    layer = trace.layers[site.owner]
    return window_energy(leaves[layer.leaf], layer.window_axes)


def _choose_window(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """The windows of highest energy."""
    total = jnp.maximum(energy.sum(), jnp.finfo(jnp.float32).tiny)
    keeps: list[list[jax.Array]] = [[] for _ in energy.shape]
    retained = []
    for option in options:
        # Energy of every position of the window; the first of the best is taken.
        positions = jax.lax.reduce_window(
            energy, jnp.float32(0), jax.lax.add, option.counts, (1,) * energy.ndim, "VALID"
        )
        best = jnp.unravel_index(jnp.argmax(positions), positions.shape)
        for atom, (start, count, size) in enumerate(zip(best, option.counts, energy.shape)):
            unit = jnp.arange(size, dtype=start.dtype)
            keeps[atom].append((unit >= start) & (unit < start + count))
        retained.append(jnp.max(positions) / total)
    return Choice(tuple(jnp.stack(k) for k in keeps), jnp.clip(jnp.stack(retained), 0.0, 1.0))


def _in_place(
    sites: Callable[[Trace, Limits], list[Site]],
    choose: Callable[[tuple[Option, ...], jax.Array], Choice],
    realised_by: str,
) -> Family:
    """A family of single entries, whose zeros compaction leaves where they are."""
    return Family(sites, entry_energy, choose, compacts=False, realised_by=realised_by)


_SPARSE_CORES = (
    "GPUs with sparse tensor cores, by TensorRT or cuSPARSELt in half precision or int8; no CPU engine"
)
_NONE = "no engine (theoretical MACs only)"

FAMILIES: dict[str, Family] = {
    "channels": Family(_channel_sites, _channel_scores, _choose_channels, True, realised_by="any engine"),
    "rect": Family(_rect_sites, _window_scores, _choose_window, True, realised_by="any engine"),
    "rect_grouped": _in_place(
        filter_window_sites, choose_filter_windows, "any engine, where enough filters share a window"
    ),
    "2:4": _in_place(sparse.two_of_four_sites, sparse.choose_n_of_m, _SPARSE_CORES),
    "nm": _in_place(
        sparse.n_of_m_sites, sparse.choose_n_of_m, f"{_SPARSE_CORES}, where 2:4 or 1:4 is chosen"
    ),
    "block": _in_place(sparse.block_sites, sparse.choose_blocks, _NONE),
    "entries4": _in_place(sparse.four_entry_sites, sparse.choose_four_entries, _NONE),
    "unstructured": _in_place(sparse.unstructured_sites, sparse.choose_unstructured, _NONE),
}

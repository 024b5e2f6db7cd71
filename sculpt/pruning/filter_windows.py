"""The family `rect_grouped`: every filter of a 3x3 convolution keeps one of a few windows, and filters of one window are a smaller
convolution.

The windows are those of AutoSculpt (arXiv 2412.18091): the whole kernel, two columns, two rows, one column, one row, nothing. A
filter is all that one output channel reads. Which filters keep rows and which columns is chosen by what they would lose, in multiples of
`MIN_GROUP` filters; two lines lie where the filters of the kernel together keep most, a single one in the middle, where no engine has to
crop the image. Were all that left to every filter by itself, trained networks would keep a few hundredths more of their energy, and too
few filters would share a window to gain anything.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.pruning.family import Choice, Kernel, Option, Site, entry_choice, kernel_sites, rank_of
from sculpt.pruning.filter_groups import MIN_GROUP
from sculpt.tracing import Trace
from sculpt.tracing.layers import Layer


def _lines(count: int) -> tuple[np.ndarray, np.ndarray]:
    """bool `[places, 9]` twice: the windows of so many rows next to each other, and of so many columns."""
    rows = np.zeros((4 - count, 3, 3), bool)
    for start, window in enumerate(rows):
        window[start : start + count] = True
    return rows.reshape(-1, 9), rows.transpose(0, 2, 1).reshape(-1, 9)


_CLASSES = (
    (np.ones((1, 9), bool),),
    _lines(2),
    tuple(places[1:2] for places in _lines(1)),
    (np.zeros((1, 9), bool),),
)
"""Windows of nine, six, three and no entries: of rows and of columns, the places where they may lie."""
_SIXTHS = ((1, 0, 0, 0), (0.5, 0.5, 0, 0), (0, 1, 0, 0), (0, 0.5, 0.5, 0), (0, 0, 1, 0), (0, 0, 0.5, 0.5))
"""For 6/6 to 1/6 of the entries, the share of filters that have a window of each class."""


def filter_window_sites(trace: Trace, round_to: int, min_keep: int) -> list[Site]:
    """Sixths of the entries of every 3x3 convolution without groups: filters of one or two neighbouring sizes of windows.

    Compaction makes smaller convolutions of them (`filter_groups`), where enough filters share a window. No engine gains from those
    that stay as they were.
    """

    def options(layer: Layer, kernel: Kernel) -> list[Option]:
        stack, _, inputs, outputs = kernel.sizes
        filters = stack * outputs
        if layer.kernel_size != (3, 3) or layer.equation.params["feature_group_count"] > 1 or filters < 2:
            return []
        found = []
        for sixths, shares in zip(range(6, 0, -1), _SIXTHS):
            # Of an odd number the larger windows have one filter more.
            counts = [0] * 4
            for place, share in enumerate(shares):
                counts[place] = _share(filters, share) if not any(counts) else filters - sum(counts)
                counts[place] = counts[place] if share else 0
            kept = inputs * sum(n * kinds[0][0].sum() for n, kinds in zip(counts, _CLASSES))
            found.append(Option(f"{sixths}/6", kept / math.prod(kernel.sizes), (int(kept),), tuple(counts)))
        return found

    return kernel_sites(trace, "rect_grouped", options)


def _share(filters: int, share: float) -> int:
    """So many of the filters, rounded up; in multiples of `MIN_GROUP` where there are that many for either class."""
    step = MIN_GROUP if filters >= 2 * MIN_GROUP else 1
    return math.ceil(filters * share / step) * step if share < 1 else filters


def choose_filter_windows(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """Windows by what filters keep: the larger ones go to the filters that would lose most, then rows to those that lose most by
    columns."""
    stack, _, _, outputs = energy.shape
    filters = jnp.moveaxis(energy.sum(axis=2), 1, 0).reshape(9, -1)
    kept, windows = [], []
    for kinds in _CLASSES:
        each = [jnp.where(places[:, :, None], filters[None], 0.0).sum(axis=1) for places in kinds]
        # Filters that would rather have the other kind say nothing: once they have it, the rest agrees on the same place again.
        most = jnp.stack([energies.max(axis=0) for energies in each])
        votes = [jnp.where(most[i] >= most.max(axis=0), energies, 0.0) for i, energies in enumerate(each)]
        best = [jnp.argmax(energies.sum(axis=1)) for energies in votes]
        kept.append(jnp.stack([energies[place] for energies, place in zip(each, best)]))
        windows.append(jnp.stack([jnp.asarray(places)[place] for places, place in zip(kinds, best)]))
    worth = [kinds.max(axis=0) for kinds in kept]

    def of_class(place: int, members: jax.Array) -> jax.Array:
        """bool `[9, filters]`: the windows of a class, for the filters that are members of it."""
        if len(_CLASSES[place]) == 1:
            return jnp.broadcast_to(windows[place][0][:, None], filters.shape)
        outside = jnp.where(windows[place][:, :, None], 0.0, filters[None]).sum(axis=1)
        better, done = outside < outside[::-1], outside == 0
        rows, has_row, has_column, all_members = (
            (members & them).sum(dtype=jnp.int32) for them in (better[0], *(done & better), True)
        )
        rows = (rows + MIN_GROUP // 2) // MIN_GROUP * MIN_GROUP
        # A filter that has such a window already keeps it: pruning again changes nothing.
        rows = jnp.clip(rows, has_row, all_members - has_column)
        has_rows = rank_of(jnp.where(members, outside[1] - outside[0], -jnp.inf)) < rows
        return jnp.where(has_rows, windows[place][0][:, None], windows[place][1][:, None])

    def keep(counts: tuple[int, ...]) -> jax.Array:
        used = [place for place, count in enumerate(counts) if count]
        large, small = used[0], used[-1]
        is_large = rank_of(worth[large] - worth[small]) < counts[large]
        mask = jnp.where(is_large, of_class(large, is_large), of_class(small, ~is_large))
        view = jnp.moveaxis(mask.reshape(9, stack, outputs), 0, 1)[:, :, None, :]
        return jnp.broadcast_to(view, energy.shape)

    return entry_choice([keep(option.pattern) for option in options], energy)

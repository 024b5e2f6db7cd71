"""The family `rect_grouped`: every filter of a 3x3 convolution keeps one of a few windows, and filters of one window are a smaller
convolution.

The windows are those of AutoSculpt (arXiv 2412.18091): the whole kernel, two columns, two rows, one column, one row, nothing. A
filter is all that one output channel reads. Which filters keep rows and which columns is chosen by what they would lose, in multiples of
`MIN_GROUP` filters; two lines lie where the filters of the kernel together keep most, a single one in the middle, where no engine has to
crop the image. Were all that left to every filter by itself, the kernels of trained ResNet-20 and ResNet-56 would keep one to five
hundredths more of their energy in the mean, and too few filters would share a window to gain anything.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.pruning.compaction.filter_groups import MIN_GROUP
from sculpt.pruning.families.family import (
    Choice,
    Kernel,
    Limits,
    Option,
    Site,
    entry_choice,
    kernel_sites,
    rank_of,
)
from sculpt.tracing.layers import Layer
from sculpt.tracing.tracer import Trace


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


def filter_window_sites(trace: Trace, limits: Limits) -> list[Site]:
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
    """Windows by what filters lose: the larger ones go to the filters that would lose most by the smaller, then rows to those that lose
    most by columns.

    What was pruned so is pruned alike again: whatever a filter has lost all of the rest of, it keeps.
    """
    stack, _, _, outputs = energy.shape
    filters = jnp.moveaxis(energy.sum(axis=2), 1, 0).reshape(9, -1)
    placed = [_placed(kinds, filters) for kinds in _CLASSES]
    lost = [jnp.where(windows[:, :, None], 0.0, filters).sum(axis=1) for windows in placed]

    def keep(counts: tuple[int, ...]) -> jax.Array:
        used = [place for place, count in enumerate(counts) if count]
        large, small = used[0], used[-1]
        is_large = rank_of(lost[small].min(axis=0) - lost[large].min(axis=0)) < counts[large]
        mask = jnp.where(
            is_large,
            _of_class(placed[large], lost[large], is_large),
            _of_class(placed[small], lost[small], ~is_large),
        )
        view = jnp.moveaxis(mask.reshape(9, stack, outputs), 0, 1)[:, :, None, :]
        return jnp.broadcast_to(view, energy.shape)

    return entry_choice([keep(option.pattern) for option in options], energy)


def _placed(kinds: tuple[np.ndarray, ...], filters: jax.Array) -> jax.Array:
    """bool `[kinds, 9]`: where the rows and where the columns lie, given energies `[9, filters]`."""
    inside, outside = (
        [jnp.where(jnp.asarray(places)[:, :, None] == within, filters, 0.0).sum(axis=1) for places in kinds]
        for within in (True, False)
    )
    best = jnp.stack([energies.max(axis=0) for energies in inside])
    windows = []
    for kind, places in enumerate(kinds):
        # Filters that would rather have the other kind say nothing.
        votes = jnp.where(best[kind] >= best.max(axis=0), inside[kind], 0.0).sum(axis=1)
        pruned = jnp.where(outside[kind] == 0, inside[kind], 0.0).sum(axis=1)
        place = jnp.argmax(jnp.where(pruned.max() > 0, pruned, votes))
        windows.append(jnp.asarray(places)[place])
    return jnp.stack(windows)


def _of_class(windows: jax.Array, lost: jax.Array, members: jax.Array) -> jax.Array:
    """bool `[9, filters]`: the windows `[kinds, 9]` of the filters that are members of a class, given what they lose by each."""
    if len(windows) == 1:
        return jnp.broadcast_to(windows[0][:, None], (9, lost.shape[1]))
    by_rows, by_columns = lost
    has_rows = members & (by_rows == 0) & (by_columns > 0)
    has_columns = members & (by_columns == 0) & (by_rows > 0)
    wanted = (members & (by_rows < by_columns)).sum(dtype=jnp.int32)
    whole = (wanted + MIN_GROUP // 2) // MIN_GROUP * MIN_GROUP
    most = members.sum(dtype=jnp.int32) - has_columns.sum(dtype=jnp.int32)
    rows = jnp.clip(whole, has_rows.sum(dtype=jnp.int32), most)
    prefers = jnp.where(has_rows, jnp.inf, by_columns - by_rows)
    prefers = jnp.where(members & ~has_columns, prefers, -jnp.inf)
    return jnp.where(rank_of(prefers) < rows, windows[0][:, None], windows[1][:, None])

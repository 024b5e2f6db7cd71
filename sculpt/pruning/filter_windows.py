"""The family `rect_grouped`: every filter of a 3x3 convolution keeps a window of its own, and filters of one window are a smaller
convolution.

The windows are those of AutoSculpt (arXiv 2412.18091): the whole kernel, two columns, two rows, one column, one row, nothing; each
where it keeps most. A filter is all that one output channel reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.pruning.family import Choice, Kernel, Option, Site, entry_choice, kernel_sites, rank_of
from sculpt.tracing import Trace
from sculpt.tracing.layers import Layer


def _positions(lines: Sequence[Sequence[int]]) -> np.ndarray:
    """bool `[2 * lines, 9]`: the windows that keep these rows, then those that keep these columns."""
    rows = np.zeros((len(lines), 3, 3), bool)
    for window, line in zip(rows, lines):
        window[list(line)] = True
    return np.concatenate([rows, rows.transpose(0, 2, 1)]).reshape(-1, 9)


_CLASSES = (
    np.ones((1, 9), bool),
    _positions([(0, 1), (1, 2)]),
    _positions([(0,), (1,), (2,)]),
    np.zeros((1, 9), bool),
)
"""Windows of nine, six, three and no entries."""
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
                counts[place] = math.ceil(filters * share) if not any(counts) else filters - sum(counts)
                counts[place] = counts[place] if share else 0
            kept = inputs * sum(n * windows[0].sum() for n, windows in zip(counts, _CLASSES))
            found.append(Option(f"{sixths}/6", kept / math.prod(kernel.sizes), (int(kept),), tuple(counts)))
        return found

    return kernel_sites(trace, "rect_grouped", options)


def choose_filter_windows(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """The window of highest energy of every filter; the larger windows go to the filters that would lose most."""
    stack, _, _, outputs = energy.shape
    filters = jnp.moveaxis(energy.sum(axis=2), 1, 0).reshape(9, -1)
    worth, masks = [], []
    for windows in _CLASSES:
        kept = jnp.where(windows[:, :, None], filters[None], 0.0).sum(axis=1)
        worth.append(kept.max(axis=0))
        masks.append(jnp.asarray(windows)[jnp.argmax(kept, axis=0)].T)

    def keep(counts: tuple[int, ...]) -> jax.Array:
        used = [place for place, count in enumerate(counts) if count]
        large, small = used[0], used[-1]
        mask = jnp.where(
            rank_of(worth[large] - worth[small])[None] < counts[large], masks[large], masks[small]
        )
        view = jnp.moveaxis(mask.reshape(9, stack, outputs), 0, 1)[:, :, None, :]
        return jnp.broadcast_to(view, energy.shape)

    return entry_choice([keep(option.pattern) for option in options], energy)

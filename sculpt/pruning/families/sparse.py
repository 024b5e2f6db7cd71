"""Families of single kernel entries: N:M, blocks, four entries of nine, unstructured.

Their zeros stay in place: no smaller array expresses them, so compaction leaves them and their theoretical MACs are not realised.
What an engine makes of them is said at each. Scores are energies `[stack, window, inputs, outputs]`, the view of `Kernel`.

In one space with `channels`, an option here is chosen among all entries of the kernel, those of removed channels included. Its
fraction then holds for what is left on average, not exactly, and groups of an N:M pattern no longer lie side by side once
channels between them are taken out. Where that matters, prune the channels, compact, and make a space of the compact network.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

N_OF_M = ((4, 8), (2, 4), (1, 4))
"""The patterns of `nm`, by the share that they keep; of 4:8 and 2:4, which keep as many, the freer first."""
LIBRARY = 8
"""Patterns of `entries4` that a layer may use."""
_EIGHTHS = tuple((level, 8) for level in range(7, 0, -1))


def _eighths(units: int, entries: int) -> list[Option]:
    """Options that keep eighths of `units`, each of which is `entries` entries; `pattern` is how many units."""
    counts = {units: "8/8"}
    for level, levels in _EIGHTHS:
        counts.setdefault(max(round(units * level / levels), 1), f"{level}/{levels}")
    return [Option(label, n / units, (n * entries,), (n,)) for n, label in counts.items()]


def unstructured_sites(trace: Trace, limits: Limits) -> list[Site]:
    """Eighths of the entries of every kernel. No engine gains: dense hardware multiplies by the zeros as well."""
    return kernel_sites(trace, "unstructured", lambda _, kernel: _eighths(math.prod(kernel.sizes), 1))


def choose_unstructured(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """The entries of largest magnitude in the layer (Han et al. 2015, arXiv 1506.02626)."""
    rank = rank_of(energy)
    return entry_choice([rank < option.pattern[0] for option in options], energy)


def n_of_m_sites(trace: Trace, limits: Limits) -> list[Site]:
    """4:8, 2:4 and 1:4 among the inputs of every kernel whose number of inputs (last input axis) 8 or 4 divides.

    Of each m consecutive inputs of an output, at each position of the window, n stay. Sparse tensor cores multiply by 2:4 at up to
    twice the rate (Mishra et al. 2021, arXiv 2104.08378): TensorRT and cuSPARSELt use them, where the layer is large enough to gain.
    1:4 is a valid 2:4, for no further gain; 4:8 is of use to no engine. On CPUs all are as slow as dense.
    """
    return kernel_sites(trace, "nm", lambda _, kernel: _n_of_m_options(kernel, N_OF_M))


def two_of_four_sites(trace: Trace, limits: Limits) -> list[Site]:
    """Dense or 2:4, the one pattern of `n_of_m_sites` that hardware takes."""
    return kernel_sites(trace, "2:4", lambda _, kernel: _n_of_m_options(kernel, ((2, 4),)))


def _n_of_m_options(kernel: Kernel, patterns: tuple[tuple[int, int], ...]) -> list[Option]:
    size = math.prod(kernel.sizes)
    fitting = [(n, m) for n, m in patterns if kernel.last_input % m == 0]
    return [Option("dense", 1.0, (size,), (1, 1))] + [
        Option(f"{n}:{m}", n / m, (size * n // m,), (n, m)) for n, m in fitting
    ]


def choose_n_of_m(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """The n of largest magnitude of every m consecutive inputs; of equal ones the first."""
    return entry_choice([_n_of_m(energy, *option.pattern) for option in options], energy)


def _n_of_m(energy: jax.Array, n: int, m: int) -> jax.Array:
    stack, window, inputs, outputs = energy.shape
    groups = energy.reshape(stack, window, inputs // m, m, outputs)
    # Counting who is ahead takes less time to compile than sorting.
    one, other = groups[:, :, :, :, None], groups[:, :, :, None, :]
    earlier = (np.arange(m)[:, None] > np.arange(m)[None, :]).reshape(1, 1, 1, m, m, 1)
    ahead = ((other > one) | ((other == one) & earlier)).sum(axis=4)
    return (ahead < n).reshape(energy.shape)


def is_nm(mask: Any, n: int, m: int, axis: int) -> bool:
    """Whether of every m consecutive entries along an axis at most n are not zero: what an engine for n:m expects.

    Args:
      mask: a mask or the weights themselves.
      n: most entries of a group that are not zero.
      m: length of a group; the first begins at index 0.
      axis: the reduction axis: inputs, -2 for kernels `[..., inputs, outputs]`.

    Raises:
      ValueError: if the axis does not exist or m does not divide it, or not 0 < n <= m.
    """
    array = np.asarray(mask)
    if not 0 < n <= m:
        raise ValueError(f"is_nm expected 0 < n <= m, got n={n}, m={m}")
    if not -array.ndim <= axis < array.ndim or array.shape[axis] % m:
        raise ValueError(
            f"is_nm expected an axis of a size that {m} divides, got axis {axis} of an array {list(array.shape)}"
        )
    groups = np.moveaxis(array != 0, axis, -1)
    return bool((groups.reshape(*groups.shape[:-1], -1, m).sum(axis=-1) <= n).all())


def block_sites(trace: Trace, limits: Limits) -> list[Site]:
    """Eighths of the square blocks of inputs x outputs, at each position of the window: 8x8, or 4x4 where 8 does not divide both.

    No engine gains by itself; block-sparse matrix products do (such as Triton's on GPUs), which have to be called by hand.
    """

    def options(_: Layer, kernel: Kernel) -> list[Option]:
        stack, window, inputs, outputs = kernel.sizes
        for side in (8, 4):
            if inputs % side == 0 and outputs % side == 0:
                units = _eighths(stack * window * inputs * outputs // side**2, side**2)
                return [Option(o.label, o.kept, o.counts, (*o.pattern, side)) for o in units]
        return []

    return kernel_sites(trace, "block", options)


def choose_blocks(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """The blocks of largest energy in the layer (Narang et al. 2017, arXiv 1711.02782, by energy instead of maximum)."""
    stack, window, inputs, outputs = energy.shape
    side = options[0].pattern[1]
    blocks = energy.reshape(stack, window, inputs // side, side, outputs // side, side).sum(axis=(3, 5))
    rank = rank_of(blocks)

    def keep(count: int) -> jax.Array:
        return jnp.repeat(jnp.repeat(rank < count, side, axis=2), side, axis=3)

    return entry_choice([keep(option.pattern[0]) for option in options], energy)


def four_entry_sites(trace: Trace, limits: Limits) -> list[Site]:
    """Four of nine entries in every 3x3 kernel (one input, one output), and of those kernels all, 3/4, 2/4 or 1/4.

    PatDNN (Niu et al. 2020, arXiv 2001.00138) gains from it on phones by code compiled for the patterns of each layer. No engine in
    general use does.
    """

    def options(layer: Layer, kernel: Kernel) -> list[Option]:
        if layer.kernel_size != (3, 3):
            return []
        kernels = math.prod(kernel.sizes) // 9
        found = {kernels: "4/9"}
        for share in (3, 2, 1):
            found.setdefault(max(round(kernels * share / 4), 1), f"4/9 of {share}/4")
        return [Option("9/9", 1.0, (9 * kernels,), (9, kernels))] + [
            Option(label, 4 * n / (9 * kernels), (4 * n,), (4, n)) for n, label in found.items()
        ]

    return kernel_sites(trace, "entries4", options)


def choose_four_entries(options: tuple[Option, ...], energy: jax.Array) -> Choice:
    """Per kernel the pattern of a library that keeps most of its energy; the kernels whose patterns keep most.

    A pattern is the centre and three others. The library is the layer's: the eight that are best for most kernels, each
    counted by the energy that it would keep.
    """
    patterns = jnp.asarray(
        [
            [i == 4 or i in others for i in range(9)]
            for others in itertools.combinations((0, 1, 2, 3, 5, 6, 7, 8), 3)
        ]
    )
    kernels = jnp.moveaxis(energy, 1, 0).reshape(9, -1)
    worth = jnp.where(patterns[:, :, None], kernels[None], 0.0).sum(axis=1)
    votes = jax.ops.segment_sum(worth.max(axis=0), jnp.argmax(worth, axis=0), len(patterns))
    _, library = jax.lax.top_k(votes, LIBRARY)
    chosen = library[jnp.argmax(worth[library], axis=0)]
    rank = rank_of(worth[library].max(axis=0))
    stack, _, inputs, outputs = energy.shape

    def keep(entries: int, count: int) -> jax.Array:
        if entries == 9:
            return jnp.ones(energy.shape, bool)
        mask = patterns[chosen].T & (rank < count)[None]
        return jnp.moveaxis(mask.reshape(9, stack, inputs, outputs), 0, 1)

    return entry_choice([keep(*option.pattern) for option in options], energy)

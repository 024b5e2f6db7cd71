"""The interface of a pattern family: sites, options, and the weights that each option keeps.

A site is a place of the network with a short list of options, the first of which keeps everything. There are two kinds. An
option may keep units of one or two atoms (channels, a window): its mask is the outer product of what its axes keep, and
compaction takes the rest out. Or it keeps single entries of one kernel: any mask, one bit of it for every option.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.pruning.importance.scores import Importance
from sculpt.tracing.axes import Atom
from sculpt.tracing.layers import Layer
from sculpt.tracing.tracer import Trace


@dataclasses.dataclass(frozen=True)
class Option:
    """One choice at a site."""

    label: str
    """"6/8" (six of eight channels kept), "2x2" (window of the kernel), "2:4" (two of four inputs)."""
    kept: float
    """Fraction of the site's units that stay, in [0, 1]."""
    counts: tuple[int, ...]
    """Kept units of each of the site's atoms."""
    pattern: tuple[int, ...] = ()
    """What else the family needs to know, such as (2, 4) of "2:4"."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parameter leaf, seen as `[stack, window, inputs, outputs]`."""

    leaf: int
    """Its index."""
    shape: tuple[int, ...]
    """Its shape."""
    order: tuple[int, ...]
    """Its axes in the order of the view: those of a stack (steps of a scan), window, inputs, outputs."""
    sizes: tuple[int, int, int, int]
    """Shape of the view; `inputs` are what one output sums over: those of its own group, in a grouped convolution."""
    last_input: int
    """Size of the innermost axis of inputs."""

    @property
    def atom(self) -> Atom:
        """Stands for the entries of this leaf among the atoms of a space; negative, so that it is no atom of a trace."""
        return -1 - self.leaf

    def view(self, array: Any) -> jax.Array:
        """The leaf `[*shape]` as `[stack, window, inputs, outputs]`."""
        return jnp.reshape(jnp.transpose(array, self.order), self.sizes)

    def restore(self, view: jax.Array) -> jax.Array:
        """The inverse of `view`."""
        ordered = jnp.reshape(view, [self.shape[axis] for axis in self.order])
        return jnp.transpose(ordered, tuple(np.argsort(self.order).tolist()))


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where one option is chosen."""

    index: int
    name: str
    family: str
    atoms: tuple[Atom, ...]
    """Atoms of the trace that the options act on; `(kernel.atom,)` where they act on single entries."""
    sizes: tuple[int, ...]
    """Their sizes."""
    owner: int
    """Index of the group (`channels`) or layer (all others) that the site belongs to."""
    options: tuple[Option, ...]
    kernel: Kernel | None = None
    """The kernel whose entries are chosen one by one; None where units of atoms are."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The options of one site worked out on given parameters."""

    keeps: tuple[jax.Array, ...]
    """Boolean `[options, atom size]` for each atom of the site: the units that stay; none where entries are chosen."""
    retained: jax.Array
    """float32 `[options]`: share of the site's importance (weight energy, if the space has no other) that stays, in [0, 1]."""
    entries: jax.Array | None = None
    """uint8 of the kernel's shape, where its entries are chosen: bit `o` is set where option `o` keeps the entry."""


jax.tree_util.register_dataclass(Choice, data_fields=["keeps", "retained", "entries"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Limits:
    """What channels may become."""

    round_to: int = 1
    """Kept columns are a multiple of it."""
    min_keep: int = 1
    """Fewest columns that stay; 0: branches may go altogether."""
    levels: int | str = 8
    """Keep fractions are multiples of one over it; "all": every number of units."""
    kept_out: frozenset[Atom] = frozenset()
    """Atoms that no site may act on. Families other than `channels` leave it to `make_space`."""
    kept_leaves: frozenset[int] = frozenset()
    """Indices of the leaves whose layers must go on depending on the images."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of pattern."""

    sites: Callable[[Trace, Limits], list[Site]]
    """`(trace, limits) -> sites` (numbered later)."""
    score: Callable[[Trace, Site, Sequence[Any], Importance | None], jax.Array]
    """`(trace, site, parameter leaves, scores of the groups) -> float32 [*site.sizes]`, or `[*site.kernel.sizes]`; jit-able: what
    each unit is worth."""
    choose: Callable[[tuple[Option, ...], jax.Array], Choice]
    """`(options, scores) -> Choice`; jit- and vmap-able: what each option keeps. Entries are still in the kernel's view."""
    compacts: bool
    """Whether compaction turns its zeros into smaller arrays, whatever the weights, that is, whether its savings are realised."""
    realised_by: str
    """What runs faster by it: "any engine", "no engine", or which ones; told by `sculpt info`."""


def kernel_sites(
    trace: Trace, family: str, options: Callable[[Layer, Kernel], Sequence[Option]]
) -> list[Site]:
    """A site for every kernel to which `options(layer, kernel)` gives more than one option, and no more than eight.

    Zeros may stand anywhere in a kernel, so that what else reads it does not matter, as long as every layer that does
    multiplies by its entries as they are.
    """
    layers: dict[int, list[Layer]] = {}
    for layer in trace.layers:
        layers.setdefault(layer.leaf, []).append(layer)
    sites = []
    for users in layers.values():
        if not all(layer.in_axes for layer in users):
            continue
        kernel = kernel_of(trace, users[0])
        offered = tuple(options(users[0], kernel))
        if len(offered) > 1:
            size = math.prod(kernel.sizes)
            sites.append(
                Site(0, users[0].name, family, (kernel.atom,), (size,), users[0].index, offered, kernel)
            )
    return sites


def kernel_of(trace: Trace, layer: Layer) -> Kernel:
    """The kernel of a layer that knows its inputs (`in_axes`)."""
    shape = trace.leaves[layer.leaf].shape
    parts = (layer.window_axes, tuple(sorted(layer.in_axes)), layer.out_axes)
    named = {axis for part in parts for axis in part}
    stack = tuple(axis for axis in range(len(shape)) if axis not in named)
    parts = (stack, *parts)
    order = tuple(axis for part in parts for axis in part)
    first, window, inputs, outputs = (math.prod(shape[axis] for axis in part) for part in parts)
    return Kernel(layer.leaf, shape, order, (first, window, inputs, outputs), shape[parts[2][-1]])


def entry_energy(trace: Trace, site: Site, leaves: Sequence[Any], importance: Importance | None) -> jax.Array:
    """float32 `[*site.kernel.sizes]`: squares, whatever the importance, which is of channels and says nothing of entries."""
    assert site.kernel is not None
    return jnp.square(site.kernel.view(jnp.asarray(leaves[site.kernel.leaf], jnp.float32)))


def entry_choice(keeps: Sequence[jax.Array], energy: jax.Array) -> Choice:
    """What is chosen where option `o` keeps the entries `keeps[o]`, boolean of the shape of `energy`, the first all of them."""
    bits = jnp.zeros(energy.shape, jnp.uint8)
    for option, keep in enumerate(keeps):
        bits = bits | (keep.astype(jnp.uint8) << np.uint8(option))
    # Where no entry is worth anything they count alike, so that keeping all still retains all.
    worth = jnp.where(energy.sum() > 0, energy, 1.0)
    kept = jnp.stack([jnp.where(keep, worth, 0.0).sum() for keep in keeps])
    return Choice((), jnp.clip(kept / kept[0], 0.0, 1.0), bits)


def rank_of(scores: jax.Array) -> jax.Array:
    """int32 of the shape of `scores`: 0 for the highest, of equal ones the first."""
    flat = scores.reshape(-1)
    order = jnp.argsort(-flat, stable=True)
    places = jnp.arange(flat.shape[0], dtype=jnp.int32)
    return jnp.zeros(flat.shape, jnp.int32).at[order].set(places).reshape(scores.shape)

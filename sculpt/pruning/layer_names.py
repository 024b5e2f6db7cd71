"""Layers and sites by name, for `exclude`, `keep_at_least` and `policy_from`.

A pattern is a path of the parameter tree, such as "block1/conv/kernel", or a part of it from the front, such as "block1"; `*`, `?` and
`[...]` stand for other characters, as in file names, "/" included: "*/attention/*".
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from sculpt.pruning.families.family import Site
from sculpt.tracing.axes import Atom
from sculpt.tracing.layers import Layer
from sculpt.tracing.tracer import Trace

_SIDES = ("inputs", "outputs")


def kept_out(trace: Trace, patterns: Sequence[str]) -> tuple[frozenset[Atom], frozenset[int]]:
    """What `exclude` keeps out: the atoms of every axis named (and of the entries of kernels that are named whole, as in
    `Kernel.atom`), and the leaves.

    "head:inputs" names the axes that a layer sums over, "head:outputs" the others, without the window; "head" all of them.

    Raises:
      ValueError: for a pattern that names nothing.
    """
    atoms: set[Atom] = set()
    leaves: set[int] = set()
    layers = {layer.leaf: layer for layer in reversed(trace.layers)}
    for pattern in patterns:
        path, _, side = pattern.rpartition(":")
        if side not in _SIDES:
            path, side = pattern, ""
        matching = [leaf for leaf in trace.leaves if matches(path, leaf.path)]
        groups = [g for g in trace.groups if not side and fnmatch.fnmatchcase(g.name, path)]
        if not matching and not groups:
            raise ValueError(
                f"exclude names no layer or array of the network: {pattern!r}{nearest(path, _all_names(trace))}"
            )
        atoms.update(group.atom for group in groups)
        leaves.update(leaf.index for leaf in matching)
        for leaf in matching:
            axes = range(len(leaf.shape))
            if side:
                axes = _side_axes(layers.get(leaf.index), len(leaf.shape), side)
            else:
                atoms.add(-1 - leaf.index)
            term = trace.leaf_term(leaf.index)
            atoms.update(atom for axis in axes for atom in trace.axes.atoms(term[axis]))
    return frozenset(atoms), frozenset(leaves)


def _side_axes(layer: Layer | None, rank: int, side: str) -> list[int]:
    """The axes of a leaf that are its layer's inputs or outputs. Where the layer does not know, all that may be; what belongs to no
    layer, such as a bias, has outputs alone."""
    if layer is None:
        return list(range(rank)) if side == "outputs" else []
    rest = [axis for axis in range(rank) if axis not in layer.window_axes]
    if side == "outputs":
        return list(layer.out_axes) or [axis for axis in rest if axis not in layer.in_axes]
    # The groups of a convolution's outputs are those of its inputs.
    grouped = layer.equation.params.get("feature_group_count", 1) > 1
    if layer.in_axes and not grouped:
        return list(layer.in_axes)
    return rest if grouped else [axis for axis in rest if axis not in layer.out_axes]


def sites_named(trace: Trace, sites: Iterable[Site], pattern: str) -> list[Site]:
    """The sites of a name; if none has it, those that decide over the outputs, or the kernel, of layers and arrays of that name."""
    sites = list(sites)
    named = [site for site in sites if fnmatch.fnmatchcase(site.name, pattern)]
    return named or [site for site in sites if any(matches(pattern, path) for path in _governed(trace, site))]


def _governed(trace: Trace, site: Site) -> list[str]:
    """The paths of the leaves whose outputs (or kernel) a site decides over."""
    if site.family != "channels":
        return [trace.leaves[trace.layers[site.owner].leaf].path]
    layers = {layer.leaf: layer for layer in reversed(trace.layers)}
    return [
        trace.leaves[leaf].path
        for leaf, axis in trace.groups[site.owner].slots
        if axis in _side_axes(layers.get(leaf), len(trace.leaves[leaf].shape), "outputs")
    ]


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a path, or something that it lies in."""
    parts = path.split("/")
    return any(fnmatch.fnmatchcase("/".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that there is not: those that are most like it, or some."""
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, names, 3, 0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"


def _all_names(trace: Trace) -> list[str]:
    names = [group.name for group in trace.groups]
    for leaf in trace.leaves:
        parts = leaf.path.split("/")
        names += ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return names

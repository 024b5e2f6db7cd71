"""Tables of the layers and coupled groups of a network, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sculpt.pruning.families.patterns import Site
from sculpt.pruning.space import Space
from sculpt.tracing.tracer import Frozen

if TYPE_CHECKING:
    from rich.table import Table

_NAMED = 3
"""Of a long list of names so many are told."""


def layers_table(space: Space) -> Table:
    """Every layer in the order of the program: kernel, output, MACs per image and its share of all."""
    trace = space.trace
    table = _table(("layer", "kind", "kernel", "output", "MACs", "share"), right=("MACs", "share"))
    for layer in trace.layers:
        output = [*layer.out_spatial, layer.out_channels]
        table.add_row(
            layer.name,
            layer.kind,
            _shape(trace.leaves[layer.leaf].shape),
            _shape(output),
            f"{layer.macs:,}",
            f"{layer.macs / max(trace.macs, 1):.1%}",
        )
    for product in trace.products:
        table.add_row(
            product.name, "product", "-", "-", f"{product.macs:,}", f"{product.macs / max(trace.macs, 1):.1%}"
        )
    return table


def sites_table(space: Space) -> Table:
    """Every site in the order of a policy's integers: its family, its units, how many arrays hold them, and its options."""
    trace = space.trace
    slots = {group.atom: group.slots for group in trace.groups}
    table = _table(("", "site", "family", "units", "arrays", "options"), right=("", "units", "arrays"))
    for site in space.sites:
        arrays = {leaf for atom in site.atoms for leaf, _ in slots.get(atom, ())}
        units = _shape(site.sizes)
        count = str(max(len(arrays), 1))
        table.add_row(str(site.index), site.name, site.family, units, count, _options(site))
    return table


def frozen_lines(space: Space) -> list[str]:
    """What no site removes, one line for each reason: how many, and some by name."""
    chosen = {atom for site in space.sites for atom in site.atoms}
    reasons: dict[str, list[Frozen]] = {}
    windows = {
        (layer.leaf, axis)
        for layer in space.trace.layers
        for atom, axis in zip(layer.window, layer.window_axes)
        if atom in chosen
    }
    for frozen in space.trace.frozen:
        if (frozen.leaf, frozen.axis) not in windows:
            # What follows in brackets is the place in the program: that of the first is told.
            reasons.setdefault(frozen.reason.partition(" (")[0], []).append(frozen)
    named = [
        ("excluded by you", [f"{site.name} {site.family} ({_shape(site.sizes)})" for site in space.excluded]),
        *((found[0].reason, [f"{f.name} ({f.size})" for f in found]) for found in reasons.values()),
    ]
    return [_line(reason, names) for reason, names in named if names]


def _line(reason: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{reason}: {', '.join(names[:_NAMED])}{more}"


def _options(site: Site) -> str:
    labels = [option.label for option in site.options]
    return (
        " ".join(labels) if len(labels) <= 8 else f"{labels[0]} {labels[1]} ... {labels[-1]} ({len(labels)})"
    )


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _table(columns: Sequence[str], right: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table

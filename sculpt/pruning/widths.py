"""The unit counts of a coupled group that give the widths asked for (`round_to`, `min_keep`, `levels`).

A unit may be several columns of an axis: a head is all of its features, a channel of a flattened image one column for each pixel. Widths
are of columns, in every array; counts are of units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from sculpt.pruning.families.family import Limits
from sculpt.tracing.axes import Atom
from sculpt.tracing.tracer import Group, Trace


def kept_counts(trace: Trace, limits: Limits) -> dict[Atom, dict[int, str]]:
    """Counts of units -> their labels, all units first, for the atom of every group that is not kept out.

    Where two groups share an axis, as heads and the features of a head do, one of them has multiples of its own: the one whose size has
    most of `round_to` as a divisor, then the larger one. The other takes what that leaves to be desired.
    """
    free = [group for group in trace.groups if group.atom not in limits.kept_out]
    free.sort(key=lambda group: (-math.gcd(group.size, limits.round_to), -group.size))
    counts: dict[Atom, dict[int, str]] = {}
    steps, least = ({group.atom: 1 for group in free} for _ in range(2))
    for group in free:
        own = counts[group.atom] = _counts(trace, group, limits, steps, least)
        steps[group.atom], least[group.atom] = math.gcd(*own), min(own)
    return counts


def _counts(
    trace: Trace, group: Group, limits: Limits, steps: Mapping[Atom, int], least: Mapping[Atom, int]
) -> dict[int, str]:
    multiple = fewest = 1
    for leaf, axis in group.slots:
        step, columns = _columns(trace, group.atom, leaf, axis, steps, least)
        multiple = math.lcm(multiple, limits.round_to // math.gcd(limits.round_to, step))
        fewest = max(fewest, -(-limits.min_keep // columns))
    fewest = -(-fewest // multiple)
    if limits.levels == "all":
        largest = (group.size - 1) // multiple
        kept = [group.size, *(n * multiple for n in range(largest, fewest - 1, -1))]
        return {count: f"{count}/{group.size}" for count in kept}
    levels = int(limits.levels)
    counts = {group.size: f"{levels}/{levels}"}
    for level in range(levels - 1, 0, -1):
        count = max(round(group.size * level / levels / multiple), fewest) * multiple
        if count < group.size:
            counts.setdefault(count, f"{level}/{levels}")
    return counts


def _columns(
    trace: Trace, atom: Atom, leaf: int, axis: int, steps: Mapping[Atom, int], least: Mapping[Atom, int]
) -> tuple[int, int]:
    """Of the columns of an axis that one unit of `atom` has: what divides their number, and how many there are at least, whatever the
    other groups of the axis keep."""
    parts: dict[tuple[Atom, ...], int] = {}
    fewest = 0
    for number, atoms in trace.axes.monomials(trace.leaf_term(leaf)[axis]):
        if atom not in atoms:
            continue
        others = list(atoms)
        others.remove(atom)
        pruned = tuple(sorted(a for a in others if a in steps))
        number *= math.prod(trace.axes.atom_size(a) for a in others if a not in steps)
        parts[pruned] = parts.get(pruned, 0) + number
        fewest += number * math.prod(least[a] for a in pruned)
    return math.gcd(*(n * math.prod(steps[a] for a in pruned) for pruned, n in parts.items())), fewest

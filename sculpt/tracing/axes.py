"""The algebra of coupled axes: every array axis is a product of atomic axes (`tracing/atoms.py`), unified by union-find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sculpt.tracing.atoms import ONE as ONE
from sculpt.tracing.atoms import Atom as Atom
from sculpt.tracing.atoms import Atoms, Axis, Reordered, Segment
from sculpt.tracing.atoms import Term as Term


class Axes(Atoms):
    """The table of atoms while a program is traced; later it is only read."""

    def cut(self, axis: Axis, position: int, reason: str) -> tuple[Axis, Axis]:
        """Splits an axis into its first `position` units and the rest.

        Where the term cannot express the cut (inside a product's inner factor), both parts are frozen.
        """
        left: list[Segment] = []
        segments = list(self.resolve(axis))
        while segments and position >= self._segment_size(segments[0]):
            position -= self._segment_size(segments[0])
            left.append(segments.pop(0))
        if position:
            head = segments.pop(0)
            inner = self._segment_size(head[1:])
            if position % inner:
                self.freeze((head,), reason)
                total = self._segment_size(head)
                left.extend(self.fresh(position, reason))
                segments = list(self.fresh(total - position, reason)) + segments
            else:
                self._cut_atom(head[0], position // inner)
                first, second = self.cut((head,), position, reason)
                left.extend(first)
                segments = list(second) + segments
        return tuple(left), tuple(segments)

    def _cut_atom(self, atom: Atom, position: int) -> None:
        size, reason = self._sizes[atom], self._frozen[atom]
        if isinstance(self._bindings[atom], Reordered):
            halves = np.split(np.arange(size), [position])
            first, second = (self.take(((atom,),), units, "cut in another order") for units in halves)
            self._bindings[atom] = first + second
            return
        # Parts of size one stay atoms: each unit of a concatenation must be able to go alone.
        parts = [self._new_atom(position, reason), self._new_atom(size - position, reason)]
        self._bindings[atom] = tuple((p,) for p in parts)

    def split(self, axis: Axis, outer: int, inner: int, reason: str) -> tuple[Axis, Axis]:
        """Splits an axis of size `outer * inner`, read row-major, into two axes."""
        if outer == 1:
            return ONE, axis
        if inner == 1:
            return axis, ONE
        segments = self.resolve(axis)
        if len(segments) == 1:
            return self._split_product(segments[0], inner, reason)
        if all(self._segment_size(s) % inner == 0 for s in segments):
            pairs = [self.split((s,), self._segment_size(s) // inner, inner, reason) for s in segments]
            for _, other in pairs[1:]:
                self.unify(pairs[0][1], other, reason)
            return tuple(s for first, _ in pairs for s in first), pairs[0][1]
        self.freeze(axis, reason)
        return self.fresh(outer, reason), self.fresh(inner, reason)

    def _split_product(self, segment: Segment, inner: int, reason: str) -> tuple[Axis, Axis]:
        tail: Segment = ()
        while self._segment_size(tail) < inner:
            atom, segment = segment[-1], segment[:-1]
            done = self._segment_size(tail)
            wanted, size = inner // done, self._sizes[atom]
            if size > wanted:
                if inner % done or size % wanted or self._bindings[atom] is not None:
                    self.freeze((segment + (atom,) + tail,), reason)
                    outer = self._segment_size(segment) * size * self._segment_size(tail) // inner
                    return self.fresh(outer, reason), self.fresh(inner, reason)
                parts = [
                    self._new_atom(size // wanted, self._frozen[atom]),
                    self._new_atom(wanted, self._frozen[atom]),
                ]
                self._bindings[atom] = (tuple(parts),)
                segment, atom = segment + (parts[0],), parts[1]
            tail = (atom,) + tail
        if self._segment_size(tail) != inner:
            self.freeze((segment + tail,), reason)
            outer = self._segment_size(segment + tail) // inner
            return self.fresh(outer, reason), self.fresh(inner, reason)
        return (segment,), (tail,)

    def merge(self, axes: Iterable[Axis]) -> Axis:
        """One axis that runs row-major over several."""
        factors: list[Atom] = []
        for axis in axes:
            segments = self.resolve(axis)
            if len(segments) == 1:
                factors.extend(segments[0])
            else:
                atom = self._new_atom(self.size(segments), None)
                self._bindings[atom] = segments
                factors.append(atom)
        return (tuple(factors),)

    def unify(self, x: Axis, y: Axis, reason: str) -> None:
        """Makes two axes of equal size one; where their terms cannot be matched, freezes both."""
        x, y = self.resolve(x), self.resolve(y)
        if self.size(x) != self.size(y):
            raise AssertionError(f"cannot unify axes of sizes {self.size(x)} and {self.size(y)}")
        if x != y and len(x) == len(y) == 1:
            x, y = self._without_units(x[0], reason), self._without_units(y[0], reason)
        if x == y:
            return
        for a, b in ((x, y), (y, x)):
            if len(a) == 1 and len(a[0]) == 1 and self._bindings[a[0][0]] is None:
                if a[0][0] not in self.atoms(b):
                    self._bind(a[0][0], b)
                    return
                if self._units(b) is None or not self._is_reordered(b):
                    self.freeze(b, reason)
                    return
        if self._is_reordered(x) or self._is_reordered(y):
            first, second = self._units(x), self._units(y)
            if first is not None and second is not None:
                self._unify_units(first, second, reason)
                return
        if len(x) == 1 and len(y) == 1:
            self._unify_products(x[0], y[0], reason)
            return
        # Cut both at the first boundary of either, then go on with what is left.
        first = min(self._segment_size(x[0]), self._segment_size(y[0]))
        x_head, x_tail = self.cut(x, first, reason)
        y_head, y_tail = self.cut(y, first, reason)
        self.unify(x_head, y_head, reason)
        self.unify(x_tail, y_tail, reason)

    def _without_units(self, segment: Segment, reason: str) -> Axis:
        """A single unit cut out of a concatenation multiplies nothing, but may not be removed from a product."""
        units = [a for a in segment if len(segment) > 1 and self._sizes[a] == 1]
        self.freeze((tuple(units),), reason)
        return (tuple(a for a in segment if a not in units),)

    def _unify_products(self, x: Segment, y: Segment, reason: str) -> None:
        if len(x) == len(y) == 1:
            # Two concatenations behind names.
            first, second = self._bindings[x[0]], self._bindings[y[0]]
            if isinstance(first, Reordered) or isinstance(second, Reordered):
                self.freeze((x, y), reason)
                return
            self.unify(first or (x,), second or (y,), reason)
            return
        outer_x, outer_y = self._sizes[x[0]], self._sizes[y[0]]
        outer = min(outer_x, outer_y)
        total = self._segment_size(x)
        if max(outer_x, outer_y) % outer:
            self.freeze((x,), reason)
            self.freeze((y,), reason)
            return
        x_head, x_rest = self.split((x,), outer, total // outer, reason)
        y_head, y_rest = self.split((y,), outer, total // outer, reason)
        self.unify(x_head, y_head, reason)
        self.unify(x_rest, y_rest, reason)

    def take(self, axis: Axis, index: np.ndarray, reason: str) -> Axis:
        """The units `index` (int `[size]`) of an axis, in that order. Units may be taken several times, or not at all.

        An atom whose units are not taken equally often falls apart. Where a unit is of several atoms, and `index` does not take their
        product apart, all is frozen.
        """
        units = self._units(axis)
        if units is None:
            return self._take_of_product(axis, index, reason)
        ids, places = np.unique(units[units[:, 0] >= 0], axis=0, return_inverse=True)
        classes = np.full(len(units), -1)
        classes[units[:, 0] >= 0] = places.reshape(-1)
        taken = classes[index]
        times = np.bincount(taken[taken >= 0], minlength=len(ids))
        # Units that are taken are numbered in the order in which they are taken.
        order = list(dict.fromkeys((*taken[taken >= 0].tolist(), *range(len(ids)))))
        number = np.empty(len(ids), int)
        number[order] = np.arange(len(ids))
        kinds = [(int(ids[i, 0]), int(times[i])) for i in order]
        homes = self._regroup({(int(a), int(u)): int(number[i]) for i, (a, u) in enumerate(ids)}, kinds)
        return self._assembled([-1 if i < 0 else int(number[i]) for i in taken], homes)

    def _take_of_product(self, axis: Axis, index: np.ndarray, reason: str) -> Axis:
        segments = self.resolve(axis)
        if len(segments) == 1:
            inner = self._segment_size(segments[0][1:])
            rows = index.reshape(-1, inner) if len(index) % inner == 0 else np.zeros((0, inner), int)
            if (
                len(rows)
                and (rows // inner == rows[:, :1] // inner).all()
                and (rows % inner == rows[0] % inner).all()
            ):
                outer = self.take((segments[0][:1],), rows[:, 0] // inner, reason)
                return self.merge((outer, self.take((segments[0][1:],), rows[0] % inner, reason)))
        self.freeze(axis, reason)
        return self.fresh(len(index), reason)

    def _is_reordered(self, axis: Axis) -> bool:
        return any(isinstance(self._bindings[atom], Reordered) for segment in axis for atom in segment)

    def _units(self, axis: Axis) -> np.ndarray | None:
        """int `[size, 2]`: the free atom, and the unit of it, that each unit of an axis is, -1 where it is of none; None where a unit is of
        several atoms."""
        parts = [np.zeros((0, 2), int)]
        for segment in self.resolve(axis):
            units = np.full((1, 2), -1)
            for atom in segment:
                binding, size = self._bindings[atom], self._sizes[atom]
                if binding is None:
                    factor = np.stack([np.full(size, atom), np.arange(size)], axis=1)
                elif isinstance(binding, Reordered):
                    inner = self._units(binding.axis)
                    factor = None if inner is None else inner[binding.order]
                else:
                    factor = self._units(binding)
                if factor is None or ((units >= 0).any() and (factor >= 0).any()):
                    return None
                units = np.maximum(np.repeat(units, len(factor), axis=0), np.tile(factor, (len(units), 1)))
            parts.append(units)
        return np.concatenate(parts)

    def _unify_units(self, x: np.ndarray, y: np.ndarray, reason: str) -> None:
        """Makes units (as `_units` gives them) pairwise one: those of one atom that are so coupled with each other become a smaller one."""
        ids, places = np.unique(np.concatenate([x, y]), axis=0, return_inverse=True)
        first, second = np.split(places.reshape(-1), 2)
        if (first == second).all():
            return
        pairs = coo_array((np.ones(len(first)), (first, second)), shape=(len(ids), len(ids)))
        count, labels = connected_components(pairs, directed=False)
        members: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for label, (atom, unit) in zip(labels, ids.tolist()):
            members[label].append((atom, unit))
        # In the order of x.
        order = list(dict.fromkeys(labels[first].tolist()))
        kinds = [tuple(atom for atom, _ in members[label]) for label in order]
        for kind in kinds:
            if kind[0] < 0:
                self.freeze((tuple(a for a in kind if a >= 0),), reason)
        classes = {
            unit: number for number, label in enumerate(order) for unit in members[label] if unit[0] >= 0
        }
        self._regroup(classes, kinds)

    def _regroup(
        self, classes: dict[tuple[Atom, int], int], kinds: Sequence[Hashable]
    ) -> list[tuple[Atom, int]]:
        """Puts the units of free atoms together anew: those of one class become one unit, those of classes of one kind one atom.

        Args:
          classes: (atom, unit) -> number of its class, for all units of these atoms.
          kinds: of each class; classes of one kind have equally many units of each atom.

        Returns:
          The atom and unit that each class has become.
        """
        atoms: dict[Atom, list[int]] = {}
        for (atom, _), number in sorted(classes.items()):
            atoms.setdefault(atom, []).append(number)
        of_kind: dict[Hashable, list[int]] = {}
        for number, kind in enumerate(kinds):
            of_kind.setdefault(kind, []).append(number)
        homes: list[tuple[Atom, int]] = [(-1, -1)] * len(kinds)
        unchanged: set[Atom] = set()
        for numbers in of_kind.values():
            chosen = set(numbers)
            old = [atom for atom, own in atoms.items() if chosen.intersection(own)]
            if len(old) == 1 and len(atoms[old[0]]) == len(numbers) == len(
                chosen.intersection(atoms[old[0]])
            ):
                unchanged.add(old[0])
                for unit, number in enumerate(atoms[old[0]]):
                    homes[number] = (old[0], unit)
                continue
            reasons = [self._frozen[atom] for atom in old]
            new = self._new_atom(len(numbers), next((r for r in reasons if r is not None), None))
            for unit, number in enumerate(numbers):
                homes[number] = (new, unit)
        for atom, own in atoms.items():
            if atom not in unchanged:
                self._bindings[atom] = self._assembled(own, homes)
        return homes

    def _assembled(self, classes: Sequence[int], homes: Sequence[tuple[Atom, int]]) -> Axis:
        """The axis of the units that classes have become, in this order; a class of -1 is a unit of no atom."""
        copies: Counter[int] = Counter()
        starts: dict[tuple[Atom, int], int] = {}
        segments: list[Segment] = []
        size, places = 0, []
        for number in classes:
            if number < 0:
                segments.append(())
                places.append(size)
                size += 1
                continue
            atom, unit = homes[number]
            part = (atom, copies[number])
            copies[number] += 1
            if part not in starts:
                starts[part] = size
                segments.append((atom,))
                size += self._sizes[atom]
            places.append(starts[part] + unit)
        axis, order = tuple(segments), np.array(places, int)
        if (order == np.arange(size)).all():
            return axis
        atom = self._new_atom(size, None)
        self._bindings[atom] = Reordered(axis, order)
        return ((atom,),)

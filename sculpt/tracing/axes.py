"""The algebra of coupled axes: every array axis as a term over atomic axes, with unification.

    Axis    = tuple of segments, in index order          size = sum of the segments       (concatenation)
    Segment = tuple of atoms, outermost first            size = product of the atoms      (row-major reshape)
    Atom    = an integer; free, or bound to an Axis

`((),)` is the axis of size one, `()` the empty axis. Atoms are merged by union-find: binding an atom to a term refines
every axis that mentions it, also those of values seen long before, because terms are resolved only when they are read.
The index order of an array is the term itself: unit `i` of an axis is unit `i` of the expanded term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Atom = int
Segment = tuple[Atom, ...]
Axis = tuple[Segment, ...]
Term = tuple[Axis, ...]
"""The axes of one array."""

ONE: Axis = ((),)


class Axes:
    """A table of atoms and what is known of them. Grows while a program is traced, then only read."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._frozen: list[str | None] = []
        self._bindings: list[Axis | None] = []

    def fresh(self, size: int, frozen: str | None = None) -> Axis:
        """An axis of `size` that nothing is known of, or one that is frozen for a reason."""
        if size == 1:
            return ONE
        if size == 0:
            return ()
        self._sizes.append(int(size))
        self._frozen.append(frozen)
        self._bindings.append(None)
        return ((len(self._sizes) - 1,),)

    def atom_size(self, atom: Atom) -> int:
        return self._sizes[atom]

    def size(self, axis: Axis) -> int:
        return sum(self._segment_size(s) for s in axis)

    def _segment_size(self, segment: Segment) -> int:
        size = 1
        for atom in segment:
            size *= self._sizes[atom]
        return size

    def resolve(self, axis: Axis) -> Axis:
        """The axis with every bound atom replaced as far as the notation allows, in canonical form.

        A concatenation stays hidden behind its atom only where it is not the outermost factor of a product.
        """
        resolved: list[Segment] = []
        for segment in axis:
            resolved.extend(self._resolve_segment(segment))
        return tuple(resolved)

    def _resolve_segment(self, segment: Segment) -> list[Segment]:
        factors: list[Atom] = []
        pending = list(segment)
        while pending:
            atom = pending.pop(0)
            binding = self._bindings[atom]
            if binding is None:
                factors.append(atom)
                continue
            parts = self.resolve(binding)
            # Chains of aliases are cut short, as in any union-find; a concatenation keeps its name.
            name = self._concatenation_name(atom)
            if len(parts) == 1:
                self._bindings[atom] = parts
                pending = list(parts[0]) + pending
                continue
            if name != atom:
                self._bindings[atom] = ((name,),)
            if factors:
                # A concatenation inside a product stays behind its name, so that equal terms look equal.
                factors.append(name)
            else:
                rest = tuple(pending)
                return [s for part in parts for s in self._resolve_segment(part + rest)]
        return [tuple(factors)]

    def _concatenation_name(self, atom: Atom) -> Atom:
        while True:
            binding = self._bindings[atom]
            if binding is not None and len(binding) == 1 and len(binding[0]) == 1:
                atom = binding[0][0]
            else:
                return atom

    def atoms(self, axis: Axis) -> list[Atom]:
        """The free atoms of an axis, in order of first occurrence."""
        found: dict[Atom, None] = {}
        for segment in self.resolve(axis):
            for atom in segment:
                binding = self._bindings[atom]
                for inner in [atom] if binding is None else self.atoms(binding):
                    found.setdefault(inner)
        return list(found)

    def frozen(self, atom: Atom) -> str | None:
        return self._frozen[atom]

    def freeze(self, axis: Axis, reason: str) -> None:
        """Marks every atom of an axis as not prunable; the first reason given stays."""
        for atom in self.atoms(axis):
            if self._frozen[atom] is None:
                self._frozen[atom] = reason

    def _bind(self, atom: Atom, axis: Axis) -> None:
        reason = self._frozen[atom]
        if reason is not None:
            self.freeze(axis, reason)
        self._bindings[atom] = axis

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
        # Parts of size one stay atoms: each unit of a concatenation must be able to go alone.
        parts = [self._new_atom(position, reason), self._new_atom(size - position, reason)]
        self._bindings[atom] = tuple((p,) for p in parts)

    def _new_atom(self, size: int, reason: str | None) -> Atom:
        self._sizes.append(int(size))
        self._frozen.append(reason)
        self._bindings.append(None)
        return len(self._sizes) - 1

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
                if a[0][0] in self.atoms(b):
                    self.freeze(b, reason)
                else:
                    self._bind(a[0][0], b)
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

    def keep(self, axis: Axis, kept: Mapping[Atom, Any], xp: Any = np) -> Any:
        """Boolean `[size]`: which units stay, given those of free atoms (`[atom size]`; all where not named).

        Outer and over the factors of a product, concatenation over segments. `xp` is the array namespace: numpy, or
        `jax.numpy` for arrays that are traced.
        """
        parts = []
        for segment in self.resolve(axis):
            unit = np.ones(1, bool)
            for atom in segment:
                binding = self._bindings[atom]
                if binding is not None:
                    factor = self.keep(binding, kept, xp)
                else:
                    factor = kept.get(atom)
                    if factor is None:
                        factor = np.ones(self._sizes[atom], bool)
                unit = (unit[:, None] & factor[None, :]).reshape(-1)
            parts.append(unit)
        return xp.concatenate(parts) if len(parts) != 1 else parts[0]

    def places(self, axis: Axis, orders: Mapping[Atom, np.ndarray]) -> np.ndarray:
        """int `[left]`: which units of an axis stay, in their new order, given those of free atoms (`[left]`; all as they were where
        not named)."""
        parts, first = [np.zeros(0, np.int64)], 0
        for segment in self.resolve(axis):
            unit = np.zeros(1, np.int64)
            for atom in segment:
                binding, size = self._bindings[atom], self._sizes[atom]
                inner = (
                    self.places(binding, orders) if binding is not None else orders.get(atom, np.arange(size))
                )
                unit = (unit[:, None] * size + inner[None, :]).reshape(-1)
            parts.append(first + unit)
            first += self._segment_size(segment)
        return np.concatenate(parts)

    def infer(self, axis: Axis, keep: np.ndarray, kept: dict[Atom, np.ndarray]) -> None:
        """The inverse of `keep`: adds to `kept` the units of free atoms that are named by `keep` `[size]`. Where nothing is left of a
        product, nothing is said of its factors: which of them is empty it does not tell.

        Exact where `keep` was made by this algebra; callers compare `self.keep(axis, kept)` to be sure.
        """
        position = 0
        for segment in self.resolve(axis):
            sizes = [self._sizes[a] for a in segment]
            block = keep[position : position + int(np.prod(sizes))].reshape(sizes)
            position += block.size
            if len(segment) > 1 and not block.any():
                continue
            for dim, atom in enumerate(segment):
                factor = np.asarray(block.any(axis=tuple(d for d in range(len(sizes)) if d != dim)))
                binding = self._bindings[atom]
                if binding is not None:
                    self.infer(binding, factor, kept)
                elif not factor.all():
                    kept[atom] = kept.get(atom, np.ones(len(factor), bool)) & factor

    def labels(self, axis: Axis, atom: Atom) -> np.ndarray:
        """int32 `[size]`: the unit of `atom` that each unit of the axis belongs to, -1 where it belongs to none.

        An atom that occurs more than once in a product is reported by its outermost occurrence.
        """
        parts = [np.zeros(0, np.int32)]
        for segment in self.resolve(axis):
            unit = np.full(1, -1, np.int32)
            for factor in segment:
                binding = self._bindings[factor]
                if binding is not None:
                    inner = self.labels(binding, atom)
                elif factor == atom:
                    inner = np.arange(self._sizes[factor], dtype=np.int32)
                else:
                    inner = np.full(self._sizes[factor], -1, np.int32)
                unit = np.where(unit[:, None] >= 0, unit[:, None], inner[None, :]).reshape(-1)
            parts.append(unit)
        return np.concatenate(parts)

    def monomials(self, axis: Axis) -> list[tuple[int, tuple[Atom, ...]]]:
        """The size of an axis as a polynomial in the sizes of its free atoms: (coefficient, atoms) per monomial."""
        terms: list[tuple[int, tuple[Atom, ...]]] = []
        for segment in self.resolve(axis):
            product: list[tuple[int, tuple[Atom, ...]]] = [(1, ())]
            for atom in segment:
                binding = self._bindings[atom]
                factor = [(1, (atom,))] if binding is None else self.monomials(binding)
                product = [(c * d, a + b) for c, a in product for d, b in factor]
            terms.extend(product)
        return terms

"""Atomic axes and the array axes made of them: sizes, bindings and kept units.

    Axis    = tuple of segments, in index order          size = sum of the segments       (concatenation)
    Segment = tuple of atoms, outermost first            size = product of the atoms      (row-major reshape)
    Atom    = an integer; free, or bound to an Axis, perhaps with its units in another order

`((),)` is the axis of size one, `()` the empty axis. Atoms are merged by union-find: binding an atom to a term refines
every axis that mentions it, also those of values seen long before, because terms are resolved only when they are read.
The index order of an array is the term itself: unit `i` of an axis is unit `i` of the expanded term.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

Atom = int
Segment = tuple[Atom, ...]
Axis = tuple[Segment, ...]
Term = tuple[Axis, ...]
"""The axes of one array."""

ONE: Axis = ((),)


@dataclasses.dataclass(frozen=True, eq=False)
class Reordered:
    """The units of an axis in another order."""

    axis: Axis
    order: np.ndarray
    """int `[size]`, a permutation: which unit of `axis` each unit is."""


class Atoms:
    """A table of atoms and what is known of them."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._frozen: list[str | None] = []
        self._bindings: list[Axis | Reordered | None] = []

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
            if binding is None or isinstance(binding, Reordered):
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
            if isinstance(binding, tuple) and len(binding) == 1 and len(binding[0]) == 1:
                atom = binding[0][0]
            else:
                return atom

    def atoms(self, axis: Axis) -> list[Atom]:
        """The free atoms of an axis, in order of first occurrence."""
        found: dict[Atom, None] = {}
        for segment in self.resolve(axis):
            for atom in segment:
                binding = self._bindings[atom]
                if isinstance(binding, Reordered):
                    binding = binding.axis
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

    def freeze_all_but(self, atoms: Collection[Atom], reason: str) -> None:
        """Marks all other free atoms as not prunable."""
        for atom, binding in enumerate(self._bindings):
            if binding is None and atom not in atoms and self._frozen[atom] is None:
                self._frozen[atom] = reason

    def _bind(self, atom: Atom, axis: Axis) -> None:
        reason = self._frozen[atom]
        if reason is not None:
            self.freeze(axis, reason)
        self._bindings[atom] = axis

    def _new_atom(self, size: int, reason: str | None) -> Atom:
        self._sizes.append(int(size))
        self._frozen.append(reason)
        self._bindings.append(None)
        return len(self._sizes) - 1

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
                if isinstance(binding, Reordered):
                    factor = self.keep(binding.axis, kept, xp)[binding.order]
                elif binding is not None:
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
                if isinstance(binding, Reordered):
                    inner = np.flatnonzero(np.isin(binding.order, self.places(binding.axis, orders)))
                elif binding is not None:
                    inner = self.places(binding, orders)
                else:
                    inner = orders.get(atom, np.arange(size))
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
                if isinstance(binding, Reordered):
                    self.infer(binding.axis, factor[np.argsort(binding.order)], kept)
                elif binding is not None:
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
                if isinstance(binding, Reordered):
                    inner = self.labels(binding.axis, atom)[binding.order]
                elif binding is not None:
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
                if isinstance(binding, Reordered):
                    binding = binding.axis
                factor = [(1, (atom,))] if binding is None else self.monomials(binding)
                product = [(c * d, a + b) for c, a in product for d, b in factor]
            terms.extend(product)
        return terms

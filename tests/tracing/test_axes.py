"""The axis algebra against brute force: every unit of an axis carries a label, and labels must follow the operation."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sculpt.tracing.axes import ONE, Axes, Axis


def labelled(axes: Axes, axis: Axis) -> list[set[tuple[int, int]]]:
    """For every unit of the axis, the units of the free atoms that it is made of."""
    units: list[set[tuple[int, int]]] = []
    atoms = axes.atoms(axis)
    columns = {a: axes.labels(axis, a) for a in atoms}
    for i in range(axes.size(axis)):
        units.append({(a, int(columns[a][i])) for a in atoms if columns[a][i] >= 0})
    return units


@st.composite
def axis_and_table(draw: st.DrawFn) -> tuple[Axes, Axis]:
    """A random term: concatenations of products of fresh atoms."""
    axes = Axes()
    segments = draw(st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    return axes, tuple(s for sizes in segments for s in axes.merge(axes.fresh(n) for n in sizes))


@given(axis_and_table(), st.data())
def test_cut_keeps_the_index_order(table: tuple[Axes, Axis], data: st.DataObject) -> None:
    axes, axis = table
    position = data.draw(st.integers(0, axes.size(axis)))
    left, right = axes.cut(axis, position, "cut")
    assert (axes.size(left), axes.size(right)) == (position, axes.size(axis) - position)
    if all(axes.frozen(a) is None for a in axes.atoms(axis)):
        assert labelled(axes, left) + labelled(axes, right) == labelled(axes, axis)


@given(axis_and_table(), st.data())
def test_split_is_row_major(table: tuple[Axes, Axis], data: st.DataObject) -> None:
    axes, axis = table
    size = axes.size(axis)
    inner = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    outer_axis, inner_axis = axes.split(axis, size // inner, inner, "split")
    assert (axes.size(outer_axis), axes.size(inner_axis)) == (size // inner, inner)
    if all(axes.frozen(a) is None for a in axes.atoms(axis)):
        merged = axes.merge([outer_axis, inner_axis])
        assert labelled(axes, merged) == labelled(axes, axis)


@given(axis_and_table(), st.data())
def test_unify_makes_axes_equal_or_freezes_them(table: tuple[Axes, Axis], data: st.DataObject) -> None:
    axes, axis = table
    size = axes.size(axis)
    factor = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    other = axes.merge([axes.fresh(size // factor), axes.fresh(factor)])
    axes.unify(axis, other, "unify")
    if all(axes.frozen(a) is None for a in axes.atoms(axis) + axes.atoms(other)):
        assert axes.resolve(axis) == axes.resolve(other)
    # Whatever was frozen, what is still free means the same units on both sides.
    for atom in axes.atoms(axis):
        if axes.frozen(atom) is None:
            assert axes.labels(axis, atom).tolist() == axes.labels(other, atom).tolist()


@given(axis_and_table(), st.integers(0, 2**31))
def test_keep_and_infer_are_inverse(table: tuple[Axes, Axis], seed: int) -> None:
    axes, axis = table
    rng = np.random.default_rng(seed)
    kept = {}
    for atom in axes.atoms(axis):
        units = rng.random(axes.atom_size(atom)) < 0.6
        units[0] = True
        kept[atom] = units
    keep = axes.keep(axis, kept)
    expected = [all(kept[a][u] for a, u in unit) for unit in labelled(axes, axis)]
    assert keep.tolist() == expected
    found: dict[int, np.ndarray] = {}
    axes.infer(axis, keep, found)
    assert np.array_equal(axes.keep(axis, found), keep)


@given(axis_and_table())
def test_size_is_a_polynomial_in_atom_sizes(table: tuple[Axes, Axis]) -> None:
    axes, axis = table
    value = sum(c * int(np.prod([axes.atom_size(a) for a in atoms])) for c, atoms in axes.monomials(axis))
    assert value == axes.size(axis)


def test_a_late_split_refines_earlier_terms() -> None:
    axes = Axes()
    early = axes.fresh(12)
    late = axes.fresh(12)
    axes.unify(early, late, "same")
    axes.cut(late, 5, "cut")
    assert [axes.size((s,)) for s in axes.resolve(early)] == [5, 7]


def test_concatenation_of_coupled_parts() -> None:
    axes = Axes()
    a, b = axes.fresh(4), axes.fresh(4)
    joined = a + b
    other = axes.fresh(8)
    axes.unify(joined, other, "same")
    axes.unify(a, b, "same")
    (atom,) = axes.atoms(other)
    keep = axes.keep(other, {atom: np.array([True, False, True, True])})
    assert keep.tolist() == [True, False, True, True] * 2


def test_freezing_is_seen_through_bindings_both_ways() -> None:
    axes = Axes()
    a, b = axes.fresh(6), axes.fresh(6, frozen="input")
    axes.unify(a, b, "same")
    assert axes.frozen(axes.atoms(a)[0]) == "input"
    c, d = axes.fresh(6), axes.fresh(6)
    axes.unify(c, d, "same")
    axes.freeze(c, "later")
    assert axes.frozen(axes.atoms(d)[0]) == "later"


def test_unmatchable_products_are_frozen_with_the_reason() -> None:
    axes = Axes()
    x, y = axes.merge([axes.fresh(2), axes.fresh(3)]), axes.merge([axes.fresh(3), axes.fresh(2)])
    axes.unify(x, y, "two by three meets three by two")
    assert all(axes.frozen(a) == "two by three meets three by two" for a in axes.atoms(x) + axes.atoms(y))


def test_axes_of_size_one_carry_no_atom() -> None:
    axes = Axes()
    assert axes.fresh(1) == ONE and axes.size(ONE) == 1 and axes.fresh(0) == ()

"""The faults of the mutation check fit the code as it is."""

from __future__ import annotations

from tests.mutations import FAULTS, REPOSITORY


def test_the_line_of_each_fault_occurs_once() -> None:
    for fault in FAULTS:
        fault.place(REPOSITORY)

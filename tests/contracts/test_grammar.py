"""Random architectures: whatever is put together of known operations, masked and compact compute the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sculpt
from tests.architectures.equality import drawn_importance, drawn_policy, leanest_policy, prune
from tests.architectures.grammar import OPERATIONS, SIDE, Step, build
from tests.conftest import let_compiled_programs_go

STEPS = st.lists(
    st.builds(
        Step,
        operation=st.sampled_from(sorted(OPERATIONS)),
        source=st.integers(0, 3),
        other=st.integers(0, 3),
        width=st.integers(2, 6),
    ),
    min_size=2,
    max_size=7,
)

# The same examples in every run: a failure comes back, and is told as the list of steps that `check` takes.
reproducible = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check(steps: list[Step], seed: int) -> None:
    """In double precision, so that only a wrong program can differ: layers of normalisation magnify what is rounded."""
    let_compiled_programs_go()
    with jax.enable_x64(True):
        model = build(steps, jax.random.key(seed), jnp.float64)
        x = np.random.default_rng(seed).standard_normal((3, SIDE, SIDE, 3))
        trace = sculpt.trace(model, x)
        assert all(row.reason for row in trace.frozen)
        try:
            space = sculpt.make_space(trace, ("channels",), importance=drawn_importance(trace, seed))
        except ValueError:
            assert not trace.groups
            return
        policy = leanest_policy(space) if seed % 4 == 0 else drawn_policy(space, seed)
        pruned = prune(model, space, policy)
        pruned.assert_same_outputs(jnp.asarray(x), 1e-9)
        pruned.assert_claimed_cost(jnp.asarray(x))


@given(steps=STEPS, seed=st.integers(0, 99))
@settings(reproducible, max_examples=15)
@pytest.mark.slow
def test_random_architectures_compact_exactly(steps: list[Step], seed: int) -> None:
    check(steps, seed)


@pytest.mark.slow
@given(steps=STEPS, seed=st.integers(100, 999))
@settings(reproducible, max_examples=500)
def test_many_random_architectures_compact_exactly(steps: list[Step], seed: int) -> None:
    check(steps, seed)


@pytest.mark.slow
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
@pytest.mark.parametrize("width", [2, 3])
def test_every_operation_between_two_others(operation: str, width: int) -> None:
    check([Step("dense", 0, 0, 6), Step(operation, 0, 1, width), Step("dense", 0, 0, 4)], seed=1)

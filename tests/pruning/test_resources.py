"""What a budget limits: each resource by itself, several at once, looked up part by part."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import sculpt
from sculpt.pruning.costs import resource_used
from sculpt.pruning.resources import Lookup
from tests.networks import traced

BUDGET = 0.4


@functools.cache
def space() -> sculpt.Space:
    return sculpt.make_space(traced("residual"))


@functools.cache
def drawn() -> np.ndarray:
    return np.asarray(sculpt.random_policies(space(), jax.random.key(0), 50))


def looked_up() -> Lookup:
    """MACs as a table: layer by layer, for every combination of the options of the sites that it depends on."""
    base, atoms = space(), len(space().atoms)
    sites, steps, starts, values = [], [], [], []
    for layer in range(len(base.trace.layers)):
        rows = base.macs.owner == layer
        columns = {int(c) for c in base.macs.atoms[rows].reshape(-1) if c < atoms}
        own = sorted({int(base.atom_site[c]) for c in columns})
        counts = [int(base.num_options[s]) for s in own]
        strides = [int(np.prod(counts[i + 1 :])) for i in range(len(own))]
        steps.append([[stride * option for option in range(base.max_options)] for stride in strides])
        sites.append(own)
        starts.append(len(values))
        for choice in np.ndindex(*counts):
            policy = np.zeros(base.num_sites, np.int32)
            policy[own] = choice
            values.append(float(sculpt.pruning.layer_macs(base, policy)[layer]) / base.macs.total)
    degree = max(map(len, sites))

    def padded(rows: list[list[Any]], empty: Any) -> np.ndarray:
        return np.asarray([row + [empty] * (degree - len(row)) for row in rows], np.int32)

    return Lookup(
        "MACs, looked up", base.macs.total, 0.0, padded(sites, 0), padded(steps, [0] * base.max_options),
        np.asarray(starts, np.int32), np.asarray(values, np.float32), base.num_options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["macs", "macs_realised", "params"])
def test_what_can_be_counted_is_as_cost_tells(name: str) -> None:
    limited = sculpt.with_resource(space(), name)
    found = sculpt.cost(limited, drawn())
    told = getattr(found, f"{name}_ratio")
    np.testing.assert_allclose(found.used, told, rtol=1e-6)
    # On the host likewise.
    np.testing.assert_allclose(limited.resource.used(limited, drawn()), told, rtol=1e-5)
    assert limited.reachable[0] == pytest.approx(
        float(resource_used(limited, np.asarray(limited.num_options - 1))), rel=1e-5
    )


def test_a_table_of_parts_adds_up() -> None:
    limited = sculpt.with_resource(space(), looked_up())
    np.testing.assert_allclose(
        sculpt.cost(limited, drawn()).used, sculpt.cost(space(), drawn()).macs_ratio, rtol=1e-5
    )
    np.testing.assert_allclose(limited.option_cost, space().option_cost, rtol=1e-5)


@pytest.mark.parametrize(
    "resource",
    ["params", "macs_realised", ("macs", "params"), {"macs": 1.0, "params": 1.5}],
    ids=["params", "realised", "both", "allowances"],
)
@pytest.mark.slow
def test_projections_meet_every_budget_and_spend_one(resource: Any) -> None:
    limited = sculpt.with_resource(space(), resource)
    found = sculpt.cost(limited, sculpt.random_policies(limited, jax.random.key(1), 100, BUDGET))
    allowed = resource if isinstance(resource, dict) else dict.fromkeys(
        resource if isinstance(resource, tuple) else (resource,), 1.0
    )  # fmt: skip
    shares = np.stack([np.asarray(getattr(found, f"{n}_ratio")) / a for n, a in allowed.items()])
    assert shares.max() <= BUDGET + 2e-6
    assert np.median(shares.max(axis=0)) > 0.9 * BUDGET
    for rule in (
        sculpt.uniform_policy(limited, BUDGET),
        sculpt.pruning.project(limited, np.zeros_like(limited.option_cost), BUDGET).policy,
    ):
        assert float(sculpt.cost(limited, rule).used) <= BUDGET + 2e-6


@pytest.mark.slow
def test_a_cheaper_option_need_not_be_the_last() -> None:
    """A latency may rise where a layer shrinks: the least that can be reached is that of the cheapest options."""
    table = looked_up()
    odd = table.values.copy()
    # Wherever the last of the first part's sites takes its last option, whatever the others take.
    count = space().num_options[table.sites[0, (table.steps[0, :, 1] > 0).sum() - 1]]
    odd[count - 1 : table.start[1] : count] += 0.3
    limited = sculpt.with_resource(
        space(), Lookup("odd", 1.0, 0.0, table.sites, table.steps, table.start, odd, table.num_options)
    )
    last = float(resource_used(limited, np.asarray(limited.num_options - 1)))
    assert limited.reachable[0] < last - 0.2
    policies = sculpt.random_policies(limited, jax.random.key(2), 20, limited.reachable[0] + 1e-4)
    assert np.asarray(resource_used(limited, policies)).max() <= limited.reachable[0] + 2e-4


@pytest.mark.slow
def test_an_option_that_keeps_more_and_takes_less_time_is_taken() -> None:
    """Of eight channels seven may take longer than all: no projection stays there."""
    table = looked_up()
    slow = np.asarray([float(site.options[1].kept > 0.8) for site in space().sites])
    one = np.asarray([[site.index] for site in space().sites], np.int32)
    steps = np.zeros((space().num_sites, 1, space().max_options), np.int32)
    steps[:, 0] = np.arange(space().max_options)
    values = np.concatenate(
        [[o.kept + late * (i == 1) for i, o in enumerate(s.options)] + [0.0] * (space().max_options - len(s.options))
         for s, late in zip(space().sites, slow)]
    ).astype(np.float32) / space().num_sites  # fmt: skip
    start = np.arange(space().num_sites, dtype=np.int32) * space().max_options
    limited = sculpt.with_resource(
        space(), Lookup("time", 1.0, 0.0, one, steps, start, values, table.num_options)
    )
    policies = np.asarray(sculpt.random_policies(limited, jax.random.key(3), 30, 0.7))
    assert slow.any() and not (policies[:, slow > 0] == 1).any()
    assert np.asarray(resource_used(limited, policies)).max() <= 0.7 + 2e-6


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("flops", "unknown resource 'flops', expected macs, macs_realised, params"),
        ("parms", "did you mean 'params'"),
        ((), "one resource or more"),
        ({"macs": 2.0}, "the smallest of whose allowances is 1"),
        ({"macs": 1.0, "params": float("nan")}, "the smallest of whose allowances is 1"),
        (3, "expected a resource by name or from sculpt.measure_layers, got int"),
        (
            Lookup(
                "latency",
                1.0,
                0.0,
                np.asarray([[99]]),
                np.asarray([[[0]]]),
                np.zeros(1),
                np.ones(1),
                np.ones(2),
            ),
            "the latency was measured for a space of 2 sites",
        ),
    ],
)
def test_refusals(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sculpt.with_resource(space(), wrong)


def test_a_space_of_that_resource_is_left_alone() -> None:
    """What was compiled for it is used again."""
    assert sculpt.with_resource(space(), "macs") is space()
    limited = sculpt.with_resource(space(), "params")
    assert limited is not space() and sculpt.with_resource(limited, "params") is limited
    assert sculpt.with_resource(limited, "macs").option_cost.tolist() == space().option_cost.tolist()


def test_messages_name_the_resource() -> None:
    limited = sculpt.with_resource(space(), "params")
    with pytest.raises(ValueError, match="of its parameters; raise the budget"):
        sculpt.pruning.check_budget(limited, 1e-4)


def test_zeros_in_place_are_no_parameters_saved() -> None:
    entries = sculpt.make_space(traced("residual"), families=("2:4",))
    limited = sculpt.with_resource(entries, "params")
    assert limited.reachable == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"1\.0000 of its parameters \(zeros that stay in place are kept\)"):
        sculpt.uniform_policy(limited, 0.7)
    # Beside channels the budget is one of the arrays that are left.
    mixed = sculpt.with_resource(
        sculpt.make_space(traced("residual"), families=("channels", "2:4")), "params"
    )
    policy = np.asarray(mixed.num_options - 1)
    channels = [0 if site.family == "2:4" else option for site, option in zip(mixed.sites, policy)]
    wanted = float(sculpt.cost(mixed, channels).params_ratio)
    assert float(sculpt.cost(mixed, policy).used) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("budget", ["0.5", None, True, (0.5,), {"macs": 0.5}, float("nan"), np.ones(2)])
def test_budgets_of_a_wrong_type_are_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget is the share of MACs that is kept, a number in"):
        sculpt.uniform_policy(space(), budget)
    with pytest.raises(ValueError, match=r"SearchConfig.budget must be in \(0, 1\]"):
        sculpt.SearchConfig(budget=budget)


def test_budgets_may_be_scalars_of_numpy_and_jax() -> None:
    scalars: Any = (np.float32(0.5), np.asarray(0.5), jax.numpy.float32(0.5))
    for budget in scalars:
        sculpt.check_budget(space(), budget)

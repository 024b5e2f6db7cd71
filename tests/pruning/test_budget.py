"""The budget is met by construction, and spent."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sculpt
from sculpt.pruning.budget import lamp_policy, magnitude_policy, project, uniform_policy
from tests.networks import network, traced


@pytest.fixture(scope="module")
def space() -> sculpt.Space:
    return sculpt.make_space(traced("residual"))


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.fast("0.8")
def test_correctness_17_every_projection_meets_its_budget_and_spends_it(
    space: sculpt.Space, budget: float
) -> None:
    def one(key: jax.Array) -> jax.Array:
        logit_key, noise_key = jax.random.split(key)
        logits = 4.0 * jax.random.normal(logit_key, (space.num_sites, space.max_options))
        return project(space, logits, budget, noise_key).policy

    policies = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200))
    ratios = np.asarray(sculpt.cost(space, policies).macs_ratio)
    assert ratios.max() <= budget + 2e-6
    # No single step up would still fit.
    for policy, ratio in list(zip(np.asarray(policies), ratios))[:5]:
        for site in space.sites:
            for option in range(len(site.options)):
                changed = policy.copy()
                changed[site.index] = option
                value = float(sculpt.cost(space, changed).macs_ratio)
                better = (
                    space.option_cost[site.index, option] > space.option_cost[site.index, policy[site.index]]
                )
                assert not (better and ratio < value <= budget)


def test_strong_preferences_within_the_budget_are_kept(space: sculpt.Space) -> None:
    wanted = jnp.asarray([1] * space.num_sites)
    ratio = float(sculpt.cost(space, wanted).macs_ratio)
    logits = 50.0 * jax.nn.one_hot(wanted, space.max_options)
    policy = project(space, logits, ratio).policy
    assert float(sculpt.cost(space, policy).macs_ratio) <= ratio + 2e-6
    assert float((policy == wanted).mean()) > 0.8


@pytest.mark.parametrize("policy_of", ["uniform", "magnitude", "lamp"])
@pytest.mark.parametrize("budget", [0.2, 0.5])
@pytest.mark.fast("0.2-uniform", "0.5-uniform", "0.5-magnitude", "0.5-lamp")
def test_deterministic_controls_meet_the_budget(space: sculpt.Space, policy_of: str, budget: float) -> None:
    make = {
        "uniform": functools.partial(uniform_policy, space),
        "magnitude": functools.partial(magnitude_policy, space, network("residual").params),
        "lamp": functools.partial(lamp_policy, space, network("residual").params),
    }[policy_of]
    ratio = float(sculpt.cost(space, make(budget)).macs_ratio)
    assert 0.8 * budget <= ratio <= budget + 2e-6


def test_uniform_keeps_one_fraction_everywhere(space: sculpt.Space) -> None:
    policy = np.asarray(uniform_policy(space, 0.5))
    kept = [s.options[policy[s.index]].kept for s in space.sites if s.family == "channels"]
    assert max(kept) - min(kept) <= 0.5 and all(
        policy[s.index] == 0 for s in space.sites if s.family == "rect"
    )


@pytest.mark.parametrize(
    ("budget", "message"),
    [(0.0, r"in \(0, 1\]"), (1.5, r"in \(0, 1\]"), (1e-6, "can keep 0.0"), (-1, r"in \(0, 1\]")],
)
def test_impossible_budgets_are_refused_with_the_reachable_range(
    space: sculpt.Space, budget: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sculpt.random_policies(space, jax.random.key(0), 2, budget)


def test_random_policies_without_a_budget_use_every_option(space: sculpt.Space) -> None:
    policies = np.asarray(sculpt.random_policies(space, jax.random.key(0), 400))
    assert policies.shape == (400, space.num_sites)
    for site in space.sites:
        assert set(policies[:, site.index]) == set(range(len(site.options)))
    again = np.asarray(sculpt.random_policies(space, jax.random.key(0), 400))
    assert np.array_equal(policies, again)


def test_cost_agrees_one_by_one_in_batches_and_under_jit(space: sculpt.Space) -> None:
    policies = sculpt.random_policies(space, jax.random.key(1), 8)
    batch = sculpt.cost(space, policies)
    mapped = jax.jit(jax.vmap(lambda p: sculpt.cost(space, p)))(policies)
    for i, policy in enumerate(policies):
        one = sculpt.cost(space, policy)
        for a, b, c in zip(*map(jax.tree.leaves, (one, batch, mapped))):
            assert float(a) == pytest.approx(float(b[i])) == pytest.approx(float(c[i]))
    dense = sculpt.cost(space, np.zeros(space.num_sites, np.int32))
    assert float(dense.macs) == pytest.approx(space.trace.macs, rel=1e-6)
    assert float(dense.params) == pytest.approx(space.trace.num_params, rel=1e-6)


def wide() -> sculpt.Space:
    """Two layers of 13,340,874 parameters and as many MACs, which float32 cannot tell from 13,340,875."""
    shapes = {"a": (3, 4202), "b": (4202, 3171)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    model = sculpt.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    return sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 3))))


def test_counts_are_exact_whole_numbers() -> None:
    space = wide()
    dense = sculpt.cost(space, [0])
    assert (dense.macs, dense.macs_realised, dense.params) == (3 * 4202 + 4202 * 3171,) * 3
    assert all(type(count) is int for count in (dense.macs, dense.macs_realised, dense.params))
    assert type(dense.macs_ratio) is float and dense.macs_ratio == 1.0 and space.macs.total == dense.macs
    counts = [option.counts[0] for option in space.sites[0].options]
    found = sculpt.cost(space, np.arange(len(counts))[:, None])
    for values in (found.macs, found.macs_realised, found.params):
        assert values.dtype == np.int64 and values.tolist() == [n * (3 + 3171) for n in counts]
    layers = sculpt.layer_macs(space, [3])
    assert layers.dtype == np.int64 and layers.tolist() == [3 * counts[3], counts[3] * 3171]


def test_counts_of_a_stack_of_policies_keep_its_shape() -> None:
    space = wide()
    assert sculpt.cost(space, np.zeros((2, 3, 1), np.int32)).macs.shape == (2, 3)
    assert sculpt.cost(space, np.zeros((0, 1), np.int32)).params.shape == (0,)


@pytest.mark.parametrize("families", [("unstructured",), ("2:4",), ("channels", "unstructured")])
def test_single_entries_are_counted_in_whole_numbers(families: tuple[str, ...]) -> None:
    params = {"a": jnp.ones((4, 12)), "b": jnp.ones((12, 4))}
    model = sculpt.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    space = sculpt.make_space(sculpt.trace(model, jnp.zeros((1, 4))), families)
    for policy in np.asarray(sculpt.random_policies(space, jax.random.key(0), 20)):
        found, kept, entries = sculpt.cost(space, policy), 12, {}
        for site in space.sites:
            option = site.options[policy[site.index]]
            if site.family == "channels":
                kept = option.counts[0]
            else:
                entries[site.name] = option.counts[0]
        expected = sum(round(4 * kept * entries.get(name, 48) / 48) for name in ("a", "b"))
        assert found.params == found.macs and abs(found.params - expected) <= (2 if len(families) > 1 else 0)
        assert found.macs_realised == 8 * kept

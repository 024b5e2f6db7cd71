"""Into which groups filters are put: by a clock that is known, and by the real one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sculpt
from sculpt.ir.program import flatten
from sculpt.latency import group_overheads
from sculpt.pruning.compaction.compactor import max_difference
from tests.networks import network, traced

X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


class Wide(nn.Module):
    """Enough filters for several groups, twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (96, 64):
            x = nn.relu(nn.Conv(width, (3, 3), use_bias=False)(x))
        return nn.Dense(5)(x.mean((1, 2)))


KERNELS = {"Conv_0/kernel", "Conv_1/kernel"}


@pytest.fixture(scope="module")
def wide() -> tuple[sculpt.Model, sculpt.Space, np.ndarray]:
    """Masked: every filter of two rows or columns, or fewer."""
    module = Wide()
    model = sculpt.from_linen(module, module.init(jax.random.key(0), X[:1]))
    space = sculpt.make_space(sculpt.trace(model, X[:1]), "rect_grouped")
    policy = np.full(space.num_sites, 3, np.int32)
    return sculpt.apply_masks(model, sculpt.make_masks(space, model.params, policy)), space, policy


def convolutions(model: sculpt.Model, x: np.ndarray) -> list[tuple[int, ...]]:
    """Shapes of the kernels."""
    program = flatten(model.apply, model.params, model.state, x)
    return [program.shape(eqn.inputs[1]) for eqn in program.equations if eqn.name == "conv_general_dilated"]


def install(monkeypatch: pytest.MonkeyPatch, seconds_of: Callable[[list[tuple[int, ...]]], float]) -> None:
    """A machine that computes a layer in a time that goes by the kernels of its convolutions."""

    class Engine:
        channels_first = True

        def prepare(self, model: sculpt.Model, x: np.ndarray, threads: int) -> float:
            assert jax.eval_shape(model, x).shape
            return seconds_of(convolutions(model, x))

    monkeypatch.setattr(group_overheads, "engine_of", lambda name: Engine())
    monkeypatch.setattr(group_overheads, "seconds_beside", lambda own, other, repeats: (own / other, other))


@pytest.mark.parametrize("per_call", [0.0, 4e3, 1e9])
@pytest.mark.slow
def test_the_fastest_cut_is_found(
    monkeypatch: pytest.MonkeyPatch, wide: tuple[sculpt.Model, sculpt.Space, np.ndarray], per_call: float
) -> None:
    model, space, policy = wide

    def seconds_of(kernels: list[tuple[int, ...]]) -> float:
        return sum(per_call + np.prod(kernel) for kernel in kernels)

    install(monkeypatch, seconds_of)
    found = sculpt.measure_group_overheads(model, space, policy, X)
    assert found.keys() == KERNELS
    best = sculpt.compact(model, space, policy, overheads=found)
    assert max_difference(model, best, jnp.asarray(X)) < 1e-5
    times = {}
    for overhead in (None, *group_overheads._TRIED):
        small = sculpt.compact(model, space, policy, overheads=dict.fromkeys(found, overhead), check=False)
        times[overhead] = seconds_of(convolutions(small, X))
    assert seconds_of(convolutions(best, X)) <= min(times.values()) / group_overheads._WORTH + 1e-9
    assert (best.apply.describe() == model_in_one_piece(wide)) == (per_call == 1e9)


def test_the_rule_s_groups_stay_unless_others_are_clearly_faster() -> None:
    best = group_overheads._best
    assert best({16: 0.90, 0: 0.89, 64: 0.95}) == 16
    assert best({16: 0.90, 0: 0.80, 64: 0.95}) == 0
    assert best({16: 0.98, 0: 0.96}) == 0  # the rule's gain nothing
    assert best({0: 0.50, 32: 0.60}) == 0  # those of the rule are one piece
    assert best({16: 0.98, 0: 0.99}) is None


def model_in_one_piece(wide: tuple[sculpt.Model, sculpt.Space, np.ndarray]) -> tuple[str, ...]:
    model, space, policy = wide
    small = sculpt.compact(model, space, policy, overheads=dict.fromkeys(KERNELS, None))
    assert len(convolutions(small, X)) == 2
    return small.apply.describe()


@pytest.mark.slow
def test_a_real_clock(wide: tuple[sculpt.Model, sculpt.Space, np.ndarray]) -> None:
    model, space, policy = wide
    found = sculpt.measure_group_overheads(model, space, policy, X, threads=1, repeats=1)
    assert found.keys() == KERNELS and set(found.values()) <= {None, *group_overheads._TRIED}


def test_nothing_to_cut() -> None:
    space = sculpt.make_space(traced("plain"), "channels")
    policy = np.zeros(space.num_sites, np.int32)
    assert sculpt.measure_group_overheads(network("plain"), space, policy, X) == {}


@pytest.mark.slow
def test_refusals(wide: tuple[sculpt.Model, sculpt.Space, np.ndarray]) -> None:
    model, space, policy = wide
    with pytest.raises(
        ValueError, match=r"kernels of rect_grouped \(Conv_0/kernel, Conv_1/kernel\), got Dense_0/kernel"
    ):
        sculpt.compact(model, space, policy, overheads={"Dense_0/kernel": 3})
    with pytest.raises(
        ValueError, match=r"overheads are whole numbers of 0 or more, or None; Conv_0/kernel has -1"
    ):
        sculpt.compact(model, space, policy, overheads={"Conv_0/kernel": -1})
    with pytest.raises(ValueError, match="repeats must be a whole number of at least 1, got 0"):
        sculpt.measure_group_overheads(model, space, policy, X, repeats=0)
    for threads in (0, "two"):
        with pytest.raises(ValueError, match="threads must be a whole number from 1 to"):
            sculpt.measure_group_overheads(model, space, policy, X, threads=threads)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected an example input float32\[batch, 8, 8, 3\]"):
        sculpt.measure_group_overheads(model, space, policy, X[..., :2])
    with pytest.raises(ValueError, match="zeros in place"):
        sculpt.measure_group_overheads(
            sculpt.from_linen(Wide(), Wide().init(jax.random.key(0), X[:1])), space, policy, X
        )

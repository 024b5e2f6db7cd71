"""High-level operations of JAX, read as what they are made of. That they are traced and compacted is of the architectures' contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sculpt.ir.program import FlatProgram, flatten
from tests.architectures.high_level import Rounded, Softsign, new_rematerialisation

X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def names(program: FlatProgram) -> list[str]:
    return [eqn.name for eqn in program.equations]


def test_the_new_rematerialisation_reads_as_the_old() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda x: checkpoint_name(jnp.sin(x), "sine") * 2.0, policy=policy)(x)

    policy = jax.checkpoint_policies.dots_saveable
    old = flatten(function, X)
    with new_rematerialisation():
        new = flatten(function, X)
    assert names(new) == ["checkpoint"] and names(old) in (["checkpoint"], ["remat2"])
    assert new.equations[0].params["policy"] is policy
    assert names(new.equations[0].bodies[0]) == ["sin", "mul"]
    assert [n for n in names(old.equations[0].bodies[0]) if n != "name"] == ["sin", "mul"]


def test_operations_keep_their_derivative_and_are_inlined_where_they_have_none() -> None:
    assert names(flatten(lambda x: Rounded(x)(x), X)) == ["custom_vjp_call"]
    assert names(flatten(lambda x: Softsign(x)(x), X)) == ["abs", "add", "div"]
    mapped = flatten(jax.vmap(lambda row: Rounded(row)(row)), X)
    assert names(mapped) == ["custom_vjp_call"]
    assert names(mapped.equations[0].bodies[0])[:2] == ["mul", "round"]


def test_sums_over_a_mapped_axis_are_sums_over_an_axis() -> None:
    def row(x: jax.Array) -> tuple[jax.Array, ...]:
        return jax.lax.pmean((x, 2.0 * x), "rows"), jax.lax.pmax(x, "rows"), jax.lax.pmin(x, "rows")

    found = names(flatten(jax.vmap(row, axis_name="rows"), X))
    assert sorted(n for n in found if n.startswith(("reduce", "p"))) == [
        *("reduce_max", "reduce_min", "reduce_sum", "reduce_sum"),
    ]

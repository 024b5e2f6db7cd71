"""Replaces high-level operations (`jax.experimental.hijax`) and sums over mapped axes by simpler ones.

JAX's new rematerialisation (`jax_remat3`) is such an operation, and users write their own. In a jaxpr each is one equation
`call_hi_primitive` around an object that knows its expansion; here it becomes the call that has meant the same all along.

`jax.lax.psum` over the axis of a `jax.vmap` (Equinox' and Haiku's BatchNorm take means so) is a sum over an array's own axis, by another name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core as jax_core

_COLLECTIVES: dict[str, Callable[..., jax.Array]] = {"psum": jnp.sum, "pmax": jnp.max, "pmin": jnp.min}


def as_low_level(eqn: Any) -> Any:
    """The equation as a low-level one, for reading alone (its primitive is made anew for its name): rematerialised regions as `checkpoint`,
    what has a reverse derivative of its own as `custom_vjp_call`, all else as a plain call. Operations on other values than arrays, and
    equations that are low-level already, stay what they are."""
    if eqn.primitive.name in _COLLECTIVES and _over_own_axes(eqn.params):
        params = {"call_jaxpr": _reduction(eqn)}
        return eqn.replace(primitive=jax_core.Primitive("closed_call"), params=params)
    if eqn.primitive.name != "call_hi_primitive":
        return eqn
    operation = eqn.params["_prim"]
    if not all(isinstance(v.aval, ShapedArray) for v in (*eqn.invars, *eqn.outvars)):
        return eqn
    kind = type(operation)
    known = kind.__name__ if kind.__module__.startswith("jax.") else ""
    if known == "RematTraced":
        params = {"jaxpr": operation.jaxpr, "prevent_cse": True, "policy": operation.policy}
        return eqn.replace(primitive=jax_core.Primitive("checkpoint"), params=params)
    name = "custom_vjp_call" if known != "CheckpointName" and _has_derivative(kind) else "closed_call"
    params = {"call_jaxpr": _expansion(operation, [v.aval for v in eqn.invars])}
    return eqn.replace(primitive=jax_core.Primitive(name), params=params)


def _over_own_axes(params: Mapping[str, Any]) -> bool:
    return all(isinstance(axis, int) for axis in params["axes"]) and params["axis_index_groups"] is None


def _reduction(eqn: Any) -> Any:
    reduce, axes = _COLLECTIVES[eqn.primitive.name], eqn.params["axes"]

    def function(*operands: jax.Array) -> list[jax.Array]:
        return [reduce(x, axis=axes).astype(x.dtype) for x in operands]

    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars))


def _has_derivative(kind: type) -> bool:
    # The base class has other names in other versions of JAX, all in one module.
    return any("vjp_fwd" in vars(base) for base in kind.__mro__ if base.__module__ != "jax._src.hijax")


def _expansion(operation: Any, avals: list[Any]) -> Any:
    def function(*operands: Any) -> list[Any]:
        return jax.tree.leaves(operation.expand(*jax.tree.unflatten(operation.in_tree, operands)))

    return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))

"""JAX's primitives with a program inside (calls, loops, branches): where each version of JAX keeps what of them is read here.

JAX changes the parameters of these primitives between versions. Nothing else reads them: an `Equation` of one has parameters of the names in
`PARAMETERS`, and the functions below say which of its operands are what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend import core as jax_core

T = TypeVar("T")

PARAMETERS: dict[str, tuple[str, ...]] = {
    "scan": ("num_consts", "num_carry", "length", "reverse", "unroll"),
    "while": ("cond_nconsts", "body_nconsts"),
    "cond": (),
    "custom_jvp_call": (),
    "custom_vjp_call": (),
    "checkpoint": ("prevent_cse", "policy"),
    "remat2": ("prevent_cse", "policy"),
}
"""Primitives that stay one equation with bodies, and the parameters of such an `Equation`, in every version of JAX and in model files."""

_BODIES = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "checkpoint": ("jaxpr",),
    "remat2": ("jaxpr",),
}
"""The parameters of JAX that hold the bodies of an equation that stays one."""

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_vmap_call": "call",
}
"""Call primitives that are inlined, and the parameter of JAX that holds their body."""


def called(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that an equation calls and the values of its constants; None unless the equation is a plain call."""
    body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    if body is None:
        return None
    closed = _closed(body)
    return closed.jaxpr, closed.consts


def bodies(eqn: Any) -> list[Any]:
    """The closed jaxprs inside an equation that is not inlined."""
    found: list[Any] = []
    for parameter in _BODIES.get(eqn.primitive.name, ()):
        value = eqn.params[parameter]
        found += map(_closed, value if isinstance(value, tuple) else (value,))
    return found


def _closed(jaxpr: Any) -> Any:
    """JAX before 0.12 tells jaxprs with constants from those without."""
    return jaxpr if hasattr(jaxpr, "consts") else jax_core.ClosedJaxpr(jaxpr, ())


def parameters(eqn: Any) -> dict[str, Any]:
    """The parameters of an `Equation`: JAX's own of an operation, those of `PARAMETERS` of an equation with bodies."""
    names = PARAMETERS.get(eqn.primitive.name)
    if names is None:
        return dict(eqn.params)
    params = dict(eqn.params)
    if eqn.primitive.name == "scan" and "ft_in" in params:
        # Since JAX 0.12: trees of the constants, the carry and the arrays that are scanned over.
        consts, carry, _ = params["ft_in"].unpack()
        params["num_consts"], params["num_carry"] = len(consts), len(carry)
    if missing := [name for name in names if name not in params]:
        raise ValueError(
            f"expected {eqn.primitive.name} to have {', '.join(missing)}, JAX {jax.__version__} gives {', '.join(eqn.params)}; this version "
            "of JAX is newer than sculpt knows: install an older one"
        )
    return {name: params[name] for name in names}


def function_of(eqn: Any) -> Callable[..., list[Any]]:
    """An equation of a jaxpr as a function of its operands, literals included."""

    def evaluate(*operands: Any) -> list[Any]:
        with eqn.ctx.manager:
            results = apply(eqn.primitive, operands, eqn.params)
        return list(results) if eqn.primitive.multiple_results else [results]

    return evaluate


def apply(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Applies a primitive to operands, given the parameters that an equation has."""
    return primitive.bind(*operands, **primitive.get_bind_params(params))


def scan_parts(eqn: Any, operands: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    """Of the operands of the `Equation` of a scan (or of one thing for each): constants, carry, and what is scanned over."""
    first = eqn.params["num_consts"]
    last = first + eqn.params["num_carry"]
    return list(operands[:first]), list(operands[first:last]), list(operands[last:])


def scan_results(eqn: Any, results: Sequence[T]) -> tuple[list[T], list[T]]:
    """Of the results of the `Equation` of a scan, or of its body: carry, and what is stacked."""
    count = eqn.params["num_carry"]
    return list(results[:count]), list(results[count:])


def scan_steps(eqn: Any) -> int:
    """The number of steps of the `Equation` of a scan."""
    return eqn.params["length"]


def scan_options(eqn: Any) -> dict[str, Any]:
    """Keywords with which `jax.lax.scan` makes the `Equation` of a scan anew."""
    return {name: eqn.params[name] for name in ("length", "reverse", "unroll")}


def while_parts(eqn: Any, operands: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    """Of the operands of the `Equation` of a while loop: constants of its condition, constants of its body, and carry."""
    first = eqn.params["cond_nconsts"]
    last = first + eqn.params["body_nconsts"]
    return list(operands[:first]), list(operands[first:last]), list(operands[last:])


def remat_options(eqn: Any) -> dict[str, Any]:
    """Keywords with which `jax.checkpoint` makes the `Equation` of a rematerialised region anew."""
    return {name: eqn.params[name] for name in ("prevent_cse", "policy")}

"""Parameters of JAX's calls, loops and branches, which differ between versions of JAX.

JAX changes the parameters of these primitives between versions. Nothing else reads them: an `Equation` of one has parameters of the names in
`PARAMETERS`, and the functions below say which of its operands are what.
"""

from __future__ import annotations

import math
import os
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
    "shard_map": ("mesh", "in_specs", "out_specs", "check_vma", "newly_manual_axes"),
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
    "shard_map": ("jaxpr",),
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


def called(eqn: Any, among_devices: bool) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that an equation calls and the values of its constants; None unless the equation is a plain call.

    In a `shard_map` (`among_devices`) so is a function with a derivative of its own: JAX's rules cannot be traced outside of it.
    """
    body = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    if among_devices and eqn.primitive.name == "custom_jvp_call":
        body = eqn.params["call_jaxpr"]
    if body is None:
        return None
    closed = _closed(body)
    return closed.jaxpr, closed.consts


def bodies(eqn: Any) -> list[Any]:
    """The closed jaxprs inside an equation that is not inlined; none where a `shard_map` does more than map over first axes."""
    found: list[Any] = []
    if eqn.primitive.name == "shard_map" and not _only_maps(eqn):
        return found
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
    if names is None or (eqn.primitive.name == "shard_map" and not _only_maps(eqn)):
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


def shard_options(eqn: Any) -> dict[str, Any]:
    """Keywords with which `jax.shard_map` makes the `Equation` of one anew."""
    names = {"newly_manual_axes": "axis_names"}
    return {names.get(name, name): eqn.params[name] for name in PARAMETERS["shard_map"]}


def shard_counts(eqn: Any) -> tuple[list[int], list[int]]:
    """Into how many parts a `shard_map` splits the first axis of each operand, and of each result."""
    first, second = (_split_axes(eqn, specs) for specs in (eqn.params["in_specs"], eqn.params["out_specs"]))
    sizes = eqn.params["mesh"].shape
    return tuple(
        [math.prod(sizes[n] for n in axes[0]) if axes else 1 for axes in part] for part in (first, second)
    )  # type: ignore[return-value]


def _split_axes(eqn: Any, specs: Sequence[Any]) -> list[list[tuple[str, ...]]]:
    """For each array, by axis, the mesh axes of more than one device that it is split over."""
    sizes = eqn.params["mesh"].shape
    found = []
    for spec in specs:
        parts = [() if part is None else part if isinstance(part, tuple) else (part,) for part in spec]
        found.append([tuple(name for name in part if sizes[name] > 1) for part in parts])
    return found


def _only_maps(eqn: Any) -> bool:
    """Whether a `shard_map` splits arrays along their first axis alone, all that it splits alike, its devices exchange nothing, and
    no function in it has a derivative that the user gave it."""
    arrays = [*_split_axes(eqn, eqn.params["in_specs"]), *_split_axes(eqn, eqn.params["out_specs"])]
    if any(any(axes[1:]) for axes in arrays) or len({axes[0] for axes in arrays if axes and axes[0]}) > 1:
        return False
    return not _is_more_than_a_map(_closed(eqn.params["jaxpr"]).jaxpr, set(eqn.params["mesh"].axis_names))


def _is_more_than_a_map(jaxpr: Any, names: set[str]) -> bool:
    """Whether an operation is over mesh axes of these names, other than to say that a value differs along them, or has a derivative of the
    user's."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "custom_vjp_call":
            return True
        if eqn.primitive.name == "custom_jvp_call" and not _is_jax_s_own(
            _closed(eqn.params["call_jaxpr"]).jaxpr
        ):
            return True
        for parameter in ("axes", "axis_name"):
            value = eqn.params.get(parameter, ())
            values = value if isinstance(value, (tuple, list, set, frozenset)) else (value,)
            if eqn.primitive.name != "pvary" and any(isinstance(v, str) and v in names for v in values):
                return True
        if any(_is_more_than_a_map(inner, names) for inner in jax_core.jaxprs_in_params(eqn.params)):
            return True
    return False


def _is_jax_s_own(jaxpr: Any) -> bool:
    """Whether JAX itself wrote the function that was traced, such as `jax.nn.relu`."""
    return os.path.dirname(jax.__file__) in jaxpr.debug_info.func_src_info

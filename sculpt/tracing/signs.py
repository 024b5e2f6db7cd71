"""The sign pass: values that are never negative, whose maximum ignores zeros.

Only floating-point numbers and unsigned ones are followed: whole numbers with a sign can overflow. NaN counts as not below zero.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from sculpt.ir.program import Equation, FlatProgram, Operand

_ALWAYS = frozenset("abs acosh cosh erfc exp exp2 logistic sqrt square".split())
_IF_ALL_ARE = frozenset(
    "add add_any asinh atan broadcast_in_dim cbrt ceil clamp concatenate conv_general_dilated convert_element_type copy cummax cummin cumprod "
    "cumsum div dot_general erf expm1 floor integer_pow log1p max min mul optimization_barrier pad reduce_max reduce_min reduce_precision "
    "reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum reshape reshard rev round sharding_constraint sign sinh slice "
    "sort split squeeze stack tanh tile transpose unstack".split()
)


def never_negative(
    program: FlatProgram,
    eqn: Equation,
    known: Callable[[Operand], bool],
    maker: Callable[[Operand], Equation | None],
) -> bool:
    """Whether no entry of the results of an equation without bodies is below zero.

    Args:
      program: what the equation is part of.
      eqn: the equation.
      known: whether no entry of an operand is below zero.
      maker: the equation that gives an operand, if there is one.
    """
    dtype = program.avals[eqn.outputs[0]].dtype
    if dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.unsignedinteger):
        return True
    if not jnp.issubdtype(dtype, jnp.floating):
        return False
    if eqn.name in _ALWAYS or (eqn.name in _IF_ALL_ARE and all(map(known, eqn.inputs))):
        return True
    if eqn.name in ("pow", "dynamic_slice"):
        return known(eqn.inputs[0])
    if eqn.name == "max":
        return any(map(known, eqn.inputs))
    if eqn.name == "mul":
        return eqn.inputs[0] == eqn.inputs[1]
    if eqn.name == "integer_pow":
        return eqn.params["y"] % 2 == 0
    return eqn.name == "select_n" and _selected(eqn, known, maker)


def _selected(
    eqn: Equation, known: Callable[[Operand], bool], maker: Callable[[Operand], Equation | None]
) -> bool:
    """Whether no case is below zero. Softplus (`logaddexp(x, 0)`) gives `x + 0` where `x - 0` is NaN: that is NaN or infinity."""
    which, *cases = eqn.inputs
    if all(map(known, cases)):
        return True
    if len(cases) != 2 or not known(cases[0]):
        return False
    unequal, total = maker(which), maker(cases[1])
    if unequal is None or unequal.name != "ne" or unequal.inputs[0] != unequal.inputs[1]:
        return False
    gap = maker(unequal.inputs[0])
    if gap is None or total is None or (gap.name, total.name) != ("sub", "add"):
        return False
    return gap.inputs == total.inputs and any(map(known, total.inputs))

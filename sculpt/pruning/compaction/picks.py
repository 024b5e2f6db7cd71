"""Reversals, strided slices and constant gathers of an axis that lost units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.ir.program import Equation


class _Pick:
    """Stands for a primitive in an `Equation`."""

    name = "pick"
    multiple_results = False

    def get_bind_params(self, params: dict[str, Any]) -> dict[str, Any]:
        return params

    def bind(
        self, array: Any, *_: Any, places: Mapping[int, np.ndarray], move: tuple[int, int], then: Any
    ) -> jax.Array:
        """Takes `places` (axis -> int `[units]`), moves an axis to where it is expected, and does `then` (a primitive and its parameters)."""
        for dim, units in places.items():
            # Of nothing only nothing is taken.
            array = jnp.take(array, units, axis=dim, mode="clip") if len(units) else array[_none(array, dim)]
        array = jnp.moveaxis(array, *move)
        return array if then is None else then[0].bind(array, **then[1])


_PICK = _Pick()


def result_dim(eqn: Equation, dim: int) -> int:
    """The axis of the result that the units of an operand's axis go to."""
    if eqn.name != "gather":
        return dim
    windows = eqn.params["dimension_numbers"].offset_dims
    return next(d for d in range(len(windows) + 1) if d not in windows)


def picking(eqn: Equation, params: Mapping[str, Any], places: Mapping[int, np.ndarray]) -> Equation:
    """The equation with other places.

    Args:
      eqn: a `rev`, `slice` or `gather` that takes units of some axes of its operand.
      params: its parameters, right for all other axes.
      places: axis of the operand -> int `[units]`, the places that are taken.
    """
    params, move = dict(params), (0, 0)
    if eqn.name == "gather":
        ((dim, _),) = places.items()
        then, move = None, (dim, result_dim(eqn, dim))
    elif eqn.name == "rev":
        then = (eqn.primitive, {"dimensions": tuple(d for d in params["dimensions"] if d not in places)})
    else:
        bounds = {"start_indices": 0, "strides": 1}
        for name, value in bounds.items():
            params[name] = tuple(value if d in places else n for d, n in enumerate(params[name]))
        limits = enumerate(params["limit_indices"])
        params["limit_indices"] = tuple(len(places[d]) if d in places else n for d, n in limits)
        then = (eqn.primitive, params)
    return Equation(
        _PICK, eqn.inputs[:1], eqn.outputs, {"places": places, "move": move, "then": then}, eqn.source
    )  # type: ignore[arg-type]


def _none(array: Any, dim: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (slice(0, 0),)

"""Valid values of the options of a network, from the types of its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_origin

import jax.numpy as jnp

from sculpt.arguments import is_real, is_whole

_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Names of what activations can be computed in."""


def _is_dtype(value: Any) -> bool:
    try:
        return value is None or jnp.dtype(value).name in _DTYPES
    except TypeError:
        return False


Possible = tuple[str, Callable[[Any], bool]]
_WHOLE = "a whole number of at least 1"
_POSITIVE: Possible = ("a number above 0", lambda value: is_real(value) and value > 0)
_SHARE: Possible = ("a number from 0 to below 1", lambda value: is_real(value) and 0 <= value < 1)
_NUMBERS = {"width_multiplier": _POSITIVE, "epsilon": _POSITIVE, "momentum": _SHARE, "dropout": _SHARE}
_KINDS: dict[Any, Possible] = {
    int: (_WHOLE, lambda value: is_whole(value, 1)),
    int | None: (f"{_WHOLE}, or None", lambda value: value is None or is_whole(value, 1)),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    Any: (f"None, or a dtype of jax.numpy: {', '.join(_DTYPES)}", _is_dtype),
}


def check_option(network: str, name: str, kind: Any, value: Any) -> None:
    """Raises ValueError unless `value` is possible for the field `name`, which is declared as `kind`."""
    if get_origin(kind) is tuple:
        expected, fits = f"{kind} of whole numbers of at least 1", _is_nested(value, kind)
    else:
        expected, possible = _NUMBERS[name] if kind is float else _KINDS[kind]
        fits = possible(value)
    if not fits:
        raise ValueError(f"{name} of {network} must be {expected}, got {value!r}")


def _is_nested(value: Any, kind: Any) -> bool:
    """Whether these are tuples of whole numbers, or of whatever else stands in the type."""
    if get_origin(kind) is not tuple:
        return is_whole(value, 1) if kind is int else isinstance(value, kind)
    kinds = get_args(kind)
    if not isinstance(value, tuple) or not value or (kinds[-1] is not ... and len(value) != len(kinds)):
        return False
    return all(_is_nested(part, kinds[0]) for part in value)

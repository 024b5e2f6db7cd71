"""Argument checks: refuses wrong types and misspelt names, and suggests the nearest name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_MADE_BY = {
    "Model": "sculpt.from_linen, sculpt.from_nnx or sculpt.from_function",
    "Trace": "sculpt.trace",
    "Space": "sculpt.make_space",
    "Splits": "sculpt.load_data or sculpt.from_arrays",
    "Importance": "sculpt.importance",
    "Task": "sculpt.Task(loss, score)",
}
"""Name of a class -> what makes one, where that is not the class itself."""


class UnknownArgument(TypeError, ValueError):
    """A keyword that nothing is called."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function check its arguments by their annotations, as `check_argument` does, and its keywords."""
    names = tuple(inspect.signature(function).parameters)
    # Not before the first call: then everything that annotations name is there.
    kinds = functools.cache(lambda: get_type_hints(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_keywords(function.__name__, kwargs, names)
        for name, value in (*zip(names, args), *kwargs.items()):
            check_argument(name, value, kinds().get(name))
        return function(*args, **kwargs)

    return call


def checked_fields(settings: type[T]) -> type[T]:
    """Has the constructor of a dataclass check its keywords."""
    construct = settings.__init__
    names = tuple(inspect.signature(construct).parameters)[1:]

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        check_keywords(settings.__name__, kwargs, names)
        construct(self, *args, **kwargs)

    settings.__init__ = init
    return settings


def check_keywords(name: str, keywords: Iterable[str], known: Sequence[str]) -> None:
    """Raises UnknownArgument (a TypeError and a ValueError) for a keyword that is none of those of the function `name`."""
    for keyword in keywords:
        if keyword not in known:
            hint = did_you_mean(keyword, known) or f", expected {', '.join(known)}"
            raise UnknownArgument(f"{name} has no argument {keyword!r}{hint}")


def check_argument(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError for a `key` that `jax.random` does not take, and where a dataclass is declared (`Model`, `SearchConfig | None`)
    and `value` is something else. Arguments declared as anything else pass."""
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if name == "key" and not (value is None and types.NoneType in kinds):
        check_key(name, value)
    own = next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
    if own is not None and not isinstance(value, kind):
        expected = " or ".join("None" if k is types.NoneType else k.__name__ for k in kinds)
        made_by = _MADE_BY.get(own.__name__, f"{own.__name__}(...)")
        raise ValueError(
            f"{name} must be of type {expected}, got {type(value).__name__}: {made_by} makes one"
        )


def check_key(name: str, key: Any) -> None:
    """Raises ValueError for a `key` that `jax.random` does not take."""
    import jax

    try:
        jax.eval_shape(jax.random.bits, key)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be one key of jax.random, such as jax.random.key(0), got {key!r}"
        ) from None


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number of at least so much."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def is_real(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def as_int32(array: np.ndarray, what: str) -> np.ndarray:
    """Whole numbers as int32, none of them changed.

    Raises:
      ValueError: for a number that int32 does not hold, naming it and where it is.
    """
    limits = np.iinfo(np.int32)
    wrong = np.flatnonzero((array > limits.max) | (array < limits.min))
    if len(wrong):
        raise ValueError(
            f"{what} {array.reshape(-1)[wrong[0]]} at index {wrong[0]} is no number of 32 bits, expected {limits.min} to {limits.max}"
        )
    return array.astype(np.int32)


def without_numpy(settings: Any) -> None:
    """Turns NumPy's numbers among the fields of a frozen dataclass, and in tuples there, into Python's, which print and hash alike."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value.item() if isinstance(value, np.generic) else value

    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is most like it, or nothing."""
    close = difflib.get_close_matches(str(name).lower(), known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""

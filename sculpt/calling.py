"""Calling conventions of modules: training mode, fixed keywords, and a state that keeps its structure."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import did_you_mean

_OFF_IN_TRAINING = ("deterministic", "use_running_average")
"""Keywords of the kind that is True in evaluation."""
_MODES = ("train", "training", "is_training", "is_train", *_OFF_IN_TRAINING)
"""Usual names of the keyword that switches training mode on or off."""


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """A value that compiled programs are told apart by: compared by value if it hashes, else by identity, as a `nn.Sequential` of a list."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        return self.value is other.value or (_hashes(self.value) and bool(self.value == other.value))

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return id(self.value)


def _hashes(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Keywords:
    """The keywords of a module's call."""

    modes: tuple[str, ...]
    """Those that switch training mode."""
    fixed: tuple[tuple[str, Static], ...]
    """Those that are the same in every call, sorted by name."""

    def __call__(self, training: bool) -> dict[str, Any]:
        switches = {name: training != (name in _OFF_IN_TRAINING) for name in self.modes}
        return {**{name: static.value for name, static in self.fixed}, **switches}


def call_keywords(
    name: str,
    call: Any,
    train_argument: str | Sequence[str] | None,
    call_arguments: Mapping[str, Any] | None,
    skip: Iterable[str] = (),
    others: Sequence[str] = (),
) -> Keywords:
    """The keywords that `call` is called with.

    Args:
      name: what messages call it.
      call: the function whose signature says which keywords there are.
      train_argument: names of the keywords that switch training mode; None: the one in the signature with a usual name, if any.
      call_arguments: fixed keywords.
      skip: usual names that are to be left as they are.
      others: keywords that the framework takes beside those of the signature.

    Raises:
      ValueError: for keywords that `call` does not take, and if the keyword of the training mode is not clear.
    """
    parameters = inspect.signature(call).parameters
    names = [n for n in parameters if n != "self"]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    fixed = dict(call_arguments or {})
    for keyword in () if takes_any else fixed:
        if keyword not in parameters and keyword not in others:
            raise ValueError(
                f"{name} takes {names}, not {keyword!r} of call_arguments{did_you_mean(keyword, (*names, *others))}"
            )
    modes = tuple(m for m in _MODES if m in parameters and m not in {*fixed, *skip})
    if train_argument is not None:
        modes = (train_argument,) if isinstance(train_argument, str) else tuple(train_argument)
        if unknown := [m for m in modes if m not in parameters and not takes_any]:
            raise ValueError(
                f"{name} takes {names}, not {unknown[0]!r}: pass train_argument=<the keyword that switches training mode>, or () if "
                "it has no such mode"
            )
    elif len(modes) > 1:
        raise ValueError(
            f"{name} takes {' and '.join(map(repr, modes))}: pass train_argument=<the one that switches training mode, or several>, and "
            "the others as call_arguments={name: value}"
        )
    return Keywords(modes, tuple((key, Static(value)) for key, value in sorted(fixed.items())))


def with_structure_of(old: Any, new: Any) -> Any:
    """`new` in the structure, shapes and dtypes of `old`: arrays of the same path and shape, else those of `old`. What is new, such as
    values sown in training, is left out."""
    arrays = dict(jax.tree_util.tree_leaves_with_path(new))

    def one(path: Any, before: Any) -> Any:
        after = arrays.get(path, before)
        if np.shape(after) != np.shape(before):
            return before
        dtype = jax.dtypes.result_type(before)
        return after if jax.dtypes.result_type(after) == dtype else jnp.asarray(after, dtype)

    return jax.tree_util.tree_map_with_path(one, old)


def other_arrays(old: Any, new: Any) -> str:
    """The paths and shapes that only one of two trees has; empty if both have the same."""
    first, second = (
        {f"{jax.tree_util.keystr(path)} {list(np.shape(leaf))}": None for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (old, new))
    )
    missing, more = [n for n in first if n not in second], [n for n in second if n not in first]
    parts = (("without", missing), ("with", more))
    return ", ".join(f"{word} {', '.join(names[:5])}" for word, names in parts if names)

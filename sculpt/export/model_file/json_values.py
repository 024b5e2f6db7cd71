"""JSON encoding of operation parameters: numbers, shapes, dtypes, and the classes of JAX among them.

A white list: what is not on it is not written, and nothing in a file names anything else. Arrays of JSON are tuples; everything that
JSON has no word for is an object with one key that says what it is.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.extend import random as extended_random

from sculpt.ir.any_batch import BATCH

_ENUMS = {
    kind.__name__: kind
    for kind in (
        lax.AccuracyMode,
        lax.DotAlgorithmPreset,
        lax.FftType,
        lax.GatherScatterMode,
        lax.Precision,
        lax.RandomAlgorithm,
        lax.RoundingMethod,
    )
}
_RECORDS = {
    kind.__name__: kind
    for kind in (
        lax.ConvDimensionNumbers,
        lax.DotAlgorithm,
        lax.GatherDimensionNumbers,
        lax.RaggedDotDimensionNumbers,
        lax.ScatterDimensionNumbers,
    )
}
_GENERATORS = {
    "threefry2x32": extended_random.threefry_prng_impl,
    "rbg": extended_random.rbg_prng_impl,
    "unsafe_rbg": extended_random.unsafe_rbg_prng_impl,
}
_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float0"),
)
_SHAPED = re.compile(r"([a-z0-9<>_]+)\[([^\[\]]*)\]")
_LONGEST_SIZE = 200
"""Characters of the text of a shape that is not all numbers."""
_SIZE = re.compile(r"(?:[\w\s,+*()-]|\^\d(?!\d))*")


def encode_value(value: Any) -> Any:
    """A static parameter as JSON.

    Raises:
      TypeError: if it is of a class that is not on the list.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if export.is_symbolic_dim(value):
        return {"size": str(value)}
    if kind in _ENUMS.values():
        return {"enum": [kind.__name__, value.name]}
    if kind in _RECORDS.values():
        return {"record": [kind.__name__, {n: encode_value(getattr(value, n)) for n in _fields(kind)}]}
    if kind is tuple:
        return [encode_value(part) for part in value]
    if kind is list:
        return {"list": [encode_value(part) for part in value]}
    if isinstance(value, np.dtype) or _is_scalar_class(value):
        return {"dtype": dtype_name(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        return {"array": encode_array(np.asarray(value))}
    for name, generator in _GENERATORS.items():
        if value is generator:
            return {"generator": name}
    raise TypeError(f"a value of type {kind.__module__}.{kind.__qualname__}")


def decode_value(data: Any) -> Any:
    """What `encode_value` was given.

    Raises:
      ValueError: if it gives no such JSON; other exceptions where what is inside is of wrong types.
    """
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return tuple(map(decode_value, data))
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("a value that is not known")
    ((kind, content),) = data.items()
    if kind == "float":
        return _special_float(content)
    if kind == "size":
        (size,) = decode_shape(content)
        return size
    if kind == "enum":
        return _member(_known(_ENUMS, content[0]), content[1])
    if kind == "record":
        record = _known(_RECORDS, content[0])
        if set(content[1]) != set(_fields(record)):
            raise ValueError(f"fields {', '.join(content[1])} of {record.__name__}")
        return record(**{name: decode_value(field) for name, field in content[1].items()})
    if kind == "list":
        return list(map(decode_value, content))
    if kind == "dtype":
        return named_dtype(content)
    if kind == "array":
        # Numbers of NumPy, unlike its arrays without dimensions, can be parameters.
        return decode_array(content)[()]
    if kind == "generator":
        return _known(_GENERATORS, content)
    raise ValueError(f"a value of kind {kind!r}")


def encode_array(array: np.ndarray) -> list[Any]:
    """A small array: shape and dtype, and its numbers in one row.

    Raises:
      TypeError: if it is of other than numbers and booleans.
    """
    if not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"an array of {array.dtype}")
        array_of_doubles = array.astype(np.float64)
        return [shaped(array), [encode_value(float(n)) for n in array_of_doubles.ravel()]]
    return [shaped(array), array.ravel().tolist()]


def decode_array(data: Any) -> np.ndarray:
    """What `encode_array` was given."""
    text, numbers = data
    shape, dtype = decode_shaped(text)
    if len(numbers) != math.prod(shape):
        raise ValueError(f"{len(numbers)} numbers for {text}")
    values = [decode_value(n) for n in numbers]
    if not all(isinstance(v, (bool, int, float)) for v in values):
        raise ValueError(f"other than numbers in {text}")
    return np.asarray(values, np.float64 if jnp.issubdtype(dtype, jnp.floating) else None).astype(dtype).reshape(shape)  # fmt: skip


def shaped(array: Any) -> str:
    """Shape and dtype of an array, or of anything that has both: "float32[batch, 8, 8, 3]"."""
    return f"{dtype_name(array.dtype)}[{', '.join(map(str, array.shape))}]"


def decode_shaped(text: Any) -> tuple[tuple[Any, ...], Any]:
    """Shape and dtype of what `shaped` wrote."""
    match = _SHAPED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} for a shape and a dtype")
    return decode_shape(match[2]), named_dtype(match[1])


@functools.lru_cache(maxsize=4096)
def decode_shape(text: str) -> tuple[Any, ...]:
    """Sizes from text, such as "2*batch, 8"."""
    sizes = [size.strip() for size in text.split(",")] if text else []
    if all(re.fullmatch(r"\d{1,18}", size) for size in sizes):
        return tuple(map(int, sizes))
    names = set(re.findall(r"[a-z_]\w*", text))
    if (
        len(text) > _LONGEST_SIZE
        or not _SIZE.fullmatch(text)
        or not names <= {BATCH, "floordiv", "mod", "max", "min"}
    ):
        raise ValueError(f"{text[:_LONGEST_SIZE]!r} for a shape")
    return tuple(export.symbolic_shape(text, scope=_scope()))


@functools.cache
def _scope() -> export.SymbolicScope:
    """One for all files: sizes of several scopes cannot be compared."""
    return export.SymbolicScope()


def dtype_name(dtype: Any) -> str:
    """The name of a dtype; "key<threefry2x32>" for random keys.

    Raises:
      TypeError: if it is not known.
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        for name in _GENERATORS:
            if dtype == named_dtype(f"key<{name}>"):
                return f"key<{name}>"
        raise TypeError(f"random keys of {dtype}")
    if dtype == jax.dtypes.float0:
        return "float0"
    name = np.dtype(dtype).name
    if name not in _DTYPES:
        raise TypeError(f"the dtype {name}")
    return name


@functools.cache
def named_dtype(name: str) -> Any:
    """The dtype of that name."""
    if name in _DTYPES:
        return jax.dtypes.float0 if name == "float0" else jnp.dtype(name)
    generator = name.removeprefix("key<").removesuffix(">")
    if name == f"key<{generator}>" and generator in _GENERATORS:
        return jax.eval_shape(lambda: jax.random.key(0, impl=generator)).dtype
    raise ValueError(f"the dtype {name!r}")


def generator_of(dtype: Any) -> str:
    """The random generator of a dtype of keys, as `jax.random.key(..., impl=)` takes it."""
    return dtype_name(dtype).removeprefix("key<").removesuffix(">")


def _is_scalar_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, np.generic)


def _fields(record: type) -> tuple[str, ...]:
    named = getattr(record, "_fields", None)
    return tuple(f.name for f in dataclasses.fields(record)) if named is None else named  # type: ignore[arg-type]


def _special_float(text: Any) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} for a number")
    return float(text)


def _known(table: Mapping[str, Any], name: Any) -> Any:
    if name not in table:
        raise ValueError(f"{name!r}, which is none of {', '.join(table)}")
    return table[name]


def _member(kind: type[enum.Enum], name: Any) -> enum.Enum:
    return _known(kind.__members__, name)

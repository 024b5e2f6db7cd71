"""One layer as a network of its own, for measuring it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.inputs import as_text, check_batch_axis
from sculpt.ir.any_batch import example_batch
from sculpt.ir.program import Equation
from sculpt.latency.engines import Call, Engine
from sculpt.model import Model, from_function
from sculpt.pruning.compaction.filter_groups import bind_in_groups
from sculpt.pruning.compaction.rewriting import bind
from sculpt.tracing.tracer import Trace

BIND = bind_in_groups(bind)
"""Computes an operation of a network, its convolutions in groups of filters where they are."""
Layer = tuple[Equation, list[tuple[int, ...]], dict[str, Any]]
"""A contraction, the shapes of its operands, and its static parameters."""


def traced_example(trace: Trace, example_input: Any) -> Any:
    """A batch of what the network was traced with, an array or a pytree of them.

    Raises:
      ValueError: if the input is of another structure, shape or dtype.
    """
    check_batch_axis(trace.batch_axis)
    x = example_batch(example_input)
    expected = jax.tree.map(lambda t: jax.ShapeDtypeStruct(("batch", *t.shape[1:]), t.dtype), trace.inputs)  # type: ignore[arg-type]
    fits = jax.tree.structure(x) == jax.tree.structure(expected) and all(
        a.shape[1:] == t.shape[1:] and a.dtype == t.dtype
        for a, t in zip(jax.tree.leaves(x), jax.tree.leaves(expected))
    )
    if not fits or len({len(a) for a in jax.tree.leaves(x)}) > 1:
        raise ValueError(
            f"expected an example input {as_text(expected)}, as the network was traced with, got {as_text(x)}"
        )
    return x


def name_of(layer: Layer) -> Any:
    """What tells it from layers that take another time."""
    eqn, shapes, params = layer
    return (eqn.name, *shapes, repr(sorted(params.items(), key=lambda item: item[0])))


def prepare_alone(layer: Layer, engine: Engine, threads: int) -> Call:
    """A network of that layer alone, with a bias and a rectifier behind it, in float32, ready to be called in an engine."""
    return engine.prepare(*_alone(*layer, engine.channels_first), threads)


def _alone(
    eqn: Equation, shapes: Sequence[tuple[int, ...]], params: dict[str, Any], channels_first: bool
) -> tuple[Model, np.ndarray]:
    """The network, and what goes into it."""
    first, second = (
        np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)
    )
    out = jax.eval_shape(lambda a, b: BIND(eqn, [a, b], params), first, second)
    bias = np.zeros((1,) * (len(out.shape) - 1) + out.shape[-1:], np.float32)
    into, outof = tuple(range(first.ndim)), tuple(range(len(out.shape)))
    if channels_first and eqn.name == "conv_general_dilated":
        # It takes and gives images of channels first: a network turns them round once, not before and behind every layer.
        numbers = params["dimension_numbers"]
        first = first.transpose(numbers.lhs_spec)
        into, outof = tuple(np.argsort(numbers.lhs_spec).tolist()), tuple(numbers.out_spec)

    def apply(params_: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = BIND(eqn, [x.transpose(into), params_["kernel"]], params) + params_["bias"]
        return jax.nn.relu(y).transpose(outof)

    return from_function(apply, {"kernel": jnp.asarray(second), "bias": jnp.asarray(bias)}), first

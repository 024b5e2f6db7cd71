"""Activation-aware importance (Wanda): weights times the norm of their inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.inputs import number_of, rows
from sculpt.interrupts import check_interrupt
from sculpt.ir.jax_calls import apply, scan_options, scan_parts, scan_results
from sculpt.ir.program import Equation, FlatProgram, Literal
from sculpt.pruning.importance.units import share, sum_by_unit
from sculpt.pruning.importance.weights import unit_l1
from sculpt.tracing.flow import Flow
from sculpt.tracing.layers import Layer
from sculpt.tracing.tracer import Trace

Arrays = dict[int, jax.Array]
"""One array per layer, by `Layer.index`."""


def activation_scores(
    trace: Trace, leaves: Sequence[Any], state: Any, images: Any, images_per_batch: int
) -> list[jax.Array]:
    """Per group float32 `[group size]`: `sum_k S_k[u] / sum_v S_k[v]` with `S_k[u] = sum_{(i, j) in u} |w_k,ij| |X_k,j|_2`.

    Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models (Wanda), arXiv 2306.11695: `|X_k,j|_2` is
    the norm of input channel j of layer k over all images and positions. k runs over the layers that the units are an
    output or an input of, and every layer counts alike; `w_k` is the kernel as the layer uses it. Layers inside `while` and
    `cond` are not observed; a group that no observed layer reads or computes is scored by `unit_l1`.

    Args:
      leaves: the parameter leaves.
      state: the model's state.
      images: `[n, ...]` in the dtype that the model takes, or a pytree of arrays.
      images_per_batch: images that are run at a time; bounds memory, and does not change the result.

    Raises:
      ValueError: for a network with `ragged_dot`, which JAX cannot map over examples.
    """
    if any(layer.equation.name == "ragged_dot_general" for layer in trace.layers):
        raise ValueError(
            "importance 'activation' maps the network over examples, which JAX cannot do with ragged_dot: choose another kind, such as 'taylor'"
        )
    n, (kernels, squares) = number_of(images), ({}, {})
    arrays = [*leaves, *jax.tree.leaves(state)]
    # The program was traced for two images, so it is mapped over pairs; a last odd image is paired with itself.
    pairs = np.arange(n + n % 2, dtype=np.int32).clip(max=n - 1).reshape(-1, 2)
    weights = np.where(pairs[:, 0] == pairs[:, 1], 0.5, 1.0).astype(np.float32)
    size = min(max(images_per_batch // 2, 1), len(pairs))
    for start in range(0, len(pairs), size):
        check_interrupt()
        index = np.arange(start, start + size)
        weight = np.where(index < len(pairs), weights[index % len(pairs)], np.float32(0))
        kernels, found = _observe(trace, arrays, rows(images, pairs[index % len(pairs)]), weight)
        squares = {i: squares[i] + s for i, s in found.items()} if squares else found
    return _unit_scores(trace, list(leaves), kernels, squares)


@functools.partial(jax.jit, static_argnums=0)
def _observe(trace: Trace, arrays: list[Any], pairs: Any, weights: jax.Array) -> tuple[Arrays, Arrays]:
    """The kernel of every observed layer, and the weighted sum of squares of its input (see `_input_squares`)."""
    wanted = _observable(trace)

    def one(pair: Any) -> tuple[Arrays, Arrays]:
        return _run(trace.program, [*arrays, *jax.tree.leaves(pair)], wanted)[1:]

    kernels, squares = jax.vmap(one, out_axes=(None, 0))(pairs)
    return kernels, {i: jnp.tensordot(weights, s, 1) for i, s in squares.items()}


@functools.partial(jax.jit, static_argnums=0)
def _unit_scores(trace: Trace, leaves: list[Any], kernels: Arrays, squares: Arrays) -> list[jax.Array]:
    axes = trace.axes
    flows = dict(_flows(trace.flow))
    scores = [jnp.zeros(group.size, jnp.float32) for group in trace.groups]
    reached = set()
    for layer in (layer for layer in trace.layers if layer.index in kernels):
        entries = jnp.abs(kernels[layer.index].astype(jnp.float32)) * jnp.sqrt(squares[layer.index])
        term = flows[id(layer.equation)].term(layer.equation.inputs[layer.operand])
        # Inside a scan there is a kernel for every step.
        steps = entries.ndim - len(term)
        for axis, atoms in enumerate(map(axes.atoms, term)):
            for group in (group for group in trace.groups if group.atom in atoms):
                labels = axes.labels(term[axis], group.atom)
                part = share(sum_by_unit(entries, steps + axis, labels, group.size))
                scores[group.index] = scores[group.index] + part
                reached.add(group.index)
    return [
        scores[group.index] if group.index in reached else unit_l1(trace, group, leaves)
        for group in trace.groups
    ]


def _observable(trace: Trace) -> dict[int, Layer]:
    """`id(equation)` -> layer, but for convolutions of which the kernel is the image."""
    return {id(la.equation): la for la in trace.layers if la.kind == "dense" or la.operand == 1}


def _flows(flow: Flow) -> Iterator[tuple[int, Flow]]:
    for eqn in flow.program.equations:
        yield id(eqn), flow
        for body in flow.bodies.get(id(eqn), ()):
            yield from _flows(body)


def _run(
    program: FlatProgram, arguments: Sequence[Any], wanted: dict[int, Layer]
) -> tuple[list[Any], Arrays, Arrays]:
    """Runs a program; returns its outputs, and kernel and squared inputs of the wanted layers."""
    values: dict[int, Any] = {**dict(zip(program.inputs, arguments, strict=True)), **program.constants}
    kernels: Arrays = {}
    squares: Arrays = {}

    def read(operand: Any) -> Any:
        return operand.value if isinstance(operand, Literal) else values[operand]

    for eqn in program.equations:
        operands = [read(o) for o in eqn.inputs]
        if eqn.bodies and any(id(inner) in wanted for inner in _inner_equations(eqn)):
            results, inner_kernels, inner_squares = _run_bodies(eqn, operands, wanted)
            kernels.update(inner_kernels)
            squares.update(inner_squares)
        elif eqn.function is not None:
            results = eqn.function(*operands)
        else:
            if id(eqn) in wanted:
                layer = wanted[id(eqn)]
                kernels[layer.index] = jnp.asarray(operands[layer.operand])
                squares[layer.index] = _input_squares(eqn, layer.operand, operands)
            results = apply(eqn.primitive, operands, eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outputs, results, strict=True))
    return [read(o) for o in program.outputs], kernels, squares


def _inner_equations(eqn: Equation) -> Iterator[Equation]:
    for body in eqn.bodies:
        for inner in body.equations:
            yield inner
            yield from _inner_equations(inner)


def _run_bodies(
    eqn: Equation, operands: list[Any], wanted: dict[int, Layer]
) -> tuple[list[Any], Arrays, Arrays]:
    if eqn.name in ("checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"):
        return _run(eqn.bodies[0], operands, wanted)
    if eqn.name != "scan":
        assert eqn.function is not None
        return eqn.function(*operands), {}, {}
    consts, carry, scanned = scan_parts(eqn, operands)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[list[Any], Arrays, Arrays]]:
        results, kernels, squares = _run(eqn.bodies[0], [*consts, *carry, *slices], wanted)
        carry, rows = scan_results(eqn, results)
        return carry, (rows, kernels, squares)

    carry, (stacked, kernels, squares) = jax.lax.scan(step, carry, scanned, **scan_options(eqn))
    return [*carry, *stacked], kernels, squares


def _input_squares(eqn: Equation, operand: int, operands: Sequence[Any]) -> jax.Array:
    """float32, broadcastable to the kernel: for each weight, the sum of squares of the input channel that it reads."""
    square = jnp.square(jnp.asarray(operands[1 - operand]).astype(jnp.float32))
    shape = np.shape(operands[operand])
    if eqn.name == "conv_general_dilated":
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        channel = numbers.lhs_spec[1]
        sums = square.sum(axis=tuple(d for d in range(square.ndim) if d != channel)).reshape(groups, -1)
        # Outputs of the same feature group read the same inputs.
        table = jnp.repeat(sums, shape[numbers.rhs_spec[0]] // groups, axis=0)
        table = table.reshape(*table.shape, *(1,) * (len(shape) - 2))
        return table.transpose([numbers.rhs_spec.index(d) for d in range(len(shape))])
    contracted, batched = eqn.params["dimension_numbers"]
    own = (*contracted[1 - operand], *batched[1 - operand])
    partner = dict(zip((*contracted[operand], *batched[operand]), own))
    sums = square.sum(axis=tuple(d for d in range(square.ndim) if d not in own))
    left = sorted(own)
    sums = sums.transpose([left.index(partner[d]) for d in sorted(partner)])
    return sums.reshape([shape[d] if d in partner else 1 for d in range(len(shape))])

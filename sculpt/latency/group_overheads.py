"""Measures how to split the convolutions of `rect_grouped` into groups of filters in an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from sculpt.arguments import checked, is_whole
from sculpt.environment import check_threads, cores
from sculpt.ir.interpreter import execute
from sculpt.latency.engines import confined, engine_of
from sculpt.latency.layer_alone import BIND, Layer, name_of, prepare_alone, traced_example
from sculpt.latency.measurement import seconds_beside
from sculpt.model import Model
from sculpt.pruning.compaction.compactor import CompactFunction, compact
from sculpt.pruning.compaction.filter_groups import OVERHEAD, convolutions_by
from sculpt.pruning.compaction.plan import grouped_kernels
from sculpt.pruning.space import Space

_TRIED = (OVERHEAD, 0, 8, 32, 64, 128)
"""Overheads of a group, in filters: that of the rule, then from as many groups as there are windows to hardly any. A cut goes by the first
that gives it."""
_WORTH = 0.97
"""Groups have to take this share of the time of one piece, and other groups of that of the rule's: differences below are noise."""


@checked
def measure_group_overheads(
    model: Model,
    space: Space,
    policy: Any,
    example_input: Any,
    *,
    engine: str = "xla",
    threads: int | None = None,
    repeats: int = 7,
    masks: Any = None,
) -> dict[str, int | None]:
    """Measures how the convolutions of a policy are best cut into groups, each by itself at the sizes that compaction leaves.

    Every convolution is tried in one piece and in the groups that overheads of 0 to 128 filters give; groups that are not faster than
    one piece by 3% are not made, nor others than the rule's (see `compact`) that are not faster than those by as much. Layers are measured in float32, and all with channels in the order that the same overhead for all gives.

    Args:
      model: a model that carries the zeros of the policy, dense shapes.
      space: the search space that the policy belongs to.
      policy: integers `[sites]`.
      example_input: `[batch, ...]`: what the network is to be fast on.
      engine: as for `compare_latency`.
      threads: as for `compare_latency`.
      repeats: samples of each.
      masks: as for `compact`.

    Returns:
      For `sculpt.compact(..., overheads=)`: an overhead, or None for one piece, by the path of every kernel that is cut by some of them.

    Raises:
      ValueError: like `compact` and `compare_latency`.
    """
    if not is_whole(repeats, 1):
        raise ValueError(f"repeats must be a whole number of at least 1, got {repeats!r}")
    threads, runner = cores() if threads is None else threads, engine_of(engine)
    check_threads(threads)
    x = traced_example(space.trace, example_input)
    kernels = grouped_kernels(space)
    if not kernels:
        return {}
    cuts: dict[str, dict[Any, tuple[int | None, list[Layer]]]] = {kernel: {} for kernel in kernels}
    for overhead in (None, *_TRIED):
        overheads = dict.fromkeys(kernels, overhead)
        small = compact(model, space, policy, check=False, masks=masks, overheads=overheads)
        for kernel, layers in _convolutions(small, space, kernels, x).items():
            cuts[kernel].setdefault(tuple(map(name_of, layers)), (overhead, layers))
    found: dict[str, int | None] = {}
    with confined(threads):
        for kernel, tried in cuts.items():
            (_, whole), *others = tried.values()
            if not others:
                continue
            pieces = [prepare_alone(layer, runner, threads) for layer in whole]
            shares: dict[int | None, float] = {}
            for overhead, layers in others:
                calls = [prepare_alone(layer, runner, threads) for layer in layers]
                beside = [seconds_beside(call, piece, repeats) for call, piece in zip(calls, pieces)]
                seconds = math.fsum(ratio * usual for ratio, usual in beside)
                shares[overhead] = seconds / math.fsum(usual for _, usual in beside)
            found[kernel] = _best(shares)
    return found


def _best(shares: dict[int | None, float]) -> int | None:
    """The overhead whose groups take the least time, given as shares of that of one piece; None for one piece."""
    worth = {overhead: share for overhead, share in shares.items() if share <= _WORTH}
    best = min(worth, key=worth.__getitem__, default=None)
    return OVERHEAD if OVERHEAD in worth and worth[best] >= _WORTH * worth[OVERHEAD] else best


def _convolutions(small: Model, space: Space, names: Sequence[str], x: Any) -> dict[str, list[Layer]]:
    """The convolutions by every one of these kernels, as a compact model computes them."""
    assert isinstance(small.apply, CompactFunction)
    executable = small.apply.rewritten(x).executable
    paths = {leaf.index: leaf.path for leaf in space.trace.leaves if leaf.path in names}
    kernels = {executable.program.inputs[index]: path for index, path in paths.items()}
    known = {id(eqn): kernels[kernel] for eqn, kernel in convolutions_by(executable.program, kernels)}
    found: dict[str, list[Layer]] = {path: [] for path in paths.values()}

    def noted(eqn: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
        if id(eqn) in known:
            found[known[id(eqn)]].append((eqn, [operand.shape for operand in operands], params))
        return BIND(eqn, list(operands), params)

    arguments = jax.tree.leaves((small.params, small.state, x))
    jax.eval_shape(lambda *leaves: execute(executable, leaves, noted), *arguments)
    return found

"""Compaction: removes masked units and rewrites the program for the smaller shapes.

The compact model is the dense program bound to smaller operands with rewritten static shapes, never the user's class at
a smaller width: divisors, scales and other constants that the dense network wrote down stay what they were. The batch
size is one of those constants, so the program is traced anew for every input shape.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, is_whole
from sculpt.inputs import check_finite
from sculpt.ir.interpreter import Executable, as_written, execute
from sculpt.ir.program import flatten, with_derivatives, with_known_sizes
from sculpt.model import Model, Params, State
from sculpt.pruning.compaction.equal_sums import with_equal_sums
from sculpt.pruning.compaction.filter_groups import bind_in_groups, split_convolutions
from sculpt.pruning.compaction.plan import Plan, grouped_kernels, make_plan
from sculpt.pruning.compaction.random_inputs import telling_inputs
from sculpt.pruning.compaction.rewriting import Sizes, bind, rewrite, take
from sculpt.pruning.masks import check_masks, check_policies, make_masks
from sculpt.pruning.space import Space
from sculpt.tracing.axes import Atom, Term
from sculpt.tracing.flow import Flow
from sculpt.tracing.rules import WINDOW
from sculpt.tracing.tracer import Trace, axis_flow
from sculpt.tracing.zeros import find_unsound
from sculpt.trees import leaf_paths, shapes_of

TOLERANCE = 1e-4
"""Largest difference of masked and compact outputs that `compact` accepts, relative to the largest output."""
_ROUNDINGS = 8
"""The same in machine epsilons of the coarsest dtype in the network, where that is more: in half precision."""
_BIND = bind_in_groups(bind)
_TINY = 1e-30
"""The largest output counts as at least this, so that outputs that are all zero can be compared."""


class _OtherCoupling(ValueError):
    """A program couples the axes of its arrays otherwise than the one that was traced."""

    def __init__(self) -> None:
        super().__init__(
            "the training program, or the program for this input, couples axes otherwise than the evaluation program that was traced"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Rewritten:
    """The rewritten program for one shape of inputs."""

    executable: Executable
    out_tree: Any
    sizes: Sizes


@dataclasses.dataclass(frozen=True, eq=False)
class CompactFunction:
    """The rewritten program of one function of a dense model. Called with the small arrays."""

    function: Callable[..., Any]
    """The dense model's `apply` or `apply_train`."""
    plan: Plan
    training: bool
    """Whether it is `apply_train`, which returns a new state too."""
    _programs: dict[Any, _Rewritten] = dataclasses.field(default_factory=dict, repr=False)

    def __call__(self, params: Params, state: State, x: jax.Array, *key: jax.Array) -> Any:
        rewritten = self.rewritten(x, *key)
        arguments = jax.tree.leaves((params, state, x, key))
        return jax.tree.unflatten(rewritten.out_tree, execute(rewritten.executable, arguments, _BIND))

    def __reduce__(self) -> tuple[Any, ...]:
        # Programs, which cannot be pickled, are rewritten again.
        return CompactFunction, (self.function, self.plan, self.training)

    def rewritten(self, x: jax.Array, *key: jax.Array) -> _Rewritten:
        """The program for inputs of these shapes."""
        rest = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jax.dtypes.result_type(a)), (x, *key)
        )
        arrays, structure = jax.tree.flatten(rest)
        signature = (structure, *((a.shape, a.dtype) for a in arrays))
        if signature not in self._programs:
            self._programs[signature] = _rewritten(self.function, self.plan, self.training, rest)
        return self._programs[signature]

    def describe(self) -> tuple[str, ...]:
        """One line per layer: the kernel's path, its dense and its compact shape, and which axes could not shrink and why."""
        return self.plan.rows


@checked
def compact(
    model: Model,
    space: Space,
    policy: Any,
    check: bool = True,
    *,
    masks: Any = None,
    overheads: Mapping[str, int | None] | None = None,
) -> Model:
    """Takes the zeros of a policy out of a masked model: channels go, windows become smaller kernels.

    Where filters keep windows of their own (`rect_grouped`), those that share one become a smaller convolution, if there are enough
    of them; the kernel stays one array. All other zeros stay in place.

    Args:
      model: a model that carries the zeros of the policy (`apply_masks`, `finetune`), dense shapes.
      space: the search space that the policy belongs to.
      policy: integers `[sites]`.
      check: compare masked and compact outputs on random images.
      masks: what `make_masks` gave before fine-tuning. None: worked out again, which gives the same units unless training
        brought all weights of another unit to zero or importance moved.
      overheads: by the path of a kernel of `rect_grouped`, what a group of its filters costs beside them, in filters; None where it is
        to stay in one piece. `sculpt.measure_group_overheads` measures it; kernels without cost 16.

    Returns:
      A `Model` of smaller arrays under the same tree paths; jit-, grad- and vmap-able, trainable, and traceable again.

    Raises:
      ValueError: if the model does not carry the policy's zeros or has arrays that are not finite, `overheads` names other than kernels of `rect_grouped` or has other than
        whole numbers and None, or (a fault of this library) the outputs differ.
    """
    overheads = dict(overheads or {})
    kernels = grouped_kernels(space)
    if unknown := sorted(overheads.keys() - set(kernels)):
        raise ValueError(
            f"overheads expected kernels of rect_grouped ({', '.join(kernels) or 'this space has none'}), got {', '.join(unknown)}"
        )
    for path, overhead in overheads.items():
        if overhead is not None and not is_whole(overhead, 0):
            raise ValueError(f"overheads are whole numbers of 0 or more, or None; {path} has {overhead!r}")
    check_finite(model)
    if masks is None:
        masks = make_masks(space, model.params, policy)
    masks = jax.device_get(check_masks(model, masks))
    paths = leaf_paths(model.params)
    for path, weight, mask in zip(paths, jax.tree.leaves(model.params), jax.tree.leaves(masks)):
        wrong = np.count_nonzero(np.asarray(weight)[~mask])
        if wrong:
            raise ValueError(
                f"compact expected a model with the policy's zeros in place, but {path} has {wrong} non-zero weights where "
                "the policy removes them; apply sculpt.apply_masks(model, masks) or fine-tune with those masks first"
            )
    policy = np.asarray(check_policies(space, policy))
    small = _planned(model, make_plan(model, space, policy, masks, overheads))
    if not _trains_alike(small, space.trace):
        small = _planned(model, make_plan(model, space, policy, masks, overheads, reorder=False))
    if check:
        _check(model, small, space.trace)
    return small


def _planned(model: Model, plan: Plan) -> Model:
    params, state = plan.slice((model.params, model.state))
    apply = CompactFunction(model.apply, plan, False)
    return Model(apply, CompactFunction(model.apply_train, plan, True), params, state, model.task)


def _trains_alike(small: Model, traced: Trace) -> bool:
    """Whether training takes the channels in their new order, if there is one, too."""
    assert isinstance(small.apply, CompactFunction)
    if all((np.diff(units) > 0).all() for leaf in small.apply.plan.places for units in leaf):
        return True
    try:
        key = jax.eval_shape(lambda: jax.random.key(0))
        jax.eval_shape(small.apply_train, *shapes_of((small.params, small.state)), traced.inputs, key)
    except _OtherCoupling:
        return False
    except Exception:  # some models cannot be trained at all, and each framework has its own errors
        pass
    return True


def max_difference(model: Model, other: Model, x: jax.Array) -> float:
    """Largest difference of two models' outputs on `x`, relative to the largest finite output of `model`."""
    outputs = (jax.tree.leaves(jax.jit(m.apply)(m.params, m.state, x)) for m in (model, other))
    return max(_difference(a, b) for a, b in zip(*outputs, strict=True))


def _difference(a: jax.Array, b: jax.Array) -> float:
    """Largest difference relative to the largest finite value of `a`; equal infinities and NaN count as equal."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
    return float(gap.max(initial=0.0) / max(np.abs(x[np.isfinite(x)]).max(initial=0.0), _TINY))


def _check(model: Model, small: Model, traced: Trace) -> None:
    floating = [v.dtype for v in traced.program.avals if jnp.issubdtype(v.dtype, jnp.floating)]
    tolerance = max(TOLERANCE, *(_ROUNDINGS * float(jnp.finfo(dtype).eps) for dtype in floating))
    run = jax.jit(model.apply)
    # Accelerators multiply in fewer digits unless they are told otherwise.
    with jax.default_matmul_precision("highest"):
        x, fault = telling_inputs(lambda x: run(model.params, model.state, x), traced.inputs)
        difference = max_difference(model, small, x)
        if not difference <= tolerance:
            raise ValueError(
                f"compacted and masked outputs differ by {difference:.2e} of the largest output (at most {tolerance:.0e} "
                f"expected), first {_first_difference(model, small, traced, x, tolerance)}; please report this network"
            )
    if fault:
        warnings.warn(
            f"compact compared the compact and the masked network on random inputs where an output is {fault}, which says little: "
            "compare them on inputs of your own",
            stacklevel=4,
        )


def _first_difference(model: Model, small: Model, traced: Trace, x: jax.Array, tolerance: float) -> str:
    """Runs both networks operation by operation and names the first that differs at units that stay."""
    function = small.apply
    assert isinstance(function, CompactFunction)
    rewritten = function.rewritten(x)
    dense: list[Any] = []
    compacted: list[Any] = []
    execute(
        as_written(rewritten.executable.program),
        jax.tree.leaves((model.params, model.state, x)),
        bind,
        lambda _, results: dense.append(results),
    )
    execute(
        rewritten.executable,
        jax.tree.leaves((small.params, small.state, x)),
        _BIND,
        lambda _, results: compacted.append(results),
    )
    names = {id(layer.equation): layer.name for layer in traced.layers}
    last = "before the first layer"
    for eqn, known, big, cut in zip(
        rewritten.executable.program.equations, traced.program.equations, dense, compacted
    ):
        last = f"at or after layer {names[id(known)]}" if id(known) in names else last
        if rewritten.executable.program.is_table(eqn):
            continue
        for output, a, b in zip(eqn.outputs, big, cut):
            kept = take(a, rewritten.sizes, rewritten.sizes.flow.terms[output])
            if jnp.issubdtype(kept.dtype, jnp.number) and not _difference(kept, b) <= tolerance:
                return f"{last}, in {eqn.name} at {eqn.source}"
    return f"{last}, at the output"


def _rewritten(function: Callable[..., Any], plan: Plan, training: bool, rest: tuple[Any, ...]) -> _Rewritten:
    """Traces `function` at full width for these input shapes and rewrites its static shapes."""
    out_tree = jax.tree.structure(jax.eval_shape(function, plan.params, plan.state, *rest))
    program = flatten(function, plan.params, plan.state, *rest)
    known = program
    if any(not isinstance(n, int) for x in jax.tree.leaves(rest) for n in x.shape):
        program = with_derivatives(program)
        known = with_known_sizes(program, 2)
    flow = axis_flow(known)
    inputs = [flow.terms[v] for v in known.inputs[: len(plan.places)]]
    # New statistics are of the same units as the old ones, whatever the program does with them.
    old_state = inputs[len(jax.tree.leaves(plan.params)) :]
    if training:
        new_state = known.outputs[len(known.outputs) - len(old_state) :]
        for output, term in zip(new_state, old_state, strict=True):
            flow.unify(flow.term(output), term, "new state and old state differ in structure")
    kept, orders = _units_by_atom(flow, inputs, plan)
    reasons = [flow.axes.frozen(atom) for atom in kept]
    lost = [atom for atom, units in kept.items() if not units.all()]
    flow.axes.freeze_all_but(lost, "nothing of it is pruned")
    findings = find_unsound(flow, known.inputs[: len(jax.tree.leaves(plan.params))])
    reasons += [findings.unsound.get(atom) for atom in lost]
    for reason in reasons:
        if reason is not None and not reason.startswith(WINDOW):
            where = "in training mode" if training else "for inputs of this shape"
            raise ValueError(f"an axis that lost units cannot do so {where}: {reason}")
    # The zero pass may have taken atoms apart.
    kept, orders = _units_by_atom(flow, inputs, plan)
    sizes = Sizes(flow, program, kept, orders)
    for term, places in zip(inputs, plan.places):
        for axis, units in zip(term, places):
            if not np.array_equal(sizes.places(axis), units):
                raise _OtherCoupling
    groups = {program.inputs[leaf]: found for leaf, found in plan.groups.items()}
    executable = with_equal_sums(rewrite(flow, program, kept, orders), flow, kept, orders, findings.sums)
    return _Rewritten(split_convolutions(executable, groups), out_tree, sizes)


def _units_by_atom(
    flow: Flow, inputs: Sequence[Term], plan: Plan
) -> tuple[dict[Atom, np.ndarray], dict[Atom, np.ndarray]]:
    """What a plan keeps of each atom of the arrays' axes, and the units that stay of those whose units change places."""
    kept: dict[Atom, np.ndarray] = {}
    orders: dict[Atom, np.ndarray] = {}
    for term, places, emptied in zip(inputs, plan.places, plan.emptied):
        for axis, units, numbers in zip(term, places, emptied):
            for atom in (atom for number, atom in enumerate(flow.axes.atoms(axis)) if number in numbers):
                kept[atom] = np.zeros(flow.axes.atom_size(atom), bool)
            stays = np.zeros(flow.axes.size(axis), bool)
            stays[units] = True
            flow.axes.infer(axis, stays, kept)
            if (np.diff(units) < 0).any():
                atom = flow.axes.atoms(axis)[0]
                if flow.axes.resolve(axis) != ((atom,),):
                    raise _OtherCoupling
                orders[atom] = units
    return kept, orders

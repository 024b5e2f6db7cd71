"""The `Model` type: two pure functions and two pytrees; adapters from Linen, NNX and plain functions.

Adapters turn a Flax Linen module, a Flax NNX module or any JAX function into a `Model`. The callables they build are
frozen dataclasses that compare by value, so that adapting the same module twice hits the same compiled programs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sculpt.arguments import checked
from sculpt.calling import Keywords, Static, call_keywords, other_arrays, with_structure_of
from sculpt.task import CLASSIFICATION, Task

Params = Any
"""A pytree of floating-point arrays, the leaves that training changes and masks cover."""
State = Any
"""A pytree of everything else a network carries: BatchNorm statistics, counters, keys of random streams."""
ApplyFn = Callable[[Params, State, jax.Array], jax.Array]
TrainFn = Callable[[Params, State, jax.Array, jax.Array], tuple[jax.Array, State]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network: `apply` to evaluate it, `apply_train` to train it, and the arrays that both take.

    A pytree whose leaves are `params` and `state`; the rest is static: two functions, which should be hashable, and the task.
    """

    apply: ApplyFn = dataclasses.field(metadata={"static": True})
    """`(params, state, x) -> outputs`: evaluation mode; x is `[batch, ...]`, outputs are logits `[batch, classes]` or what `task` takes."""
    apply_train: TrainFn = dataclasses.field(metadata={"static": True})
    """`(params, state, x, key) -> (outputs, new_state)`: training mode (batch statistics, dropout drawn from `key`)."""
    params: Params
    """Pytree of floating-point arrays."""
    state: State
    """Pytree of the remaining arrays; `{}` where there are none."""
    task: Task = dataclasses.field(default=CLASSIFICATION, metadata={"static": True})
    """What its outputs are good for: what training lowers and searches raise."""

    def __repr__(self) -> str:
        def size(tree: Any) -> str:
            # JAX puts objects of its own in the place of arrays now and then.
            shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(tree)]
            return f"{sum(map(math.prod, shapes)):,} numbers in {len(shapes)} {'array' if len(shapes) == 1 else 'arrays'}"

        return f"Model(params: {size(self.params)}, state: {size(self.state)})"

    def replace(self, **changes: Any) -> Model:
        """Returns a copy with the named fields changed."""
        return dataclasses.replace(self, **changes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Evaluation-mode outputs of `x`, such as logits `[batch, classes]`, with this model's own arrays."""
        return self.apply(self.params, self.state, x)

    def describe(self) -> tuple[str, ...]:
        """What compaction did, one line per layer (see `sculpt.compact`); nothing for a network that is not compacted."""
        describe = getattr(self.apply, "describe", None)
        return () if describe is None else describe()


jax.tree_util.register_dataclass(
    Model, data_fields=["params", "state"], meta_fields=["apply", "apply_train", "task"]
)


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    module: Static
    keywords: Keywords

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        options = self.keywords(training=False)
        outputs = self.module.value.apply({"params": params, **state}, x, **options)
        return outputs if options.get("mutable", False) is False else outputs[0]


@dataclasses.dataclass(frozen=True)
class _LinenTrain:
    module: Static
    keywords: Keywords
    rngs: tuple[str, ...]

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        from flax.core.scope import union_filters

        keys = {name: jax.random.fold_in(key, i) if i else key for i, name in enumerate(self.rngs)}
        options = self.keywords(training=True)
        options["mutable"] = union_filters(options.get("mutable", False), list(state))
        options["rngs"] = {**options.get("rngs", {}), **keys}
        logits, updated = self.module.value.apply({"params": params, **state}, x, **options)
        return logits, with_structure_of(state, updated)


@checked
def from_linen(
    module: Any,
    variables: Mapping[str, Any] | None = None,
    train_argument: str | Sequence[str] | None = None,
    rngs: Sequence[str] = ("dropout",),
    task: Task = CLASSIFICATION,
    call_arguments: Mapping[str, Any] | None = None,
) -> Model:
    """Adapts a Flax Linen module.

    Args:
      module: a `flax.linen.Module` whose `__call__(x, train=False)` returns logits.
      variables: what `module.init` returned: a mapping with "params" and, perhaps, further collections, of which "intermediates" is dropped.
      train_argument: name (or names) of the boolean keyword that switches training mode. None: the one with a usual name (train, training,
        is_training, deterministic, use_running_average), if the module takes one. `()`: the module has no such mode.
      rngs: names of the random streams that the module draws from in training.
      task: what the outputs are good for, where they are no logits.
      call_arguments: further keywords of every call, such as a mask; also `method`, `mutable` and `rngs` of `module.apply`.
        New values of mutable collections are dropped in evaluation.

    Raises:
      ValueError: if `variables` has no "params" collection, the module does not take these keywords, or several (or no) keywords may be
        that of the training mode.
    """
    if _is_nnx(module) or not callable(getattr(module, "apply", None)):
        raise ValueError(
            f"from_linen expected a flax.linen.Module, got {type(module).__name__}: NNX modules go to from_nnx, functions to "
            "from_function"
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"from_linen expected variables with a 'params' collection (what module.init returns), got {got}"
        )
    state = {name: value for name, value in variables.items() if name not in ("params", "intermediates")}
    keywords = _linen_keywords(module, train_argument, call_arguments, "batch_stats" in state)
    return Model(
        apply=_LinenApply(Static(module), keywords),
        apply_train=_LinenTrain(Static(module), keywords, tuple(rngs)),
        params=variables["params"],
        state=state,
        task=task,
    )


def _is_nnx(module: Any) -> bool:
    from flax import nnx

    return isinstance(module, getattr(nnx, "Pytree", nnx.Module))


def _linen_keywords(
    module: Any,
    train_argument: str | Sequence[str] | None,
    call_arguments: Mapping[str, Any] | None,
    must_switch: bool,
) -> Keywords:
    from flax.linen import Sequential

    method = (call_arguments or {}).get("method")
    called = module
    while method is None and isinstance(called, Sequential) and called.layers:
        called = called.layers[0]  # to which it hands its keywords
    if method is not None:
        call = getattr(type(called), method) if isinstance(method, str) else method
        name = f"{type(called).__name__}.{getattr(call, '__name__', method)}"
    else:
        call = called if inspect.isroutine(called) else type(called).__call__
        name = f"{type(called).__name__}.__call__"
    # A mode that is a field of the module is not given again.
    parameters = inspect.signature(call).parameters
    fields = [n for n, p in parameters.items() if p.default is None and getattr(called, n, None) is not None]
    others = ("method", "mutable", "rngs")
    keywords = call_keywords(name, call, train_argument, call_arguments, fields, others)
    any_keyword = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if train_argument is None and not keywords.modes and not fields and (any_keyword or must_switch):
        raise ValueError(
            f"{name} takes {[p for p in parameters if p != 'self']}, none of which is known to switch training mode: pass "
            "train_argument=<the keyword that does>, or () if there is none"
        )
    return keywords


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    graphdef: Static
    keywords: Keywords

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        from flax import nnx

        module = nnx.merge(self.graphdef.value, params, state["rest"], copy=True)
        return module(x, **self.keywords(training=False))


@dataclasses.dataclass(frozen=True)
class _NnxTrain:
    graphdef: Static
    keywords: Keywords

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        from flax import nnx

        module = nnx.merge(self.graphdef.value, params, state["rest"], copy=True)
        default, dropout = jax.random.split(key)
        nnx.reseed(module, default=default, dropout=dropout)
        logits = module(x, **self.keywords(training=True))
        return logits, with_structure_of(state, {"rest": nnx.state(module, nnx.Not(nnx.Param))})


@checked
def from_nnx(
    module: Any,
    train_argument: str | Sequence[str] | None = None,
    task: Task = CLASSIFICATION,
    call_arguments: Mapping[str, Any] | None = None,
) -> Model:
    """Adapts a Flax NNX module whose `__call__(x)` returns logits.

    Its `nnx.Param` leaves become `params`; every other variable becomes `state`, except `nnx.Intermediate`, which is dropped. The module
    itself is not changed.

    Args:
      module: a `flax.nnx.Module`.
      train_argument: name (or names) of the boolean keyword of `__call__` that switches training mode. None: the one with a usual name, as
        for `from_linen`, if the module takes one. The mode of layers is switched as well, as `module.train()` and `module.eval()` do.
      task: what the outputs are good for, where they are no logits.
      call_arguments: further keywords of every call, such as a mask.

    Raises:
      ValueError: if the module holds no `nnx.Param`, does not take these keywords, or several keywords may be that of the training mode.
    """
    from flax import nnx

    if not _is_nnx(module):
        linen = hasattr(module, "init") and hasattr(module, "apply")
        other = (
            "Linen modules go to from_linen(module, variables)" if linen else "functions go to from_function"
        )
        raise ValueError(f"from_nnx expected a flax.nnx.Module, got {type(module).__name__}: {other}")
    call = type(module).__call__
    # None as its default leaves the mode to the layer.
    layers = [n for n, p in inspect.signature(call).parameters.items() if p.default is None]
    name = f"{type(module).__name__}.__call__"
    keywords = call_keywords(name, call, train_argument, call_arguments, layers)
    evaluation = nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)
    training = nnx.view(module, deterministic=False, use_running_average=False, raise_if_not_found=False)
    graphs = []
    for view in (training, evaluation):
        nnx.pop(view, nnx.Intermediate)
        graphdef, params, rest = nnx.split(view, nnx.Param, ...)
        graphs.append(Static(graphdef))
    if not jax.tree.leaves(params):
        raise ValueError(f"from_nnx found no nnx.Param in {type(module).__name__}: nothing there to prune")
    apply, apply_train = _NnxApply(graphs[1], keywords), _NnxTrain(graphs[0], keywords)
    return Model(apply, apply_train, params, {"rest": rest}, task)


@dataclasses.dataclass(frozen=True)
class _FunctionApply:
    function: Static
    stateful: bool

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        apply = self.function.value
        return apply(params, state, x) if self.stateful else apply(params, x)


@dataclasses.dataclass(frozen=True)
class _FunctionTrain:
    apply: _FunctionApply
    train: Static

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        train = self.train.value
        if train is None:
            return self.apply(params, state, x), state
        if not self.apply.stateful:
            return train(params, x, key), state
        outputs, after = train(params, state, x, key)
        if difference := other_arrays(state, after):
            raise ValueError(f"apply_train must return a state of the arrays that it was given: {difference}")
        return outputs, with_structure_of(state, after)


@checked
def from_function(
    apply: Callable[..., Any],
    params: Params,
    state: State | None = None,
    apply_train: Callable[..., Any] | None = None,
    task: Task = CLASSIFICATION,
) -> Model:
    """Adapts a plain JAX function.

    Args:
      apply: `apply(params, x) -> logits`, or `apply(params, state, x) -> logits` where `state` is given.
      params: pytree of floating-point arrays that `apply` reads; arrays it closes over cannot be pruned.
      state: pytree of non-trained arrays, if any.
      apply_train: training mode; `(params, x, key) -> logits`, or with a state `(params, state, x, key) ->
        (logits, new_state)`. Without it training runs `apply`.
      task: what the outputs are good for, where they are no logits.

    Raises:
      ValueError: if `params` holds no array.
    """
    if not jax.tree.leaves(params):
        raise ValueError(
            "from_function expected params with at least one array, got an empty pytree; "
            "pass the arrays as an argument instead of closing over them"
        )
    if not callable(apply):
        raise ValueError(
            f"from_function expected a function `apply(params, x)` first, got {type(apply).__name__}"
        )
    evaluate = _FunctionApply(Static(apply), state is not None)
    train = _FunctionTrain(evaluate, Static(apply_train))
    return Model(evaluate, train, params, {} if state is None else state, task)

"""A network as Sculpt sees it: two pure functions and two pytrees.

Adapters turn a Flax Linen module, a Flax NNX module or any JAX function into a `Model`. The callables they build are
frozen dataclasses that compare by value, so that adapting the same module twice hits the same compiled programs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sculpt.arguments import checked
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
    module: Any
    train_argument: str | None

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        return self.module.apply({"params": params, **state}, x, **_mode(self.train_argument, False))


@dataclasses.dataclass(frozen=True)
class _LinenTrain:
    module: Any
    train_argument: str | None
    mutable: tuple[str, ...]
    rngs: tuple[str, ...]

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        keys = {name: jax.random.fold_in(key, i) if i else key for i, name in enumerate(self.rngs)}
        options = _mode(self.train_argument, True)
        logits, updated = self.module.apply(
            {"params": params, **state}, x, mutable=list(self.mutable), rngs=keys, **options
        )
        return logits, {**state, **updated}


@dataclasses.dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A module that does not hash, such as an `nn.Sequential` of a list: equal to itself alone."""

    module: Any

    def apply(self, *arguments: Any, **options: Any) -> Any:
        return self.module.apply(*arguments, **options)


def _hashable(module: Any) -> Any:
    try:
        hash(module)
    except TypeError:
        return _ByIdentity(module)
    return module


_OFF_IN_TRAINING = ("deterministic", "use_running_average")
"""Keywords of the kind that is True in evaluation."""
_MODES = ("train", "training", "is_training", "is_train", *_OFF_IN_TRAINING)
"""Keywords that switch training mode on or off, as they are usually called."""


def _mode(argument: str | None, training: bool) -> dict[str, bool]:
    """The keyword that switches training mode on or off."""
    return {} if argument is None else {argument: training != (argument in _OFF_IN_TRAINING)}


@checked
def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    train_argument: str | None = "train",
    rngs: Sequence[str] = ("dropout",),
    task: Task = CLASSIFICATION,
) -> Model:
    """Adapts a Flax Linen module.

    Args:
      module: a `flax.linen.Module` whose `__call__(x, train=False)` returns logits.
      variables: what `module.init` returned: a mapping with "params" and, perhaps, further collections.
      train_argument: name of the boolean keyword that switches training mode on; None if the module has none.
        "deterministic" and "use_running_average" are known to mean the opposite.
      rngs: names of the random streams that the module draws from in training.
      task: what the outputs are good for, where they are no logits.

    Raises:
      ValueError: if `variables` has no "params" collection, or the module does not take `train_argument`.
    """
    if not callable(getattr(module, "apply", None)):
        raise ValueError(
            f"from_linen expected a flax.linen.Module, got {type(module).__name__}: NNX modules go to from_nnx, functions to "
            "from_function"
        )
    if "params" not in variables:
        raise ValueError(
            f"from_linen expected variables with a 'params' collection (what module.init returns), got {sorted(variables)}"
        )
    train_argument = _accepted_argument(module, train_argument, "batch_stats" in variables)
    state = {name: value for name, value in variables.items() if name != "params"}
    module = _hashable(module)
    return Model(
        apply=_LinenApply(module, train_argument),
        apply_train=_LinenTrain(module, train_argument, tuple(state), tuple(rngs)),
        params=variables["params"],
        state=state,
        task=task,
    )


def _accepted_argument(module: Any, name: str | None, must_switch: bool) -> str | None:
    import inspect

    from flax.linen import Sequential

    while isinstance(module, Sequential) and module.layers:
        module = module.layers[0]  # to which it hands its keywords
    call = module if inspect.isroutine(module) else type(module).__call__
    parameters = inspect.signature(call).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if name is None or name in parameters or takes_any:
        return name
    if name == "train" and not must_switch and not set(_MODES) & set(parameters):
        return None
    raise ValueError(
        f"{type(module).__name__}.__call__ takes {[p for p in parameters if p != 'self']}, not {name!r}: "
        "pass train_argument=<the keyword that switches training mode on>, or None if it has no such mode"
    )


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    graphdef: Any
    train_argument: str | None

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        from flax import nnx

        module = nnx.merge(self.graphdef, params, state["rest"], copy=True)
        return module(x, **_mode(self.train_argument, False))


@dataclasses.dataclass(frozen=True)
class _NnxTrain:
    graphdef: Any
    train_argument: str | None

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        from flax import nnx

        module = nnx.merge(self.graphdef, params, state["rest"], copy=True)
        default, dropout = jax.random.split(key)
        nnx.reseed(module, default=default, dropout=dropout)
        logits = module(x, **_mode(self.train_argument, True))
        return logits, {"rest": nnx.state(module, nnx.Not(nnx.Param))}


@checked
def from_nnx(module: Any, train_argument: str | None = None, task: Task = CLASSIFICATION) -> Model:
    """Adapts a Flax NNX module whose `__call__(x)` returns logits.

    Its `nnx.Param` leaves become `params`; every other variable becomes `state`. The module itself is not changed.

    Args:
      module: a `flax.nnx.Module`.
      train_argument: name of a boolean keyword of `__call__` that switches training mode on, as for `from_linen`; None: the mode is that
        of the layers themselves, as `module.train()` and `module.eval()` set it.
      task: what the outputs are good for, where they are no logits.

    Raises:
      ValueError: if the module holds no `nnx.Param`, does not take `train_argument`, or takes such a keyword that was not named.
    """
    from flax import nnx

    _check_keyword(module, train_argument)
    evaluation = nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)
    training = nnx.view(module, deterministic=False, use_running_average=False, raise_if_not_found=False)
    graphdef, params, rest = nnx.split(evaluation, nnx.Param, ...)
    train_graphdef, _, _ = nnx.split(training, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"from_nnx found no nnx.Param in {type(module).__name__}: nothing there to prune")
    apply, apply_train = _NnxApply(graphdef, train_argument), _NnxTrain(train_graphdef, train_argument)
    return Model(apply, apply_train, params, {"rest": rest}, task)


def _check_keyword(module: Any, train_argument: str | None) -> None:
    """Raises ValueError unless `train_argument` is the keyword of an NNX module that switches training mode on, or there is none."""
    import inspect

    parameters = inspect.signature(type(module).__call__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    # None as its default leaves the mode to the layer.
    modes = [name for name in _MODES if name in parameters and parameters[name].default is not None]
    if train_argument is None and modes:
        raise ValueError(
            f"{type(module).__name__}.__call__ takes {modes[0]!r}, which would stay as it is in training: pass "
            f"train_argument={modes[0]!r}"
        )
    if train_argument is not None and train_argument not in parameters and not takes_any:
        raise ValueError(
            f"{type(module).__name__}.__call__ takes {[p for p in parameters if p != 'self']}, not {train_argument!r}: pass "
            "train_argument=<the keyword that switches training mode on>, or leave it out"
        )


@dataclasses.dataclass(frozen=True)
class _FunctionApply:
    function: Callable[..., jax.Array]
    stateful: bool

    def __call__(self, params: Params, state: State, x: jax.Array) -> jax.Array:
        return self.function(params, state, x) if self.stateful else self.function(params, x)


@dataclasses.dataclass(frozen=True)
class _FunctionTrain:
    apply: _FunctionApply
    train: Callable[..., Any] | None

    def __call__(self, params: Params, state: State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        if self.train is None:
            return self.apply(params, state, x), state
        if self.apply.stateful:
            return self.train(params, state, x, key)
        return self.train(params, x, key), state


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
    evaluate = _FunctionApply(apply, state is not None)
    return Model(
        evaluate, _FunctionTrain(evaluate, apply_train), params, {} if state is None else state, task
    )

"""What callers give: every public function refuses what is no model, space, settings or key, and names it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest

import sculpt
from sculpt.arguments import check_argument, did_you_mean
from tests.conftest import untrained_digits


def typed_parameters() -> list[tuple[str, str]]:
    """(function, parameter) of all that a public function declares as one of our dataclasses, and of all keys."""
    found = []
    for name in sculpt.__all__:
        function = getattr(sculpt, name)
        if inspect.isfunction(function):
            for parameter, kind in get_type_hints(function).items():
                kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
                ours = any(isinstance(k, type) and dataclasses.is_dataclass(k) for k in kinds)
                if parameter != "return" and (ours or parameter == "key"):
                    found.append((name, parameter))
    return found


@pytest.mark.parametrize(("function", "parameter"), typed_parameters())
def test_foreign_arguments_are_refused_by_name(function: str, parameter: str) -> None:
    message = f"^{parameter} must be (of type .*, got dict: .* makes one|one key of jax.random)"
    with pytest.raises(ValueError, match=message):
        getattr(sculpt, function)(**{parameter: {}})


def test_there_are_such_parameters() -> None:
    assert {
        ("search", "config"),
        ("finetune", "teacher"),
        ("trace", "model"),
        ("random_policies", "key"),
    } <= {*typed_parameters()}


@pytest.mark.parametrize("key", [0, "a", None, jnp.zeros(3), jax.random.split(jax.random.key(0), 2)])
def test_what_is_no_key(key: Any) -> None:
    with pytest.raises(
        ValueError, match=r"key must be one key of jax.random, such as jax.random.key\(0\), got "
    ):
        check_argument("key", key, jax.Array)


def test_keys_of_either_kind_and_optional_arguments_pass() -> None:
    check_argument("key", jax.random.key(0), jax.Array)
    check_argument("key", jax.random.PRNGKey(0), jax.Array)
    jax.jit(lambda key: check_argument("key", key, jax.Array))(jax.random.key(0))
    check_argument("key", None, jax.Array | None)
    check_argument("teacher", None, sculpt.Model | None)


def test_a_module_is_no_model() -> None:
    module = sculpt.nets.create("resnet8", 10)
    message = r"must be of type Model or None, got CifarResNet: sculpt.from_linen, .* makes one"
    with pytest.raises(ValueError, match=f"teacher {message}"):
        check_argument("teacher", module, sculpt.Model | None)
    models: Any = {"dense": untrained_digits(), "small": module}
    with pytest.raises(ValueError, match="small must be of type Model, got CifarResNet"):
        sculpt.compare_latency(models, jnp.zeros((1, 8, 8, 1)))


def test_suggestions() -> None:
    assert did_you_mean("CIFAR_10", ["cifar10", "digits"]) == "; did you mean 'cifar10'?"
    assert did_you_mean("nothing", ["cifar10", "digits"]) == ""


LIBRARY: Any = sculpt
"""Without types: they would refuse what is tested."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LIBRARY.SearchConfig(bugdet=0.5), "SearchConfig has no argument 'bugdet'; did you mean 'budget'?"),
        (lambda: LIBRARY.FinetuneConfig(epoch=1), "'epoch'; did you mean 'epochs'?"),
        (lambda: dataclasses.replace(sculpt.EvaluationPlan(), precison="float32"), "did you mean 'precision'?"),
        (lambda: LIBRARY.evaluate(None, None, None, normalize=abs), "evaluate has no argument 'normalize'; did you mean 'normalise'?"),
        (lambda: LIBRARY.RewardConfig(xyz=1), "'xyz', expected kind, weight, rate"),
    ],
)  # fmt: skip
def test_misspelt_keywords_get_suggestions(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        call()
    assert isinstance(told.value, TypeError)


def test_modules_of_the_other_flax_are_pointed_to_their_adapter() -> None:
    from flax import linen, nnx

    with pytest.raises(ValueError, match=r"got Dense: Linen modules go to from_linen\(module, variables\)"):
        sculpt.from_nnx(linen.Dense(2))
    with pytest.raises(ValueError, match="got function: functions go to from_function"):
        sculpt.from_nnx(lambda x: x)
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    for variables in ({}, {"params": {}}, None):
        with pytest.raises(ValueError, match="got Linear: NNX modules go to from_nnx"):
            sculpt.from_linen(module, variables)
    with pytest.raises(ValueError, match=r"'params' collection .* got NoneType"):
        sculpt.from_linen(linen.Dense(2))

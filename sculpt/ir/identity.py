"""Identity of networks: the program as text (`outline`), and digests of a model (`add_model`)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sculpt.digest import add_arrays
from sculpt.ir.program import FlatProgram, Literal, Operand, flatten
from sculpt.model import Model
from sculpt.task import CLASSIFICATION


def add_model(digest: Any, model: Model, images: Any) -> None:
    """Adds a network to a digest of `hashlib`: its arrays, and what it computes of `images` in evaluation and in training."""
    add_arrays(digest, (model.params, model.state))
    arguments = model.params, model.state, images
    for program in (
        flatten(model.apply, *arguments),
        flatten(model.apply_train, *arguments, jax.random.key(0)),
    ):
        digest.update(outline(program).encode())
        add_arrays(digest, program.constants)


def add_task(digest: Any, model: Model, images: Any, labels: jax.ShapeDtypeStruct) -> None:
    """Adds to a digest what the task of a network computes of its outputs for images and labels; nothing for classifiers."""
    if model.task != CLASSIFICATION:
        outputs = jax.eval_shape(model.apply, model.params, model.state, images)
        program = flatten(model.task.measure, outputs, labels)
        digest.update(outline(program).encode())
        add_arrays(digest, program.constants)


def outline(program: FlatProgram) -> str:
    """What a program does, as text that is the same in every process; without the arrays that it closes over."""
    lines = []
    for eqn in program.equations:
        params = {name: value for name, value in sorted(eqn.params.items()) if _is_plain(value)}
        inputs = [_operand(operand) for operand in eqn.inputs]
        shapes = [program.shape(value) for value in eqn.outputs]
        lines.append(f"{eqn.outputs} {shapes} = {eqn.name} {inputs} {params}")
        lines += map(outline, eqn.bodies)
    lines.append(f"{program.inputs} -> {[_operand(operand) for operand in program.outputs]}")
    return "\n".join(lines)


def _operand(operand: Operand) -> str:
    if not isinstance(operand, Literal):
        return str(operand)
    value = np.asarray(operand.value)
    return f"{value.dtype}{value.tolist()}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.dtype)

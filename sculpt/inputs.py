"""Whether images, labels and network fit together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sculpt.model import Model
from sculpt.task import CLASSIFICATION


def check_images(model: Model, images: Any, traced: jax.ShapeDtypeStruct | None = None) -> jax.Array:
    """Images `[n, ...]` as the network takes them: float32, or whole numbers (such as tokens) as they are.

    Args:
      model: the network.
      images: what was given.
      traced: what the network was traced with, `[batch, ...]`; None: not known. Whole numbers are then for networks that take nothing else.

    Raises:
      ValueError: for another shape, whole numbers instead of floating-point ones or the other way round, or no image at all.
    """
    shape, dtype = np.shape(images), jax.dtypes.result_type(images)
    wanted = shape[1:] if traced is None else tuple(traced.shape[1:])
    if len(shape) < 1 or shape[1:] != wanted or shape[0] < 1:
        raise ValueError(f"expected images [{', '.join(['n', *map(str, wanted)])}], got {list(shape)}")
    floating = jnp.issubdtype(dtype, jnp.floating)
    if traced is None:
        takes_floats = floating or _takes_floats(model, shape)
    else:
        takes_floats = jnp.issubdtype(traced.dtype, jnp.floating)
    if takes_floats and not floating:
        raise ValueError(
            f"expected normalised floating-point images, got {dtype}{list(shape)}: normalise them first (splits.normalise, "
            "sculpt.nets.preprocess)"
        )
    if floating and not takes_floats:
        raise ValueError(f"expected inputs of whole numbers, as the network was traced with, got {dtype}")
    return jnp.asarray(images, jnp.float32) if floating else jnp.asarray(images)


def _takes_floats(model: Model, shape: tuple[int, ...]) -> bool:
    try:
        jax.eval_shape(model.apply, model.params, model.state, jax.ShapeDtypeStruct(shape, jnp.float32))
    except Exception:  # each framework has its own
        return False
    return True


def check_labels(model: Model, images: Any, labels: Any) -> jax.Array:
    """Labels `[n, ...]`, those of a classifier as int32; `images` is an array or its shape, `[n, ...]`.

    Raises:
      ValueError: unless the model takes the images, and its task takes what it gives and these labels: of a classifier logits
        `[n, ..., classes]`, and for each of them a class, or -1 for none where an example has several.
    """
    try:
        outputs = jax.eval_shape(model.apply, model.params, model.state, images)
    except Exception as error:  # each framework has its own
        raise ValueError(f"the model does not take images {list(images.shape)}: {error}") from error
    if model.task == CLASSIFICATION:
        return _check_classes(outputs, labels, images.shape[0])
    number, shape = images.shape[0], np.shape(labels)
    if shape[:1] != (number,):
        raise ValueError(f"expected labels [{number}, ...], one for each image, got {list(shape)}")
    labels = jnp.asarray(labels)
    shapes = ", ".join(str(list(output.shape)) for output in jax.tree.leaves(outputs))
    given = f"outputs {shapes} and labels {labels.dtype}{list(shape)}"
    try:
        measured = jax.eval_shape(model.task.measure, outputs, labels)
    except Exception as error:  # it is the user's function
        raise ValueError(f"the model's task does not take {given}: {error}") from error
    for name, value in zip(("score", "loss"), measured):
        if value.shape != (number,):
            raise ValueError(
                f"the {name} of the model's task must be one number for each example, [{number}], got {list(value.shape)} for {given}"
            )
    return labels


def _check_classes(outputs: Any, labels: Any, number: int) -> jax.Array:
    leaves, shape = jax.tree.leaves(outputs), np.shape(labels)
    if len(leaves) != 1 or len(leaves[0].shape) < 2:
        shapes = ", ".join(str(list(output.shape)) for output in leaves)
        raise ValueError(
            f"scoring needs a model with one output, logits [{number}, classes], or a task of its own (sculpt.Task); this one "
            f"gives {shapes}"
        )
    (*wanted, classes), dtype = leaves[0].shape, jax.dtypes.result_type(labels)
    if list(shape) != wanted or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"expected integer labels {wanted} for logits {list(leaves[0].shape)}, got {dtype}{list(shape)}"
        )
    if isinstance(labels, Tracer):
        return jnp.asarray(labels, jnp.int32)
    low, high = int(np.min(labels)), int(np.max(labels))
    if high >= classes or (low < 0 and len(wanted) == 1):
        none = ", or -1 where there is none" if len(wanted) > 1 else ""
        raise ValueError(
            f"expected labels from 0 to {classes - 1} for a model of {classes} classes{none}, got {low} to {high}"
        )
    if not (np.asarray(labels).reshape(len(labels), -1) >= 0).any(axis=1).all():
        raise ValueError("expected at least one label of 0 or more in every example, some have none")
    return jnp.asarray(labels, jnp.int32)

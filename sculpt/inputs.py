"""Checks that images, labels and network fit together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sculpt.model import Model
from sculpt.task import CLASSIFICATION


def number_of(images: Any) -> int:
    """How many examples there are in inputs of a network: an array `[n, ...]` or a pytree of them.

    Raises:
      ValueError: if arrays are of different n, or there is a scalar or no array at all.
    """
    shapes = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(images)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"expected inputs [n, ...], every array with the same n, got {as_text(images)}")
    return sizes.pop()  # type: ignore[return-value]


def rows(images: Any, index: Any) -> Any:
    """The examples of inputs at an index or slice."""
    return jax.tree.map(lambda array: array[index], images)


def as_text(images: Any) -> str:
    """Dtypes and shapes of inputs, by path where there are several."""
    parts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(images):
        shape = ", ".join(map(str, np.shape(leaf)))
        dtype = jax.dtypes.result_type(leaf)
        parts.append(f"{jax.tree_util.keystr(path)} {dtype}[{shape}]".removeprefix(" "))
    return ", ".join(parts) or "nothing"


def check_batch_axis(batch_axis: int | None) -> None:
    """Raises ValueError unless examples of a traced network are along axis 0 of its inputs."""
    if batch_axis != 0:
        raise ValueError(
            f"expected a network of examples along axis 0 of its inputs, this one was traced with batch_axis={batch_axis}: score one that "
            "takes them so, such as jax.vmap of it"
        )


def arrays_of(images: Any) -> Any:
    """Inputs as they are, or as one array where they are sequences of numbers."""
    return images if all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(images)) else np.asarray(images)


def check_images(model: Model, images: Any, traced: Any = None) -> Any:
    """Inputs as the network takes them: an array `[n, ...]` or a pytree of them. Floating-point numbers come in the dtype that it was traced
    with, else in float32 if it takes that; whole numbers, such as tokens, as they are.

    Args:
      model: the network.
      images: what was given.
      traced: what the network was traced with, `[batch, ...]` each; None: not known. Whole numbers are then for networks that take nothing else.

    Raises:
      ValueError: for another structure or shape, whole numbers instead of floating-point ones or the other way round, or no example at all.
    """
    images = arrays_of(images)
    if traced is not None:
        expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(("n", *x.shape[1:]), x.dtype), traced)  # type: ignore[arg-type]
        fits = jax.tree.structure(images) == jax.tree.structure(traced) and all(
            np.shape(x)[1:] == tuple(t.shape[1:]) and np.ndim(x) == len(t.shape)
            for x, t in zip(jax.tree.leaves(images), jax.tree.leaves(traced))
        )
        if not fits:
            raise ValueError(f"expected images {as_text(expected)}, got {as_text(images)}")
    if number_of(images) < 1:
        raise ValueError(f"expected images of one example or more, got {as_text(images)}")
    single = jax.tree_util.all_leaves([images])
    kinds = [None] * len(jax.tree.leaves(images)) if traced is None else jax.tree.leaves(traced)
    checked = []
    for x, kind in zip(jax.tree.leaves(images), kinds, strict=True):
        dtype = jax.dtypes.result_type(x)
        floating = jnp.issubdtype(dtype, jnp.floating)
        if kind is not None:
            takes_floats = jnp.issubdtype(kind.dtype, jnp.floating)
        else:
            takes_floats = floating or (single and _takes_floats(model, np.shape(x)))
        if takes_floats and not floating:
            raise ValueError(
                f"expected normalised floating-point images, got {as_text(images)}: normalise them first (splits.normalise, "
                "sculpt.nets.preprocess)"
            )
        if floating and not takes_floats:
            raise ValueError(
                f"expected inputs of whole numbers, as the network was traced with, got {as_text(images)}"
            )
        if not floating:
            checked.append(jnp.asarray(x))
        elif kind is not None:
            checked.append(jnp.asarray(x, kind.dtype))
        else:
            narrow = single and dtype != jnp.float32 and not _takes_floats(model, np.shape(x))
            checked.append(jnp.asarray(x) if narrow else jnp.asarray(x, jnp.float32))
    return jax.tree.unflatten(jax.tree.structure(images), checked)


def check_finite(model: Model) -> None:
    """Raises ValueError where a parameter is NaN or infinite, or a number of the state is NaN.

    Outputs need not show it: XLA on CPUs makes zeros of NaN at a rectifier. Traced and abstract arrays pass.
    """
    for part, tree, unsound in (
        ("parameter", model.params, lambda library, x: ~library.isfinite(x)),
        ("array of the state", model.state, lambda library, x: library.isnan(x)),
    ):
        for path, array in jax.tree.leaves_with_path(tree):
            if isinstance(array, (Tracer, jax.ShapeDtypeStruct)):
                continue
            if not jnp.issubdtype(jax.dtypes.result_type(array), jnp.inexact):
                continue
            # What lies on a CPU is looked at in place, without a program for every shape.
            in_place = jax.default_backend() == "cpu" and getattr(array, "is_fully_addressable", True)
            with jax.ensure_compile_time_eval():  # arrays that a traced function closes over are known
                bad = np.asarray(unsound(np if in_place else jnp, array))
            if bad.any():
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"the {part} {name!r} has {int(bad.sum()):,} of {bad.size:,} numbers that are not finite: load or train the "
                    "network again (a constant with infinite numbers, such as an attention mask, can be in the state)"
                )


def check_finite_images(images: Any) -> None:
    """Raises ValueError where inputs, arrays `[n, ...]`, have numbers that are NaN or infinite. Traced ones pass."""
    for array in jax.tree.leaves(images):
        if isinstance(array, Tracer) or not jnp.issubdtype(jax.dtypes.result_type(array), jnp.inexact):
            continue
        if not (finite := np.isfinite(array)).all():
            bad = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))
            raise ValueError(
                f"{len(bad)} of {len(finite)} images have numbers that are NaN or infinite, the first is number {bad[0]}: leave them out"
            )


def _takes_floats(model: Model, shape: tuple[int, ...]) -> bool:
    try:
        jax.eval_shape(model.apply, model.params, model.state, jax.ShapeDtypeStruct(shape, jnp.float32))
    except Exception:  # each framework has its own
        return False
    return True


def check_labels(model: Model, images: Any, labels: Any) -> jax.Array:
    """Labels `[n, ...]`, those of a classifier as int32; `images` are arrays or their shapes, `[n, ...]`.

    Raises:
      ValueError: unless the model takes the images, and its task takes what it gives and these labels: of a classifier logits
        `[n, ..., classes]`, and for each of them a class, or -1 for none where an example has several.
    """
    try:
        outputs = jax.eval_shape(model.apply, model.params, model.state, images)
    except Exception as error:  # each framework has its own
        raise ValueError(f"the model does not take images {as_text(images)}: {error}") from error
    number, shape = number_of(images), np.shape(labels)
    if model.task == CLASSIFICATION:
        return _check_classes(outputs, labels, number)
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
    labels = np.asarray(labels)
    low, high = int(labels.min()), int(labels.max())
    if high >= classes or (low < 0 and len(wanted) == 1):
        none = ", or -1 where there is none" if len(wanted) > 1 else ""
        raise ValueError(
            f"expected labels from 0 to {classes - 1} for a model of {classes} classes{none}, got {low} to {high}"
        )
    if not (labels.reshape(len(labels), -1) >= 0).any(axis=1).all():
        raise ValueError("expected at least one label of 0 or more in every example, some have none")
    return jnp.asarray(labels, jnp.int32)

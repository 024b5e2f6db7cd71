"""`importance`: scores every unit of every coupled group by one of several measures."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, did_you_mean
from sculpt.inputs import arrays_of, as_text, check_batch_axis, check_finite, check_labels, number_of
from sculpt.model import Model
from sculpt.pruning.importance.activation import activation_scores
from sculpt.pruning.importance.taylor import taylor_scores
from sculpt.pruning.importance.units import fitting_leaves
from sculpt.pruning.importance.weights import WEIGHT_SCORES
from sculpt.tracing.tracer import Trace

_NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(WEIGHT_SCORES, ()),
    "taylor": ("images", "labels"),
    "activation": ("images",),
    "random": ("key",),
}
KINDS = tuple(_NEEDS)
"""The measures that `importance` knows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """A score for every unit of every coupled group; higher is kept longer. Compares and hashes by identity.

    Own scores can be put in as well; what is below zero is ranked, and counts as zero where shares are asked for.

    Raises:
      ValueError: if a score is not a finite number, or names and scores differ in length.
    """

    kind: str
    """One of `KINDS`, or a name of your own."""
    groups: tuple[str, ...]
    """Names of the groups, those of `Trace.groups`."""
    scores: tuple[np.ndarray, ...]
    """float32 `[group size]` for each group; read-only."""

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.scores):
            raise ValueError(
                f"expected one array of scores for each of the {len(self.groups)} groups, got {len(self.scores)}"
            )
        scores = tuple(np.array(s, np.float32) for s in self.scores)
        for name, score in zip(self.groups, scores):
            if score.ndim != 1 or not np.isfinite(score).all():
                raise ValueError(
                    f"importance {self.kind!r} of group {name!r} is expected to be finite numbers [group size], got "
                    f"{list(score.shape)} with {np.count_nonzero(~np.isfinite(score))} that are not finite; look for "
                    "infinite or undefined numbers in the parameters and the images"
                )
            score.setflags(write=False)
        object.__setattr__(self, "scores", scores)


@checked
def importance(
    model: Model,
    trace: Trace,
    kind: str = "energy",
    *,
    images: Any = None,
    labels: Any = None,
    key: jax.Array | None = None,
    images_per_batch: int = 64,
) -> Importance:
    """Scores every unit (channel, neuron) of every coupled group, over all arrays that the group touches.

    | kind | score of unit u | needs |
    | --- | --- | --- |
    | `energy` | sum_k of `w_k[u]`'s share of the squared weights of kernel k | |
    | `l1` | sum_k of its share of the absolute weights (arXiv 1608.08710) | |
    | `l2` | sum_k of its share of the unit norms (arXiv 1808.06866) | |
    | `batch_norm` | sum_k of its share of the normalisation scales (arXiv 1708.06519); without any, `energy` | |
    | `geometric_median` | sum_v of the distance of `w[u]` to `w[v]` (FPGM, arXiv 1811.00250) | |
    | `taylor` | mean over micro-batches of sum_s of `abs(w_s dL/dw_s)` (arXiv 1906.10771) | images, labels |
    | `activation` | sum_k of its share of `abs(w_k,ij) norm(X_k,j)` (Wanda, arXiv 2306.11695) | images |
    | `random` | uniform in [0, 1) | key |

    Every kernel k of a group counts alike (shares sum to one per kernel), save in `taylor`, whose terms are changes of one
    loss and are added as they are. The exact equations stand with `unit_energy`, `unit_l1`, `unit_l2`, `unit_scale`,
    `unit_distance`, `taylor_scores` and `activation_scores`. The network is run in evaluation mode.

    Args:
      model: the dense model.
      trace: what `sculpt.trace` found in it.
      kind: one of the above.
      images: `[n, ...]`, normalised as the model expects, or a pytree of arrays as in the trace; a few hundred of the training split do.
      labels: integers `[n]`, or what the model's task takes.
      key: a key such as `jax.random.key(0)`.
      images_per_batch: images that are run at a time. It bounds memory; `taylor` is a mean over such batches.

    Returns:
      `Importance`, whose scores are float32 `[group size]`, non-negative: host arrays, so this is not for use inside jit.

    Raises:
      ValueError: for an unknown kind, a missing or unfit argument, a model that is not the traced one, or scores that are
        not finite.
    """
    if kind not in _NEEDS:
        hint = did_you_mean(kind, KINDS)
        raise ValueError(f"unknown kind of importance {kind!r}, expected one of {sorted(KINDS)}{hint}")
    given = {"images": images, "labels": labels, "key": key}
    missing = [name for name in _NEEDS[kind] if given[name] is None]
    if missing:
        needed = " and ".join(_NEEDS[kind])
        raise ValueError(
            f"importance {kind!r} needs {needed}, got no {' and no '.join(missing)}: pass {missing[0]}="
        )
    if images_per_batch < 1:
        raise ValueError(f"images_per_batch must be at least 1, got {images_per_batch}")
    check_finite(model)
    leaves = fitting_leaves(trace, model.params)
    if kind == "random":
        assert key is not None
        keys = [jax.random.fold_in(key, group.index) for group in trace.groups]
        scores = [jax.random.uniform(k, (g.size,), jnp.float32) for k, g in zip(keys, trace.groups)]
    elif kind == "taylor":
        images = _fitting_images(trace, images)
        labels = check_labels(model, images, labels)
        scores = taylor_scores(model, trace, images, labels, images_per_batch)
    elif kind == "activation":
        images = _fitting_images(trace, images)
        scores = activation_scores(trace, leaves, model.state, images, images_per_batch)
    else:
        scores = _weight_scores(trace, kind, leaves)
    names = tuple(group.name for group in trace.groups)
    return Importance(kind, names, tuple(np.asarray(s) for s in scores))


def check_importance(trace: Trace, importance: Importance) -> None:
    """Raises ValueError unless the scores belong to the groups of `trace`."""
    expected = [(group.name, int(group.size)) for group in trace.groups]
    found = [(name, len(score)) for name, score in zip(importance.groups, importance.scores)]
    if expected != found:
        wrong = [f"{e} expected, got {f}" for e, f in zip(expected, found) if e != f][:3]
        raise ValueError(
            f"importance {importance.kind!r} belongs to another trace: {len(expected)} groups expected, got {len(found)} "
            f"{wrong}; compute it with sculpt.importance(model, trace) on the trace that make_space is given"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weight_scores(trace: Trace, kind: str, leaves: list[Any]) -> list[jax.Array]:
    return [WEIGHT_SCORES[kind](trace, group, leaves) for group in trace.groups]


def _fitting_images(trace: Trace, images: Any) -> Any:
    """Images in the dtypes that the network was traced with."""
    check_batch_axis(trace.batch_axis)
    images = arrays_of(images)
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(("n", *x.shape[1:]), x.dtype), trace.inputs)
    pairs = list(zip(jax.tree.leaves(images), jax.tree.leaves(expected)))
    fits = jax.tree.structure(images) == jax.tree.structure(expected) and all(
        np.ndim(x) == len(wanted.shape) and np.shape(x)[1:] == wanted.shape[1:] for x, wanted in pairs
    )
    if not fits or number_of(images) < 1:
        raise ValueError(
            f"importance expected images {as_text(expected)}, as in the trace, got {as_text(images)}; "
            "reshape them or trace the model with images like these"
        )
    for x, wanted in pairs:
        dtype = jax.dtypes.result_type(x)
        if jnp.issubdtype(dtype, jnp.floating) != jnp.issubdtype(wanted.dtype, jnp.floating):
            raise ValueError(
                f"importance expected images like the {wanted.dtype} ones of the trace, got {dtype}: "
                "normalise them first (splits.normalise, sculpt.nets.preprocess)"
            )
    return jax.tree.map(lambda x, wanted: jnp.asarray(x, wanted.dtype), images, expected)

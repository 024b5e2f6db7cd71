"""CMA-ES (covariance matrix adaptation) over the logits of a policy, by evosax.

Separable CMA-ES (Ros and Hansen 2008, A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity): one variance for
each logit of an option that a site has. An individual is a table of logits; the projection makes it a policy, without noise.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.pruning.budget import INVALID

SPREAD = 1.0
"""Standard deviation of the first population, in logits."""


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """evosax leaves promotions to JAX."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def _load(population: int, size: int) -> tuple[Any, Any]:
    """The strategy and its parameters.

    Raises:
      ValueError: where evosax is not installed.
    """
    algorithms = load_evosax()
    # Kept for other programs too: no values of the one being traced.
    with _lenient(), jax.ensure_compile_time_eval():
        strategy = algorithms.Sep_CMA_ES(population_size=population, solution=jnp.zeros(size))
        return strategy, strategy.default_params.replace(std_init=SPREAD)


def load_evosax() -> types.ModuleType:
    """Imports evosax's strategies.

    Raises:
      ValueError: where it is not installed.
    """
    try:
        import evosax.algorithms
    except ImportError as error:
        raise ValueError(
            "method 'cma_es' needs the extra: pip install 'autosculpt[controls]', or choose another method"
        ) from error
    return evosax.algorithms


def start(population: int, prior: jax.Array, valid: np.ndarray, key: jax.Array) -> Any:
    """The state before the first population, around a prior float32 `[sites, options]`; only `valid` options take part."""
    strategy, params = _load(population, int(valid.sum()))
    with _lenient():
        return strategy.init(key, prior[valid], params)


def ask(population: int, valid: np.ndarray, state: Any, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """A population float32 `[population, valid options]`, its logits `[population, sites, options]`, and the state behind it."""
    strategy, params = _load(population, int(valid.sum()))
    with _lenient():
        drawn, state = strategy.ask(key, state, params)
    logits = jnp.full((population, *valid.shape), INVALID).at[:, valid].set(drawn)
    return drawn, logits, state


def tell(drawn: jax.Array, worth: jax.Array, state: Any, key: jax.Array) -> Any:
    """The state after the worth float32 `[population]`, higher is better, of that population is known."""
    strategy, params = _load(*drawn.shape)
    with _lenient():
        after, _ = strategy.tell(key, drawn, -worth, state, params)
    return after

"""Problems whose answer is known: a table of values instead of a network's accuracy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.actor_critic import SiteInputs, site_inputs
from sculpt.agents.config import AgentConfig
from sculpt.agents.observation import to_graph
from sculpt.data.splits import Split, Splits
from sculpt.model import Model, from_function
from sculpt.pruning.space import Space, make_space
from sculpt.scoring.evaluation import Scores
from sculpt.scoring.problem import Problem
from sculpt.tracing.tracer import trace

SMALL = AgentConfig(hidden=16, layers=1, heads=2)
_SHAPES = {
    "stem": (3, 3, 1, 8),
    "inner": (3, 3, 8, 6),
    "outer": (3, 3, 6, 8),
    "last": (3, 3, 8, 10),
    "head": (10, 5),
}


def _residual_network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = jax.nn.relu(conv(x, params["stem"]))
    x = x + conv(jax.nn.relu(conv(x, params["inner"])), params["outer"])
    x = jax.nn.relu(conv(x, params["last"])).mean((1, 2))
    return x @ params["head"]


@functools.cache
def toy_model() -> Model:
    """A small residual network for images `[n, 8, 8, 1]` and five classes, untrained."""
    rng = np.random.default_rng(5)
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in _SHAPES.items()}
    return from_function(_residual_network, params)


@functools.cache
def toy_space() -> Space:
    """Its seven sites: three groups of channels, four kernels."""
    return make_space(trace(toy_model(), jnp.zeros((1, 8, 8, 1))))


@dataclasses.dataclass(frozen=True)
class TableScorer:
    """Scores a policy by a table: the mean over sites of what each chosen option is worth. No network is run."""

    seed: int = 0
    """Draws the table."""
    diverge_at: int = -1
    """Policies with this option at site 0 score NaN."""

    def table(self) -> np.ndarray:
        """float32 `[sites, options]`."""
        shape = (toy_space().num_sites, toy_space().max_options)
        return np.random.default_rng(self.seed).normal(size=shape).astype(np.float32)

    def __call__(self, problem: Problem, policies: jax.Array, count: jax.Array) -> Scores:
        """Scores `[n]` of policies int32 `[n, sites]`; loss is minus the accuracy, plus a constant."""
        worth = jnp.take_along_axis(jnp.asarray(self.table())[None], policies[:, :, None], axis=2)
        accuracy = jnp.where(policies[:, 0] == self.diverge_at, jnp.nan, jnp.mean(worth[:, :, 0], axis=1))
        return Scores(accuracy, 10.0 - accuracy)


def toy_splits(train: int = 600, validation: int = 40) -> Splits:
    """Random images with random labels."""
    rng = np.random.default_rng(3)

    def split(number: int) -> Split:
        images = rng.integers(0, 256, (number, 8, 8, 1), dtype=np.uint8)
        return Split(images, rng.integers(0, 5, number, dtype=np.int32))

    return Splits("noise", split(train), split(validation), split(10), 5, (0.5,), (0.5,))


@functools.cache
def toy_state(seed: int = 0, config: AgentConfig = SMALL) -> tuple:
    """(agent, its parameters, graph of the dense network, `SiteInputs`), the agent not near zero but away from it."""
    from sculpt.agents.actor_critic import ActorCritic

    space, model = toy_space(), toy_model()
    graph = jax.jit(lambda params: to_graph(space, params, None, 0.5))(model.params)
    sites = site_inputs(space, model.params)
    agent = ActorCritic(config)
    params = jax.jit(agent.init)(jax.random.key(seed), graph, sites)["params"]
    return agent, jax.tree.map(lambda leaf: leaf + 0.05, params), graph, sites


def batched(graph, number: int):
    """A batch of `number` times the same state, with the axes that `sculpt.agents.actor_critic.forward` takes."""
    return graph._replace(
        nodes=jnp.tile(graph.nodes[None], (number, 1, 1)),
        globals=jnp.tile(graph.globals[None], (number, 1, 1)),
    )


def free_sites(sites: SiteInputs) -> np.ndarray:
    """Indices of the sites with a choice."""
    return np.flatnonzero(np.asarray(sites.valid).sum(axis=1) > 1)

"""Carries the parameters of an agent from one network to another.

Everything but the sites' own logits is of the same size for every network: `portable` is what can be kept, `transplant`
what puts it into the agent of another network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import AgentConfig, SearchConfig
from sculpt.model import Params
from sculpt.trees import leaf_paths

_OF_ONE_NETWORK = "own"


def _by_path(params: Params) -> dict[str, jax.Array]:
    return dict(zip(leaf_paths(params), jax.tree.leaves(params), strict=True))


def portable(agent: Params) -> Params:
    """The agent's parameters without the sites' own logits, which belong to one network."""
    return {name: part for name, part in agent.items() if name != _OF_ONE_NETWORK}


def transplant(learnt: Params, agent: Params) -> Params:
    """`agent` with the parts that were `learnt` elsewhere."""
    return {**agent, **jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), portable(learnt))}


def size_of(agent: Params) -> AgentConfig:
    """The size of an agent, from its parameters, whether or not its sites had logits of their own.

    Raises:
      ValueError: if they are not those of an agent.
    """
    try:
        encoder = agent["encoder"]
        heads, width = encoder["layer0"]["attention"].shape
        layers = sum(name.startswith("layer") for name in encoder)
        _ = agent["actor"]["family_heads"], agent["critic"]["output"]
    except (KeyError, TypeError, AttributeError, ValueError):
        found = ", ".join(sorted(map(str, agent))) if isinstance(agent, Mapping) else type(agent).__name__
        raise ValueError(
            f"these are not the parameters of an agent, which has encoder, actor and critic; got {found or 'nothing'}: give what "
            "a search with method='agent' left"
        ) from None
    return AgentConfig(hidden=heads * width, layers=layers, heads=heads)


def check_agent(config: SearchConfig, agent: Params) -> None:
    """Raises ValueError unless a search by `config` can begin with what `agent` learned."""
    if config.method != "agent":
        raise ValueError(f"a trained agent is for method='agent', got method={config.method!r}")
    size = dataclasses.replace(size_of(agent), own_logits=config.agent.own_logits)
    if size != config.agent:
        raise ValueError(
            f"the trained agent is of size {size}, the search asks for {config.agent}: set agent={size} in SearchConfig"
        )


def check_fits(learnt: Params, agent: Params) -> None:
    """Raises ValueError unless what was `learnt` has the shapes that it needs in `agent`, and finite values."""
    wanted, got = (_by_path(portable(params)) for params in (agent, learnt))
    for name in sorted(wanted.keys() | got.keys()):
        needed, found = (np.shape(arrays[name]) if name in arrays else None for arrays in (wanted, got))
        if needed != found:
            raise ValueError(
                f"the trained agent does not fit this search: {name} should have shape {needed}, got {found}; it was trained by "
                "another version, or for a network with more options at a site"
            )
        if not np.isfinite(np.asarray(got[name], np.float32)).all():
            raise ValueError(
                f"the trained agent has values in {name} that are no finite numbers: its training diverged"
            )

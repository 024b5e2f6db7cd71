"""What an agent learned, carried from one network to another.

Everything but the sites' own logits is of the same size for every network: `portable` is what can be kept, `transplant`
what puts it into the agent of another network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import AgentConfig, SearchConfig
from sculpt.model import Params

_OF_ONE_NETWORK = "own"


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
    wanted, got = (_shapes(portable(params)) for params in (agent, learnt))
    wrong = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"the trained agent does not fit this search: {name} should have shape {wanted.get(name)}, got {got.get(name)}; it was "
            "trained by another version, or for a network with more options at a site"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(portable(learnt)):
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"the trained agent has values in {name} that are no finite numbers: its training diverged"
            )


def _shapes(params: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}

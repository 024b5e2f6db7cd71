"""The actor-critic network: maps the network graph to one categorical distribution per site and a value.

Logits of a site = a scorer shared by all options of all sites, that reads the site's node embedding and what is known of
the option (energy retained, cost, fraction kept), + a head per family of patterns, + logits of the site's own, + a prior: what
single sites did to the loss (`sensitivity`), or 3 log(retained energy). All but the last begin at zero or near it: an untrained
agent already prefers what does little harm, or what magnitude pruning would. What the first two learn holds for every graph; a
site's own logits learn what this network's features do not tell, and stay with it.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sculpt.agents.config import AgentConfig
from sculpt.agents.distributions import mask_invalid
from sculpt.agents.environment import state_axes
from sculpt.agents.gatv2 import Graph, GraphEncoder, take_rows
from sculpt.agents.observation import OPTIONS, site_features
from sculpt.model import Params
from sculpt.pruning.budget import energy_logits
from sculpt.pruning.families.patterns import FAMILIES
from sculpt.pruning.space import Space

PolicyNetwork = nn.Module
"""Something that takes a graph and `SiteInputs` and gives logits and a value, as `ActorCritic` does."""
_NEAR_ZERO = nn.initializers.normal(0.01)
OWN_STEP = 16.0
"""Logits of a site's own per unit of their parameters: Adam moves each of these by about its learning rate, whatever the gradient."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SiteInputs:
    """What the agent knows of the sites beside the graph."""

    nodes: jax.Array
    """int32 `[sites]`: the graph node of every site."""
    family: jax.Array
    """float32 `[sites, families]`, one-hot over all of `FAMILIES`: the family of patterns of every site."""
    retained: jax.Array
    """float32 `[sites, options]`: share of the weights' energy that an option keeps."""
    cost: jax.Array
    """float32 `[sites, options]`: MACs ratio to dense where only this site takes that option."""
    kept: jax.Array
    """float32 `[sites, options]`: fraction of the site that an option keeps."""
    prior: jax.Array
    """float32 `[sites, options]`: the logits that are added to what an agent learns."""
    valid: jax.Array
    """bool `[sites, options]`: False beyond a site's last option."""


def site_inputs(space: Space, params: Params) -> SiteInputs:
    """The `SiteInputs` of `space` for a network with these `params`."""
    features = site_features(space, params)
    families = list(FAMILIES)
    family = np.eye(len(families), dtype=np.float32)[[families.index(site.family) for site in space.sites]]
    return SiteInputs(
        nodes=jnp.asarray(space.site_nodes, jnp.int32),
        family=jnp.asarray(family),
        retained=features.retained,
        cost=features.cost,
        kept=features.kept,
        prior=energy_logits(space, params),
        valid=jnp.asarray(space.valid),
    )


class ActorCritic(nn.Module):
    """Encoder, actor and critic in one module; deterministic, there is no dropout."""

    config: AgentConfig
    """Width, depth and heads."""

    @nn.compact
    def __call__(self, graph: Graph, sites: SiteInputs) -> tuple[jax.Array, jax.Array]:
        """Logits float32 `[sites, options]`, `INVALID` where there is no option, and the value, a float32 scalar."""
        encoder = GraphEncoder(self.config.hidden, self.config.layers, self.config.heads, name="encoder")
        nodes = encoder(graph)
        logits = Actor(self.config.hidden, name="actor")(take_rows(nodes, sites.nodes), sites)
        # The critic reads the embedding but does not shape it: the scale of its loss follows the reward's.
        pooled = jax.lax.stop_gradient(jnp.mean(nodes, axis=0))
        value = Critic(self.config.hidden, name="critic")(jnp.concatenate([pooled, graph.globals[0]]))
        if self.config.own_logits:
            logits = logits + OWN_STEP * self.param("own", nn.initializers.zeros, sites.valid.shape)
        return mask_invalid(logits, sites.valid), value


class Actor(nn.Module):
    """Logits of every option of every site."""

    hidden: int
    """Width of the scorer's hidden layer."""

    @nn.compact
    def __call__(self, embeddings: jax.Array, sites: SiteInputs) -> jax.Array:
        """float32 `[sites, options]` from site embeddings float32 `[sites, width]`."""
        options = jnp.stack([sites.retained, sites.cost, sites.kept], axis=-1)
        where = nn.Dense(self.hidden, name="scorer_site")(embeddings)
        what = nn.Dense(self.hidden, use_bias=False, name="scorer_option")(options)
        shared = nn.Dense(1, use_bias=False, kernel_init=_NEAR_ZERO, name="scorer_output")(
            nn.gelu(where[:, None, :] + what)
        )
        count = sites.valid.shape[1]
        shape = (sites.family.shape[1], embeddings.shape[1], max(OPTIONS, count))
        heads = self.param("family_heads", _NEAR_ZERO, shape)[:, :, :count]
        by_family = jnp.einsum("sf,fwo,sw->so", sites.family, heads, embeddings)
        return shared[:, :, 0] + by_family + sites.prior


class Critic(nn.Module):
    """Value of a state; the output is linear, so that it reaches whatever range the reward has."""

    hidden: int
    """Width of the hidden layer."""

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """float32 scalar from a pooled embedding float32 `[features]`."""
        return nn.Dense(1, name="output")(nn.gelu(nn.Dense(self.hidden, name="hidden")(pooled)))[0]


def forward(
    agent: PolicyNetwork, params: dict, graphs: Graph, sites: SiteInputs
) -> tuple[jax.Array, jax.Array]:
    """Logits float32 `[n, sites, options]` and values float32 `[n]` of a batch of states (axes as in `state_axes`)."""

    def one(graph: Graph) -> tuple[jax.Array, jax.Array]:
        return agent.apply({"params": params}, graph, sites)  # type: ignore[return-value]

    return jax.vmap(one, in_axes=(state_axes(),))(graphs)

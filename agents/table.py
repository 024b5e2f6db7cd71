"""The agent without its graph: one logit per option of every site, trained by the same PPO.

What it does as well as the graph network is not owed to the graph. It cannot be carried to another network.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from sculpt.agents.actor_critic import OWN_STEP, SiteInputs
from sculpt.agents.distributions import mask_invalid
from sculpt.agents.gatv2 import Graph


class TablePolicy(nn.Module):
    """Takes and gives what `ActorCritic` does; looks at nothing but the sites' prior."""

    @nn.compact
    def __call__(self, graph: Graph, sites: SiteInputs) -> tuple[jax.Array, jax.Array]:
        """Logits float32 `[sites, options]`, `INVALID` where there is no option, and the value, a float32 scalar."""
        learnt = self.param("table", nn.initializers.zeros, sites.valid.shape)
        value = self.param("critic", nn.initializers.zeros, ())
        return mask_invalid(sites.prior + OWN_STEP * learnt, sites.valid), value

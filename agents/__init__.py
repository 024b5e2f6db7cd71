"""The agent, its rivals, and the search that runs them."""

from sculpt.agents.actor_critic import ActorCritic, SiteInputs, site_inputs
from sculpt.agents.config import AgentConfig, Method, SearchConfig
from sculpt.agents.search import SearchResult, search
from sculpt.scoring.reward import RewardConfig

__all__ = [
    "ActorCritic",
    "AgentConfig",
    "Method",
    "RewardConfig",
    "SearchConfig",
    "SearchResult",
    "SiteInputs",
    "search",
    "site_inputs",
]

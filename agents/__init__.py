"""The agent, its rivals, and the search that runs them."""

from sculpt.agents.actor_critic import ActorCritic, SiteInputs, site_inputs
from sculpt.agents.config import AgentConfig, Method, SearchConfig
from sculpt.agents.pretrain import Lesson, pretrain
from sculpt.agents.result import FrontPoint, SearchResult
from sculpt.agents.search import search, trial_network
from sculpt.agents.seeds import search_seeds
from sculpt.scoring.reward import RewardConfig

__all__ = [
    "ActorCritic",
    "AgentConfig",
    "FrontPoint",
    "Lesson",
    "Method",
    "RewardConfig",
    "SearchConfig",
    "SearchResult",
    "SiteInputs",
    "pretrain",
    "search",
    "search_seeds",
    "site_inputs",
    "trial_network",
]

"""The agent, its rivals, and the search that runs them."""

from sculpt.agents.actor_critic import ActorCritic, SiteInputs, site_inputs
from sculpt.agents.config import AgentConfig, Method, SearchConfig
from sculpt.agents.loop import search, trial_network
from sculpt.agents.observation import SiteFeatures, site_features, to_graph
from sculpt.agents.pretraining import Lesson, pretrain
from sculpt.agents.result import FrontPoint, SearchResult
from sculpt.agents.seeds import search_seeds
from sculpt.scoring.rewards import RewardConfig

__all__ = [
    "ActorCritic",
    "AgentConfig",
    "FrontPoint",
    "Lesson",
    "Method",
    "RewardConfig",
    "SearchConfig",
    "SearchResult",
    "SiteFeatures",
    "SiteInputs",
    "pretrain",
    "search",
    "search_seeds",
    "site_features",
    "site_inputs",
    "to_graph",
    "trial_network",
]

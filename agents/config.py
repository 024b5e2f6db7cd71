"""Settings of a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from sculpt.arguments import check_argument, checked_fields, did_you_mean, is_real, is_whole, without_numpy
from sculpt.model import Model
from sculpt.repair.recalibration import has_statistics
from sculpt.scoring.problem import Repair
from sculpt.scoring.rewards import Objective, RewardConfig
from sculpt.training.config import FinetuneConfig

Method = Literal["agent", "table", "random", "uniform", "magnitude", "lamp", "greedy", "evolution", "cma_es"]
LEARNERS = ("agent", "table")
"""Methods that learn by PPO."""
RULES = ("uniform", "magnitude", "lamp")
"""Methods without chance, which propose one policy over and over."""

_LARGE_BATCH_FROM = 2048
_OF_LEARNERS = (
    "sensitivity",
    "front",
    "learning_rate",
    "epochs",
    "clip_ratio",
    "entropy",
    "final_entropy",
    "kl_limit",
)
_BRIEF = FinetuneConfig(max_steps=100)


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def _require_whole(name: str, value: object, least: int) -> None:
    _require(is_whole(value, least), f"{name} must be a whole number of at least {least}, got {value!r}")


def _require_boolean(name: str, value: object) -> None:
    _require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    message = f"SearchConfig.{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}"
    _require(value in choices, message)


@checked_fields
@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """The size of the agent.

    Raises:
      ValueError: on a number below 1, or a width that the heads do not divide.
    """

    hidden: int = 64
    """Features of a node embedding and width of the hidden layers."""
    layers: int = 2
    """GATv2 layers: how many edges away a site sees."""
    heads: int = 4
    """Attention heads; must divide `hidden`."""
    own_logits: bool = True
    """Whether every site has logits of its own beside those that the graph gives: for what the features of a network do not tell. Not
    while an agent is trained for other networks (`pretrain`)."""

    def __post_init__(self) -> None:
        without_numpy(self)
        for name in ("hidden", "layers", "heads"):
            _require_whole(f"AgentConfig.{name}", getattr(self, name), 1)
        _require_boolean("AgentConfig.own_logits", self.own_logits)
        _require(
            self.hidden % self.heads == 0,
            f"AgentConfig.hidden must be a multiple of heads, got hidden={self.hidden}, heads={self.heads}",
        )


_WHOLE = {
    "evaluations": 1,
    "score_images": 1,
    "calibration_images": 0,
    "rerank": 0,
    "epochs": 1,
    "rounds": 1,
    "checkpoint_every": 1,
}
_SHARE: tuple[str, Callable[[float], bool]] = ("in [0, 1]", lambda value: 0 <= value <= 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "budget": ("in (0, 1]", lambda value: 0 < value <= 1),
    "learning_rate": ("a number above 0", lambda value: value > 0),
    "clip_ratio": ("in (0, 1)", lambda value: 0 < value < 1),
    "entropy": ("a number of at least 0", lambda value: value >= 0),
    "final_entropy": ("a number of at least 0, or None", lambda value: value >= 0),
    "kl_limit": ("a number above 0, or None", lambda value: value > 0),
    "sensitivity": ("in [0, 1)", lambda value: 0 <= value < 1),
    "discount": _SHARE,
    "gae_lambda": _SHARE,
}
_OPTIONAL = ("final_entropy", "kl_limit")
_PARTS = {"reward": RewardConfig, "rerank_finetune": FinetuneConfig, "agent": AgentConfig}


@checked_fields
@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What to search for, how long, and how.

    Raises:
      ValueError: on a value out of range, or a value that the other settings would ignore.
    """

    method: Method = "agent"
    """"agent": the graph attention network trained by PPO. Controls, under the same projection and the same number of
    evaluations: "table" (PPO on a table of logits, without the graph), "random", "evolution" (aging evolution), "cma_es" (on
    logits), "greedy" (each site by itself first, with up to half of the evaluations), and the fixed rules "uniform", "magnitude"
    and "lamp"."""
    warm_start: bool | None = None
    """Whether the first proposals favour options that retain energy. None: for "cma_es", and for "agent" and "table" where no single
    sites are scored first (see `sensitivity`) or an agent was taught elsewhere; "random" and "evolution" then begin with all options
    alike. The other methods have no use for it."""
    budget: float = 0.5
    """MACs kept / dense MACs, or the share of another resource (`sculpt.with_resource`), that the policy found must not exceed, in
    (0, 1]."""
    front: tuple[float, ...] = ()
    """Further budgets, for which the same agent learns beside: the policies of a batch take `budget` and these in turn, and
    `SearchResult.front` has the best of each. For "agent" and "table"."""
    evaluations: int = 2000
    """Policies scored, repeats included; rounded down to whole batches (times `rounds`)."""
    batch_size: int | None = None
    """Policies per update. None: 32, or 64 from 2,048 evaluations on, or all evaluations where those are fewer; a multiple of the
    number of budgets."""
    objective: Objective = "accuracy"
    """What a policy is scored by, after BatchNorm recalibration: "accuracy", or "loss" (minus the cross-entropy)."""
    reward: RewardConfig = RewardConfig()
    """How cost enters the reward; other kinds than "budget" need `projection=False`."""
    projection: bool = True
    """Project every sampled policy onto the budget, so that each scored policy meets it. False: the reward has to do it."""
    score_images: int = 256
    """Images of the train split that a policy is scored on; drawn by the search's key."""
    calibration_images: int = 128
    """Further images of the train split, for what `repair` does to each pruned network; 0: nothing."""
    repair: Repair | None = None
    """"recalibrate": BatchNorm's statistics are taken of the pruned network; "reconstruct": its layers are fitted to what the dense ones
    give (`sculpt.reconstruct`), before scoring and, more closely, before the re-rank's fine-tuning (unless that lets weights fade). None: the
    former for networks with BatchNorm (or other statistics), the latter for those without, whose masked candidates are often near chance."""
    rerank: int = 8
    """At the end the best so many distinct policies are fine-tuned briefly and compared on the validation split; 0: off."""
    rerank_finetune: FinetuneConfig = _BRIEF
    """How each of them is fine-tuned."""
    sensitivity: float = 0.125
    """Of the evaluations, up to this share are spent first on single sites, all others dense: as many options of every site as there is
    room for, and of many sites one option each, where half of the evaluations suffice for that. The first proposals then favour what does
    the loss little harm. 0: none. With `projection` alone. For "agent" and "table"; "greedy" spends up to half on it."""
    agent: AgentConfig = AgentConfig()
    """The size of the agent. For `method="agent"` alone; what follows for "table" too; other methods refuse another value."""
    learning_rate: float = 3e-3
    """Adam's, for the agent."""
    epochs: int = 6
    """Full-batch PPO epochs per update."""
    clip_ratio: float = 0.2
    """PPO clips each site's probability ratio to 1 -+ this."""
    entropy: float = 0.06
    """Weight of the entropy bonus, per nat of the mean entropy of a site, in the first update."""
    final_entropy: float | None = None
    """The same in the last update, reached in equal steps. None: as in the first."""
    kl_limit: float | None = None
    """Epochs of an update end once the agent has moved so far from the one that drew the policies: nats of KL divergence, mean over
    sites. None: all epochs are done."""
    rounds: int = 1
    """Refinement rounds per episode: each sees the assignment of the round before. 1: a one-shot bandit."""
    discount: float = 0.0
    """Discount from round to round, in [0, 1]; above 0 advantages are GAE with the critic. Needs `rounds` > 1."""
    gae_lambda: float = 0.95
    """The lambda of GAE, in [0, 1]; only with a `discount` above 0."""
    checkpoint_every: int = 10
    """Updates between two checkpoints (and two looks at the metrics), where the search has a directory."""

    def __post_init__(self) -> None:
        without_numpy(self)
        _require_choice("method", self.method, get_args(Method))
        if self.repair is not None:
            _require_choice("repair", self.repair, get_args(Repair))
        _require_choice("objective", self.objective, get_args(Objective))
        for name, least in _WHOLE.items():
            _require_whole(f"SearchConfig.{name}", getattr(self, name), least)
        for name, (expected, fits) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            _require(is_real(value) and fits(value), f"SearchConfig.{name} must be {expected}, got {value!r}")
        _require(
            isinstance(self.front, tuple)
            and all(is_real(budget) and 0.0 < budget <= 1.0 for budget in self.front)
            and len(set(np.asarray(self.budgets, np.float32).tolist())) == len(self.budgets),
            f"SearchConfig.front must be a tuple of distinct budgets in (0, 1] other than budget={self.budget}, got {self.front!r}",
        )
        for name, kind in _PARTS.items():
            check_argument(f"SearchConfig.{name}", getattr(self, name), kind)
        _require_boolean("SearchConfig.projection", self.projection)
        if self.warm_start is not None:
            _require_boolean("SearchConfig.warm_start", self.warm_start)
        self._check_batch()
        self._check_combinations()
        self._check_method()

    def _check_batch(self) -> None:
        if self.batch_size is not None:
            _require_whole("SearchConfig.batch_size", self.batch_size, 2)
        _require(
            self.batch % len(self.budgets) == 0 and self.batch >= 2 * len(self.budgets),
            f"SearchConfig.batch_size must give each of the {len(self.budgets)} budgets as many policies, two at least, got "
            f"{self.batch}: set a multiple of {len(self.budgets)}",
        )
        _require(
            self.updates >= 1,
            f"SearchConfig.evaluations={self.evaluations} is less than one update of {self.policies_per_update} policies "
            "(batch_size * rounds): ask for more, or lower those",
        )

    def _check_combinations(self) -> None:
        _require(
            self.repair != "reconstruct" or self.calibration_images > 0,
            "SearchConfig.repair='reconstruct' fits layers on calibration images, got calibration_images=0: ask for some, or for "
            "repair 'recalibrate'",
        )
        _require(
            self.rounds == 1 or self.method == "agent",
            f"SearchConfig.rounds={self.rounds} needs method='agent': method={self.method!r} does not refine",
        )
        _require(
            self.discount == 0.0 or self.rounds > 1,
            f"SearchConfig.discount={self.discount} needs rounds > 1: a one-shot episode has nothing to discount",
        )
        _require(
            self.gae_lambda == 0.95 or self.discount > 0.0,
            f"SearchConfig.gae_lambda={self.gae_lambda} needs a discount above 0, which switches GAE on",
        )
        _require(
            self.reward.kind == "budget" or not self.projection,
            f"RewardConfig.kind={self.reward.kind!r} weighs how far a policy exceeds the budget, which the projection "
            "never lets it: set projection=False, or kind='budget'",
        )
        _require(
            self.projection or self.reward.kind != "budget",
            "SearchConfig.projection=False with RewardConfig.kind='budget' would ignore the budget: choose the reward "
            "kind 'lagrangian' or 'schedule'",
        )
        _require(
            self.projection or self.method in LEARNERS,
            f"SearchConfig.projection=False needs method='agent' or 'table': method={self.method!r} has only the projection "
            "to keep the budget",
        )
        _require(
            self.projection or self.sensitivity in (0.0, SearchConfig.sensitivity),
            f"SearchConfig.sensitivity={self.sensitivity} needs projection=True: a reward that has to hold the budget would learn from "
            "single sites, all of them beyond it",
        )
        # The plain settings are what a compiled program, which knows of no re-rank, has in their place.
        _require(
            self.rerank > 0 or self.rerank_finetune in (_BRIEF, FinetuneConfig()),
            "SearchConfig.rerank_finetune says how the best policies are fine-tuned, and rerank=0 fine-tunes none: leave "
            "it out, or set rerank",
        )

    def _check_method(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            without = f"method={self.method!r} has no use for it"
            _require(
                field.name != "agent" or self.method == "agent",
                f"SearchConfig.agent={value} needs method='agent': {without}",
            )
            _require(
                field.name not in _OF_LEARNERS or self.method in LEARNERS,
                f"SearchConfig.{field.name}={value} needs method='agent' or 'table': {without}",
            )
        _require(
            self.warm_start is None or self.method not in (*RULES, "greedy"),
            f"SearchConfig.warm_start={self.warm_start}: method={self.method!r} has no use for it, leave it out",
        )

    def repair_of(self, model: Model) -> Repair:
        """What is done to the candidates of this network before they are scored."""
        if self.repair is not None:
            return self.repair
        return "recalibrate" if has_statistics(model) or not self.calibration_images else "reconstruct"

    @property
    def budgets(self) -> tuple[float, ...]:
        """All budgets, that of the policy to be chosen first."""
        return (self.budget, *self.front)

    @property
    def batch(self) -> int:
        """Policies per round of an update."""
        if self.batch_size is not None:
            return self.batch_size
        usual = min(64 if self.evaluations >= _LARGE_BATCH_FROM else 32, self.evaluations // self.rounds)
        each = max(2 if self.front else 1, usual // len(self.budgets))
        return max(2, each * len(self.budgets))

    @property
    def policies_per_update(self) -> int:
        """Policies that one update scores."""
        return self.batch * self.rounds

    @property
    def updates(self) -> int:
        """Updates of the whole search."""
        return self.evaluations // self.policies_per_update

"""How good a policy is: batched evaluation, rewards, the environment of the agent."""

from sculpt.scoring.evaluate import (
    Scores,
    evaluate,
    evaluate_policies,
    score_batch,
    score_params,
    score_policies,
    score_policy,
)
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.problem import Problem, make_problem
from sculpt.scoring.recalibrate import recalibrate
from sculpt.scoring.tune import Trial, Tuning, tune_plan

__all__ = [
    "EvaluationPlan",
    "Problem",
    "Scores",
    "Trial",
    "Tuning",
    "evaluate",
    "evaluate_policies",
    "make_problem",
    "recalibrate",
    "score_batch",
    "score_params",
    "score_policies",
    "score_policy",
    "tune_plan",
]

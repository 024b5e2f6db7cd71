"""How good policies are: many masked networks scored in one compiled program."""

from sculpt.scoring.evaluation import (
    Scores,
    evaluate,
    evaluate_policies,
    score_batch,
    score_params,
    score_policies,
    score_policy,
)
from sculpt.scoring.journal import StreamReport, evaluate_file
from sculpt.scoring.plan import EvaluationPlan
from sculpt.scoring.policy_file import read_policies
from sculpt.scoring.precision import PrecisionGap, precision_gap
from sculpt.scoring.problem import Problem, Repair, make_problem
from sculpt.scoring.race import Race, Rung, race_policies
from sculpt.scoring.stream import ScoredBlock, score_stream
from sculpt.scoring.tune import Trial, Tuning, tune_plan

__all__ = [
    "EvaluationPlan",
    "PrecisionGap",
    "Problem",
    "Race",
    "Repair",
    "Rung",
    "ScoredBlock",
    "Scores",
    "StreamReport",
    "Trial",
    "Tuning",
    "evaluate",
    "evaluate_file",
    "evaluate_policies",
    "make_problem",
    "precision_gap",
    "race_policies",
    "read_policies",
    "score_batch",
    "score_params",
    "score_policies",
    "score_policy",
    "score_stream",
    "tune_plan",
]

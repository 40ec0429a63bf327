"""Evaluation: answers → one row per model and exit policy, the choice of a threshold, results.json.

Beside them figures.py and gates.py (depth, KL, calibration), controls.py (rules that know less), externalisation.py and
interventions.py (what is written down), choice.py (in which style). Definitions: docs/evaluation.md.
"""

from .evaluate import Answer, AnsweredSet, answer_sets, evaluate_model, score_sets
from .results import table, write_results
from .summary import EvaluationRow, choose_threshold, pooled, summarise

__all__ = [
    "Answer",
    "AnsweredSet",
    "EvaluationRow",
    "answer_sets",
    "choose_threshold",
    "evaluate_model",
    "pooled",
    "score_sets",
    "summarise",
    "table",
    "write_results",
]

"""Rollouts and groups of them, made up by hand: six layers, prompts of three tokens."""

from __future__ import annotations

import numpy as np

from ee_megatron.evaluation.evaluate import AnswerRecord, EvaluationRow
from ee_megatron.types import Group, Prompt, Rollout


def a_rollout(depths, logprob=-1.0, finished=True) -> Rollout:
    n = len(depths)
    return Rollout(
        "p", np.arange(3), np.arange(n), np.array(depths, dtype=np.int32), np.full(n, logprob, dtype=np.float32),
        np.zeros(n, dtype=np.float32), "", finished, 1,
    )  # fmt: skip


def a_group(*depths, rewards=None, right=None, finished=None, logprob=-1.0) -> Group:
    """Answers by their tokens' depths; all worth 1, right and finished unless something else is said."""
    n = len(depths)
    rewards = np.ones(n, np.float32) if rewards is None else np.array(rewards, dtype=np.float32)
    ends = [True] * n if finished is None else finished
    rollouts = [a_rollout(d, logprob, end) for d, end in zip(depths, ends, strict=True)]
    correct = np.ones(n, bool) if right is None else np.array(right, dtype=bool)
    return Group(Prompt("p", "", "", "t"), rollouts, rewards, correct, np.ones(n, bool))


def an_answer(name, depths, correct=True, of_tokens=None, **more) -> AnswerRecord:
    """An evaluated answer; of_tokens: columns of its tokens beside their depths."""
    columns = {"text": ["x"] * len(depths), "entropy": [None] * len(depths), **(of_tokens or {}), "depth": depths}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    tokens = [{"logprob": -0.1, "exit_logprob": -0.2, **row} for row in rows]
    kept = {"prompt": "", "reference": "", "model": "m", "exits": "x", "text": "", **more}
    return AnswerRecord(id=name, correct=correct, tokens=tokens, **kept)


def a_row(accuracy, depth, exits="x", model="m", layers=60) -> EvaluationRow:
    right = round(200 * accuracy)
    return EvaluationRow(model, exits, 200, right, accuracy, 0.0, 1.0, depth, depth * layers, 10.0)

"""One row of the result table: what a model does under one exit policy; and which row's threshold to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..statistics import wilson_interval
from ..tasks.base import Verdict
from ..types import Prompt, Rollout


@dataclass(frozen=True)
class EvaluationRow:
    """- model: teacher, calibrated or reinforced; exits: the exit policy, in words
    - n answers, correct of them; accuracy = correct/n with its 95% Wilson interval [low, high]
    - mean_depth: mean of depth/L over all generated tokens of all answers, none left out (an answer's first counts as 1
      where it can't exit)
    - total_depth: layers per answer, i.e. the mean over answers of the sum of depths over their tokens
    - length: tokens per answer
    - kl: mean over the same tokens of KL(teacher at full depth ‖ model at its exits), nats; None: not measured
    - tokens_per_s: generated tokens per second of wall-clock time, prompts included in the time; None: not timed
      by itself
    - timed_out: answers without a verdict; they count as wrong
    """

    model: str
    exits: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    mean_depth: float
    total_depth: float
    length: float
    kl: float | None = None
    tokens_per_s: float | None = None
    timed_out: int = 0

    def to_json(self) -> dict[str, str | int | float | None]:
        """The fields by name."""
        return asdict(self)


def summarise(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Verdict],
    num_layers: int,
    divergences: Sequence[np.ndarray] | None = None,
    seconds: float | None = None,
    *,
    model: str = "",
    exits: str = "",
) -> EvaluationRow:
    """n prompts, their n answers and n verdicts (and float [T] divergences per answer) -> the row.

    Raises ValueError if there is nothing to summarise or the inputs do not belong together.
    """
    counts = {len(prompts), len(rollouts), len(verdicts), len(divergences if divergences is not None else rollouts)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"{len(prompts)} prompts, {len(rollouts)} answers, {len(verdicts)} verdicts"
            + (f", {len(divergences)} divergences" if divergences is not None else "")
            + ": expected equal numbers, at least one"
        )
    strangers = [r.prompt_id for p, r in zip(prompts, rollouts, strict=True) if p.id != r.prompt_id]
    if strangers:
        raise ValueError(f"answers are not in the order of the prompts: {strangers[0]!r} is out of place")
    n, correct = len(rollouts), sum(verdict.correct for verdict in verdicts)
    depths = np.concatenate([np.asarray(rollout.exit_depths, dtype=np.float64) for rollout in rollouts])
    tokens = len(depths)
    kl = None if divergences is None or not tokens else float(np.concatenate(list(divergences)).mean(dtype=np.float64))
    return _row(
        model,
        exits,
        n,
        correct,
        mean_depth=float(depths.mean()) / num_layers if tokens else 1.0,
        total_depth=float(depths.sum()) / n,
        length=tokens / n,
        kl=kl,
        tokens_per_s=tokens / seconds if seconds else None,
        timed_out=sum(verdict.timed_out for verdict in verdicts),
    )


def pooled(rows: Sequence[EvaluationRow]) -> EvaluationRow:
    """The row of all answers of `rows` [k], by one model under one exit policy; `kl` and `tokens_per_s` are left out.
    Raises ValueError if they are not of one, or for none."""
    kinds = {(row.model, row.exits) for row in rows}
    if len(kinds) != 1:
        raise ValueError(f"rows of {sorted(kinds)}: expected some, of one model under one exit policy")
    ((model, exits),) = kinds
    n, correct = sum(row.n for row in rows), sum(row.correct for row in rows)
    tokens = [row.n * row.length for row in rows]
    layers = sum(t * row.mean_depth for t, row in zip(tokens, rows, strict=True))
    return _row(
        model,
        exits,
        n,
        correct,
        mean_depth=layers / sum(tokens) if any(tokens) else 1.0,
        total_depth=sum(row.n * row.total_depth for row in rows) / n,
        length=sum(tokens) / n,
        timed_out=sum(row.timed_out for row in rows),
    )


def _row(model: str, exits: str, n: int, correct: int, **means: Any) -> EvaluationRow:
    low, high = wilson_interval(correct, n)
    return EvaluationRow(model, exits, n, correct, correct / n, low, high, **means)


def choose_threshold(rows: Sequence[EvaluationRow], tolerance: float) -> EvaluationRow:
    """The row of least mean depth whose accuracy is within `tolerance` of the best row's, full depth among them or not.

    Among equal depths the more accurate wins, then the first in alphabetical order of `exits`: the result does not
    depend on the order of the rows. Raises ValueError for no rows or a negative tolerance.
    """
    if not rows or tolerance < 0:
        raise ValueError(
            f"threshold choice among {len(rows)} rows with tolerance {tolerance}; expected at least one row and "
            "evaluate.tolerance >= 0"
        )
    # Accuracies are ratios of integers: the slack keeps "exactly within" on the inside.
    bar = max(row.accuracy for row in rows) - tolerance - 1e-9
    return min((row for row in rows if row.accuracy >= bar), key=lambda row: (row.mean_depth, -row.accuracy, row.exits))

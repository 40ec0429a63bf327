"""Which hazard threshold to deploy, decided on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

from .summary import EvaluationRow


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


def pareto_front(rows: Sequence[EvaluationRow]) -> list[bool]:
    """Which rows no other beats: none has less mean depth at the same accuracy or more, or more accuracy at the same
    depth or less. Of equal rows all stand. Pareto efficiency; bool [n]."""

    def beats(a: EvaluationRow, b: EvaluationRow) -> bool:
        no_worse = a.accuracy >= b.accuracy and a.mean_depth <= b.mean_depth
        return no_worse and (a.accuracy > b.accuracy or a.mean_depth < b.mean_depth)

    return [not any(beats(other, row) for other in rows) for row in rows]

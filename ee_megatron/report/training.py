"""What training logged: a small chart per metric, those that never changed in a list, and rollouts over RL's course."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import charts
from .answers import shown_answer
from .data import Curve, Inputs, StageData
from .numbers import number, span
from .results import MADE_BY
from .svg import legend_mark

# The loop's own figures first, housekeeping after them.
LEADING = ("reward", "accuracy", "mean_depth", "total_depth", "length", "loss", "kl")


def curves(inputs: Inputs) -> list[dict[str, Any]]:
    """Per stage that logged steps its metrics, the loop's own first; several runs share a metric's panel. `constant`:
    (name, value) of those that never changed."""
    found = []
    for name in dict.fromkeys(stage.name for stage in inputs.stages if stage.curves):
        group = [stage for stage in inputs.stages if stage.name == name and stage.curves]
        series = [_series(stage, place, inputs.results.models) for place, stage in enumerate(group)]
        metrics = dict.fromkeys(metric for stage in group for metric in stage.curves)
        panels: dict[str, list[tuple[str, int, Curve]]] = {}
        for metric in sorted(metrics, key=lambda n: LEADING.index(n) if n in LEADING else len(LEADING)):
            panels[metric.replace("_", " ")] = [
                (stage.run, index, stage.curves[metric])
                for stage, index in zip(group, series, strict=True)
                if metric in stage.curves
            ]
        constant = {metric for metric, lines in panels.items() if _constant(lines)}
        found.append(
            {
                "name": name,
                "steps": max(s for stage in group for points in stage.curves.values() for s, _ in points),
                "legend": [(legend_mark(c), stage.run) for stage, c in zip(group, series, strict=True)]
                if len(group) > 1
                else [],
                "panels": [
                    {"name": metric, "last": _last(lines), "chart": charts.curve(metric, lines)}
                    for metric, lines in panels.items()
                    if metric not in constant
                ],
                "constant": [(metric, _last(panels[metric])) for metric in panels if metric in constant],
            }
        )
    return found


def rollouts(inputs: Inputs) -> list[dict[str, Any]]:
    """Rollouts that RL kept, by step: {"run", "steps": [{"step", "answers"}]} per RL stage."""
    found = []
    for stage in inputs.stages:
        steps = [
            {"step": kept["step"], "answers": [_rollout(entry, inputs) for entry in kept["rollouts"]]}
            for kept in stage.samples
        ]
        if steps:
            found.append({"run": stage.run, "steps": steps})
    return found


def _rollout(entry: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    outcomes = inputs.outcomes
    answer = shown_answer(entry, outcomes)
    return {**answer, "prompt": entry["prompt"], "reference": entry.get("reference", ""), "reward": entry["reward"]}


def _constant(lines: Sequence[tuple[str, int, Curve]]) -> bool:
    """More than one step, and all values of all runs are one."""
    values = [value for _, _, points in lines for _, value in points]
    return len(values) > len(lines) and len(set(values)) == 1


def _series(stage: StageData, place: int, models: Sequence[str]) -> int:
    """The colour of the model that the stage made, if that is in the results."""
    made = next((model for model, makers in MADE_BY.items() if stage.name in makers), "")
    model = made + (f" ({stage.run})" if stage.run else "")
    return models.index(model) if model in models else place


def _last(lines: Sequence[tuple[str, int, Curve]]) -> str:
    """The last value; of several runs the least and the greatest."""
    values = [next(value for _, value in reversed(points) if math.isfinite(value)) for _, _, points in lines]
    return span(values, number)

"""The parts of results.json by name, and queries on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config.schema import RunConfig

# Models in the order of the method, with the stages that can have made each; the first that a run has did.
MADE_BY = {
    "teacher": ("teacher", "pretrain", "traces"),
    "calibrated": ("calibrate",),
    "reinforced": ("rl",),
}
NOT_BY_MODEL = ("meta", "rows", "answers", "controls", "choice")
# Not every evaluation measures these.
OPTIONAL = ("compared", "wide", "gates", "pareto", "externalisation", "controls", "choice")


@dataclass
class Results:
    """Parts of results.json under their names there, empty if missing.

    The keys of all but NOT_BY_MODEL are models ("calibrated") or labels ("calibrated, hazard > 0.5").
    """

    meta: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    depth_by_entropy: dict[str, Any] = field(default_factory=dict)
    exit_histogram: dict[str, dict[str, int]] = field(default_factory=dict)
    """Label -> depth (as a string, JSON's keys) -> tokens."""
    paired: dict[str, dict[str, Any]] = field(default_factory=dict)
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Label of a model at its chosen exits -> what changed from the model before it; evaluation/compare.py makes it."""
    wide: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Label -> results on wide operands, from evaluation/results.py."""
    depth: dict[str, Any] = field(default_factory=dict)
    by_task: dict[str, Any] = field(default_factory=dict)
    kl_by_exit: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    depth_correlations: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    pareto: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    externalisation: dict[str, Any] = field(default_factory=dict)
    controls: list[dict[str, Any]] = field(default_factory=list)
    choice: dict[str, Any] = field(default_factory=dict)
    """What of it is by model stands under "models"; evaluation/choice.py makes it."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """Read from JSON. Null parts count as missing; unknown keys are left out."""
        return cls(**{part.name: data[part.name] for part in fields(cls) if data.get(part.name)})

    def to_json(self) -> dict[str, Any]:
        """All parts, without OPTIONAL ones that are empty."""
        return {name: part for name, part in vars(self).items() if part or name not in OPTIONAL}

    @property
    def num_layers(self) -> int:
        return int(self.meta.get("num_layers") or 1)

    @property
    def outcomes(self) -> list[int]:
        """Exit depths and L."""
        return sorted({*self.meta.get("exit_depths", ()), self.num_layers})

    @property
    def models(self) -> list[str]:
        """Models in the order of the method, "calibrated (seed=1)" beside its like; unknown names last."""
        names = dict.fromkeys(row["model"] for row in (*self.rows, *self.answers))
        places = {model: place for place, model in enumerate(MADE_BY)}
        return sorted(names, key=lambda name: places.get(name.split(" (")[0], len(places)))

    def rank(self, label: str) -> int:
        """Sort key of a label: the place of the model that it begins with; unknown models are last."""
        models = self.models
        return next((i for i, m in enumerate(models) if label == m or label.startswith(f"{m}, ")), len(models))

    def in_order(self) -> Results:
        """A copy with every part by model, models in order."""
        for name, part in vars(self).items():
            if name in ("rows", "answers"):
                part.sort(key=lambda row: self.rank(row["model"]))
            elif name not in NOT_BY_MODEL:
                setattr(self, name, dict(sorted(part.items(), key=lambda item: self.rank(item[0]))))
        return self

    def last_chosen(self) -> dict[str, Any] | None:
        """Row of the last model for which validation chose a threshold, at this threshold."""
        for model in reversed(self.models):
            rule = f"hazard > {self.meta.get(f'threshold_{model}')}"
            for row in self.rows:
                if (row["model"], row["exits"]) == (model, rule):
                    return row
        return None


def report_path(cfg: RunConfig) -> Path:
    """Path of a run's report."""
    return Path(cfg.runs) / cfg.name / "report.html"


def strict_json(value: Any) -> Any:
    """Replace floats that aren't finite by null, since some readers of JSON refuse them; keys become strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value


def pareto_front(costs: Iterable[float], values: Iterable[float]) -> list[bool]:
    """Which of n points are Pareto-optimal: no other costs no more, is worth no less, and is better in one of the two.

    Of equal points all stand. Pareto efficiency; bool [n].
    """
    points = list(zip(costs, values, strict=True))
    return [not any(a <= c and b >= v and (a, b) != (c, v) for a, b in points) for c, v in points]

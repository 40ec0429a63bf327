"""results.json: its parts by name, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

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
    """The parts of results.json under the names that they have there, empty where missing.

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
    """Label -> what was measured on wide operands; evaluation/results.py makes it."""
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
        """Parts that are null count as missing; what is no part is left out."""
        return cls(**{part.name: data[part.name] for part in fields(cls) if data.get(part.name)})

    def to_json(self) -> dict[str, Any]:
        """All parts, but for OPTIONAL ones that are empty."""
        return {name: part for name, part in vars(self).items() if part or name not in OPTIONAL}

    @classmethod
    def parts_by_model(cls) -> list[str]:
        return [part.name for part in fields(cls) if part.name not in NOT_BY_MODEL]

    @property
    def num_layers(self) -> int:
        """From meta; else the greatest depth that occurs."""
        return int(self.meta.get("num_layers") or max(self._depths(), default=1))

    @property
    def outcomes(self) -> list[int]:
        """Exit depths and L, from meta or from what occurs."""
        return sorted({*map(int, self.meta.get("exit_depths") or []), *self._depths(), self.num_layers})

    def _depths(self) -> set[int]:
        """Those of the histogram and of the kept answers' tokens."""
        tokens = {int(t["depth"]) for a in self.answers for t in a.get("tokens", []) if "depth" in t}
        return tokens | {int(depth) for counts in self.exit_histogram.values() for depth in counts}

    @property
    def models(self) -> list[str]:
        """In the order of the method, "calibrated (seed=1)" of several runs with its like; unknown names last."""
        names = [str(r.get("model", "")) for r in (*self.rows, *self.answers)]
        places = {model: place for place, model in enumerate(MADE_BY)}
        return sorted(dict.fromkeys(names), key=lambda n: places.get(n.split(" (")[0], len(places)))

    def sorted_rows(self) -> list[dict[str, Any]]:
        """The rows by model, models in order."""
        models = self.models
        return sorted(self.rows, key=lambda row: models.index(str(row.get("model", ""))))

    def rank(self, label: str) -> int:
        """Place of the model that a label begins with; behind all for a stranger."""
        models = self.models
        return next((i for i, m in enumerate(models) if label == m or label.startswith(f"{m}, ")), len(models))

    def in_order(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A part by label, models in order."""
        return dict(sorted(part.items(), key=lambda item: self.rank(item[0])))

    def chosen(self, model: str) -> dict[str, Any] | None:
        """The row of a model at the threshold that validation chose for it; the teacher's at full depth."""
        rule = "full depth" if model == "teacher" else f"hazard > {self.meta.get(f'threshold_{model}')}"
        return next((row for row in self.rows if row.get("model") == model and row.get("exits") == rule), None)

    def last_chosen(self) -> dict[str, Any] | None:
        """That of the last model for which a threshold was chosen."""
        return next((row for m in reversed(self.models) if m != "teacher" and (row := self.chosen(m))), None)

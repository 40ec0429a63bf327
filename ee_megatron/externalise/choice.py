"""Part "choice" of results.json as records: which style a model answers in, and what each style is worth to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..report.numbers import or_nan
from .styles import STEPS, TERSE

PADDED = "padded"
STYLES = (TERSE, STEPS, PADDED)
OTHER = "other"
TEACHER, START, REINFORCED = "teacher", "start", "reinforced"


@dataclass(frozen=True)
class Figures:
    """Means over n answers; depths as shares of L: over an answer's tokens the mean, sum, largest and mean square."""

    n: int
    correct: float
    mean_depth: float
    total_depth: float
    max_depth: float
    square: float
    length: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        return cls(int(data["n"]), *(or_nan(data[f.name]) for f in fields(cls)[1:]))


@dataclass(frozen=True)
class Corrupted:
    """Of n answers whose first step was replaced by a wrong one: shares that were right after all, and that ended
    where the wrong step leads."""

    n: int
    correct: float
    followed: float


@dataclass(frozen=True)
class FamilyChoice:
    """One model on one family of problems. `forced`: under its own exits, the style given; `forced_full`: at full
    depth; `fixed`: at each depth. Empty where not measured."""

    hops: int
    free: Figures
    share: Mapping[str, float]
    forced: Mapping[str, Figures]
    forced_full: Mapping[str, Figures] = field(default_factory=dict)
    fixed: Mapping[int, Mapping[str, Figures]] = field(default_factory=dict)
    corrupted: Corrupted | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FamilyChoice:
        wrong = data.get("corrupted")
        return cls(
            hops=int(data["hops"]),
            free=Figures.from_json(data["free"]),
            share={style: float(data["free"]["share"].get(style, 0.0)) for style in (*STYLES, OTHER)},
            forced=_by_style(data["forced"]),
            forced_full=_by_style(data.get("forced_full") or {}),
            fixed={int(depth): _by_style(found) for depth, found in (data.get("fixed") or {}).items()},
            corrupted=Corrupted(int(wrong["n"]), float(wrong["correct"]), float(wrong["followed"])) if wrong else None,
        )


Model = Mapping[str, FamilyChoice]
"""Family -> what a model does on it."""


def read_models(part: Mapping[str, Any]) -> dict[str, Model]:
    """The part's models by name. Raises ValueError where it isn't what `evaluate.style_choice.models` writes."""
    try:
        return {
            name: {family: FamilyChoice.from_json(found) for family, found in model["families"].items()}
            for name, model in part["models"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"part choice is damaged ({type(error).__name__}: {error}); evaluate the run again") from None


def _by_style(data: Mapping[str, Any]) -> dict[str, Figures]:
    return {style: Figures.from_json(data[style]) for style in STYLES if style in data}

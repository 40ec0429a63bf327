"""The study as a table: one row per run and family that it trained on, the forecast beside what was found."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .choice import OTHER, STYLES, TERSE, FamilyChoice, Figures
from .compare import padding_odds
from .forecast import forecast, price
from .shape import Shape
from .study import Record, Study

Row = dict[str, Any]


def rows(study: Study) -> list[Row]:
    return [_row(study, record, family) for record in study.records for family in record.families]


def _row(study: Study, record: Record, family: str) -> Row:
    found, objective = record.found(family), record.objective
    start, expected = study.start(record, family), forecast(study, record, family) or {}
    row: Row = {
        **of_shape(record.shape), "base": record.base, "seed": record.seed, "tau": record.tau, "family": family,
        "hops": found.hops, "trained_on": " ".join(record.families), "condition": record.condition.label,
        "kind": record.condition.kind, "number": record.condition.number, "lambda_exit": objective.lambda_exit,
        "n": found.free.n,
    }  # fmt: skip
    row |= {f"share_{style}": found.share[style] for style in (*STYLES, OTHER)}
    row |= {f"forecast_{style}": expected.get(style) for style in STYLES}
    row |= {"log_odds_padded_terse": padding_odds(record, family)}
    row |= {f.name: getattr(found.free, f.name) for f in fields(Figures)[1:]}
    row |= {"price_paid": price(objective, found.free)}
    row |= {f"right_{style}": _right(found.forced, style) for style in STYLES}
    row |= {"right_terse_full": _right(found.forced_full, TERSE)}
    row |= {"start_right_terse": _right(start.forced if start else {}, TERSE)}
    row |= {"start_right_terse_full": _right(_full(study, record, family), TERSE)}
    wrong = found.corrupted
    row |= {"corrupted_right": wrong and wrong.correct, "corrupted_followed": wrong and wrong.followed}
    return row | {"seconds_rl": record.seconds, "evaluation": record.path}


def of_shape(shape: Shape) -> Row:
    """A shape's columns; empty what isn't known."""
    return {"layers": shape.layers, "width": shape.width or None, "parameters": shape.parameters or None}


def _full(study: Study, record: Record, family: str) -> Mapping[str, Figures]:
    start: FamilyChoice | None = study.start_anywhere(record, family)
    return start.forced_full if start else {}


def _right(forced: Mapping[str, Figures], style: str) -> float | None:
    return forced[style].correct if style in forced else None


def to_csv(found: Sequence[Row]) -> str:
    """Comma-separated values, a head line of all columns first; empty where there is none."""
    buffer = io.StringIO()
    heads = list(dict.fromkeys(name for row in found for name in row))
    writer = csv.DictWriter(buffer, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue()

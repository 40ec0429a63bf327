"""The study's page: one HTML file that needs nothing but itself, and PNG copies of its charts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..exit_rules import Sample
from ..observe.rundir import write_atomic
from ..report.answers import problems
from ..report.charts import Chart
from ..report.palette import stylesheet
from ..report.pictures import picture
from ..report.results import Results
from ..report.template import FOLDER, render, style
from . import words
from .choice import REINFORCED
from .figures import NOTE, PADDING, STEPS_SHARE, by_tokens, panels
from .laws import Law, laws_table
from .rows import Row
from .shape import Shape
from .study import Record, Study, counted
from .tables import controls, runs_table
from .verdicts import PRICE, Points, Verdict, at_tau

SHOWN = 3
"""Answers that are shown token by token."""


@dataclass(frozen=True)
class Panel:
    """Charts under one heading."""

    name: str
    title: str
    note: str
    charts: Sequence[Chart]


def write_page(
    output: Path,
    directory: Path,
    study: Study,
    table: Sequence[Row],
    points: Points,
    found: Sequence[Law],
    facts: str,
) -> Path:
    """Write the page to `output` (.html), its charts as PNG to plots/ beside it; returns `output`. `directory`: where
    the study's runs are. Models of several shapes have their figures, points and controls apart, and a table of laws.
    """
    results, record = _answers(directory, study)
    outcomes = results.outcomes
    several = len(points) > 1
    parts = {shape: study.of_shape(shape) for shape in points}
    drawn = [panel for shape, part in parts.items() for panel in _panels(part, shape if several else None)]
    page = render(
        Path(__file__).parent / "page.html.j2",
        style=style() + Markup(stylesheet(len(outcomes))),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        question=words.QUESTION,
        lead=[
            f"{shape.label}: {words.answer(part, points[shape])}" if several else words.answer(part, points[shape])
            for shape, part in parts.items()
        ],
        asked=words.ASKED,
        claim=words.CLAIM,
        facts=facts,
        remarks=study.remarks,
        laws=laws_table(found) if several else None,
        panels=drawn,
        accepted=words.ACCEPTED,
        judged=[_judged(part, shape.label if several else "", points[shape]) for shape, part in parts.items()],
        problems=problems(results),
        shown=_shown(record, study) if record else "",
        outcomes=outcomes,
        controls=[
            (_at(tau, part, caption, shape.label if several else ""), shown)
            for shape, part in parts.items()
            for tau in part.taus
            for caption, shown in controls(part, tau)
        ],
        runs=runs_table(table),
    )
    folder = output.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for chart in (chart for panel in drawn for chart in panel.charts):
        write_atomic(folder / f"{chart.name}.png", picture(chart, len(outcomes)))
    write_atomic(output, page)
    return output


def _panels(study: Study, shape: Shape | None) -> list[Panel]:
    """Those of a study of one shape; named after it, where there are others."""
    several = len(study.taus) > 1
    found = []
    for tau in study.taus:
        apart = f", {counted(tau, 'token')} a step" if several else ""
        for quantity in (STEPS_SHARE, PADDING):
            note = f"{words.SHARES if quantity is STEPS_SHARE else words.ODDS} {NOTE}"
            found.append(Panel(f"{quantity.name}-{tau}", quantity.title + apart, note, panels(study, tau, quantity)))
    charts = by_tokens(study)
    found.append(Panel("tokens", "Long steps", words.TOKENS, charts))
    shown = [panel for panel in found if panel.charts]
    return [_of_shape(panel, shape) for panel in shown] if shape else shown


def _of_shape(panel: Panel, shape: Shape) -> Panel:
    charts = [replace(chart, name=f"{chart.name}_{shape.slug}") for chart in panel.charts]
    return Panel(f"{panel.name}-{shape.slug}", f"{panel.title}: {shape.label}", panel.note, charts)


def _at(tau: int, study: Study, caption: str, shape: str) -> str:
    apart = [shape] if shape else []
    apart += [f"{counted(tau, 'token')} a step"] if len(study.taus) > 1 else []
    return ". ".join([*apart, caption])


def _judged(study: Study, title: str, points: Sequence[Verdict]) -> dict[str, Any]:
    """The points of one shape: at the fewest tokens a step, and again at others."""
    others = study.taus[1:]
    again = [(f"{counted(tau, 'token')} a step", list(map(_point, at_tau(study, tau)))) for tau in others]
    return {"title": title, "points": list(map(_point, points)), "again": again}


def _point(point: Verdict) -> dict[str, Any]:
    shown = {name: getattr(point, name) for name in ("point", "name", "answer", "statement")}
    of = f"{counted(point.bases, 'base')}, {counted(point.runs, 'run')}, tokens a step: {point.tau}"
    return {**shown, "found": "; ".join(part.words for part in point.parts), "of": of}


def _answers(directory: Path, study: Study) -> tuple[Results, Record | None]:
    """Answers of one run under a price, on the most hops: max at PRICE if there is one, one answer per opening; depths
    of the model in any case."""
    priced = [r for r in study.records if r.condition.priced]
    order = sorted(
        priced,
        key=lambda r: (
            r.condition.kind != "max", r.condition.number != PRICE, r.tau, -max(r.found(f).hops for f in r.families)
        ),
    )  # fmt: skip
    for record in order:
        data = json.loads((directory / record.path / "results.json").read_text(encoding="utf-8"))
        results = Results.from_json(data)
        own = [a for a in results.answers if a.get("model") == REINFORCED and _family(a) in record.families]
        # As RL made them, where there are such.
        sampled = [a for a in own if a.get("exits") == Sample().label]
        if own:
            return Results(meta=results.meta, answers=_varied(sampled or own)), record
    return Results(meta={"num_layers": study.records[0].num_layers}), None


def _family(answer: dict[str, Any]) -> str:
    return str(answer.get("task", "")).rpartition(".")[2]


def _varied(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to SHOWN answers to as many problems, of every opening one before there are two of any."""
    of_opening: dict[str, list[dict[str, Any]]] = {}
    prompts = set()
    for answer in answers:
        if answer["prompt"] not in prompts:
            prompts.add(answer["prompt"])
            of_opening.setdefault(str(answer.get("text", "")).lstrip()[:1], []).append(answer)
    rounds = zip_longest(*of_opening.values())
    return [answer for turn in rounds for answer in turn if answer is not None][:SHOWN]


def _shown(record: Record, study: Study) -> str:
    hops = ", ".join(str(study.hops[f]) for f in record.families)
    shape = f"{record.shape.label}; base" if len(study.shapes) > 1 else "Base"
    return (
        f"{shape} {record.base}, seed {record.seed}, {record.condition.label}, trained on problems of {hops} hops; "
        "A problem names operations and, last, the state to begin with; T or That begins a terse answer, S or First "
        "steps, P or Well padding."
    )

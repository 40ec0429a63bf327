"""The report of a run: one HTML file that needs nothing but itself, and PNG copies of its charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..observe.rundir import write_atomic
from . import charts, plots
from .answers import problems
from .data import Inputs, Results, Run, Stage, binned, entropy_points, read_inputs, stored_bins
from .merge import merge
from .palette import stylesheet
from .sections import model_rank, sections
from .svg import colour, legend_mark, number

COLUMNS = (
    ("exits", "exits"), ("accuracy", "accuracy [95 %]"), ("n", "n"), ("p_value", "p"), ("mean_depth", "mean depth"),
    ("total_depth", "total depth"), ("length", "length"), ("kl", "KL (nats)"), ("tokens_per_s", "tokens/s"),
)  # fmt: skip
# The loop's own figures first, housekeeping after them.
LEADING = ("reward", "accuracy", "mean_depth", "total_depth", "length", "loss", "kl")
# What a stage makes, by the name that it has in the results.
MADE = {"pretrain": "teacher", "teacher": "teacher", "calibrate": "calibrated", "rl": "reinforced"}


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write the report of one run or several to `output` (.html), its plots to plots/ beside it; returns `output`.

    What is missing of a run is named in the report. Raises ValueError if no stage's directory exists, or if runs of
    different numbers of layers are to be compared.
    """
    inputs = read_inputs(runs[0].stages) if len(runs) == 1 else merge(runs)
    output = Path(output)
    folder = output.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    results = inputs.results
    context = {
        **_texts(results.outcomes),
        **_header(inputs, runs),
        **_results(results, folder),
        "sections": sections(results, runs, folder),
        "training": _training(inputs, folder),
        "problems": problems(results),
        "stages": [stage for stage in inputs.stages if stage.config],
        "missing": inputs.missing,
        "runs": len(runs),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    write_atomic(output, environment.get_template("page.html.j2").render(context))
    return output


def _texts(outcomes: list[int]) -> dict[str, Markup]:
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    return {
        "style": Markup(style + stylesheet(len(outcomes))),
        "script": Markup((here / "page.js").read_text(encoding="utf-8")),
    }


def _header(inputs: Inputs, runs: Sequence[Run]) -> dict[str, Any]:
    meta = inputs.results.meta
    title = str(meta.get("name") or meta.get("title") or "Early-exit run")
    if len(runs) > 1:
        title = f"{len(runs)} early-exit runs"
    facts = [(str(key).replace("_", " "), _plain(value)) for key, value in meta.items() if key not in ("name", "title")]
    return {"title": title, "facts": facts, "summary": _summary(inputs.results)}


def _summary(results: Results) -> list[tuple[str, str]]:
    """One line per model, over all its rows: nothing is picked by its score on the evaluation set."""
    lines = []
    for model in results.models:
        rows = [r for r in results.rows if r.get("model") == model and _is_number(r.get("accuracy"))]
        if rows:
            accuracies = _range([r["accuracy"] for r in rows], "{:.1%}")
            depths = _range([r["mean_depth"] for r in rows if _is_number(r.get("mean_depth"))], "{:.2f}")
            rules = f", {len(rows)} exit rules" if len(rows) > 1 else ""
            lines.append((model, f"accuracy {accuracies} at mean depth {depths}{rules}"))
    return lines


def _range(values: list[float], form: str) -> str:
    if not values:
        return "–"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _results(results: Results, folder: Path) -> dict[str, Any]:
    order = {model: index for index, model in enumerate(results.models)}
    table: list[dict[str, Any]] = []
    points: dict[str, list[charts.Point]] = {model: [] for model in order}
    for index, row in enumerate(sorted(results.rows, key=lambda r: order[str(r.get("model", ""))]), start=1):
        model = str(row.get("model", ""))
        paired = results.paired.get(f"{model}, {row.get('exits', '')}") or {}
        cells = {key: _cell(key, {**row, "p_value": paired.get("p_value")}) for key, _ in COLUMNS}
        table.append({"mark": index, "model": model, "colour": colour(order[model]), "cells": cells})
        if _is_number(row.get("accuracy")) and _is_number(row.get("mean_depth")):
            accuracy = float(row["accuracy"])
            low, high = (float(row[k]) if _is_number(row.get(k)) else accuracy for k in ("low", "high"))
            tip = f"{index}  {model}, {row.get('exits', '')}\naccuracy {cells['accuracy']}"
            tip += f"\nmean depth {cells['mean_depth']}"
            points[model].append(charts.Point(float(row["mean_depth"]), accuracy, low, high, str(index), tip))
    series = [(model, group) for model, group in points.items() if group]
    histogram = sorted(results.exit_histogram.items(), key=lambda item: model_rank(item[0], results.models))
    trends = _trends(results)
    if series:
        plots.tradeoff(series, folder / "accuracy_depth.png")
    if histogram:
        plots.histogram(histogram, results.outcomes, folder / "exit_histogram.png")
    if trends:
        plots.scatter(trends, folder / "depth_entropy.png")
    return {
        "columns": COLUMNS,
        "table": table,
        "legend": [(legend_mark(order[m]), m) for m, _ in series],
        "tradeoff": charts.tradeoff(series) if series else None,
        "histogram": charts.histogram(histogram, results.outcomes, results.num_layers) if histogram else None,
        "entropy": charts.scatter(trends) if trends else None,
        "entropy_legend": [(legend_mark(t.series, t.rule), t.name) for t in trends],
        "correlations": _correlations(results.depth_by_entropy),
        "outcomes": results.outcomes,
        "num_layers": results.num_layers,
    }


def _trends(results: Results) -> list[charts.Trend]:
    """Each label that the evaluation or the kept answers have, models in order, a model's rules counted from 0."""
    points = entropy_points(results)
    labels = dict.fromkeys((*results.depth_by_entropy, *points))
    trends: list[charts.Trend] = []
    for label in sorted(labels, key=lambda name: model_rank(name, results.models)):
        bins = stored_bins(results, label) or binned(points.get(label, []))
        if bins:
            series = model_rank(label, results.models)
            rule = sum(t.series == series for t in trends)
            trends.append(charts.Trend(series, rule, label, points.get(label, []), bins))
    return trends


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row.get(key)
    if key == "exits":
        return str(value if value is not None else "–")
    if not _is_number(value):
        return "–"
    if key == "accuracy":
        low, high = row.get("low"), row.get("high")
        interval = f" [{100 * low:.1f}, {100 * high:.1f}]" if _is_number(low) and _is_number(high) else ""
        return f"{100 * value:.1f}{interval} %"
    forms = {
        "n": "{:,.0f}",
        "p_value": "{:.2g}",
        "mean_depth": "{:.3f}",
        "total_depth": "{:,.0f}",
        "length": "{:.1f}",
        "kl": "{:.3f}",
    }
    return forms.get(key, "{:,.0f}").format(value)


def _correlations(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """depth_by_entropy as it comes, {label: {name: value}} or {name: value}; lists (bins, points) are left out."""
    nested = [(str(label), values) for label, values in data.items() if isinstance(values, Mapping)]
    flat = {name: value for name, value in data.items() if not isinstance(value, Mapping)}
    lines = []
    for label, values in [*nested, ("", flat)]:
        if _is_number(values.get("spearman")) and _is_number(values.get("low")) and _is_number(values.get("high")):
            tokens = f", {values['tokens']:,.0f} tokens" if _is_number(values.get("tokens")) else ""
            interval = f"[{values['low']:.2f}, {values['high']:.2f}]"
            lines.append((label, f"Spearman ρ {values['spearman']:.2f} {interval}{tokens}"))
            continue
        scalars = [(str(k).replace("_", " "), v) for k, v in values.items() if _is_number(v) or isinstance(v, str)]
        if scalars:
            lines.append((label, ", ".join(f"{k} {number(v) if _is_number(v) else v}" for k, v in scalars)))
    return lines


def _training(inputs: Inputs, folder: Path) -> list[dict[str, Any]]:
    """Per stage that logged steps its metrics, the loop's own first; several runs share a metric's panel."""
    found = []
    for name in dict.fromkeys(stage.name for stage in inputs.stages if stage.curves):
        group = [stage for stage in inputs.stages if stage.name == name and stage.curves]
        series = [_series(stage, place, inputs.results.models) for place, stage in enumerate(group)]
        metrics = dict.fromkeys(metric for stage in group for metric in stage.curves)
        panels: dict[str, list[tuple[str, int, list[tuple[int, float]]]]] = {}
        for metric in sorted(metrics, key=lambda n: LEADING.index(n) if n in LEADING else len(LEADING)):
            panels[metric.replace("_", " ")] = [
                (stage.run, index, stage.curves[metric])
                for stage, index in zip(group, series, strict=True)
                if metric in stage.curves
            ]
        plots.training(panels, folder / f"training_{name}.png")
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
                ],
            }
        )
    return found


def _series(stage: Stage, place: int, models: Sequence[str]) -> int:
    """The colour of the model that the stage made, if that is in the results."""
    model = MADE.get(stage.name, "") + (f" ({stage.run})" if stage.run else "")
    return models.index(model) if model in models else place


def _last(lines: Sequence[tuple[str, int, Sequence[tuple[int, float]]]]) -> str:
    """The last value; of several runs the least and the greatest."""
    values = [next(value for _, value in reversed(points) if math.isfinite(value)) for _, _, points in lines]
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return str(value)

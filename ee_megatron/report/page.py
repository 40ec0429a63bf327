"""The report of a run: one HTML file that needs nothing but itself, and PNG copies of its charts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..observe.rundir import write_atomic
from . import charts
from .answers import problems
from .charts import Chart, Dot, Line
from .data import Inputs, ReportRun, read_inputs
from .differences import differences
from .files import commands, links, table_csv
from .lens import grids
from .merge import merge
from .numbers import estimate, is_number, span
from .palette import stylesheet
from .pictures import multiples, picture
from .results import Results, binned, entropy_points, stored_bins
from .sections import sections
from .svg import colour, legend_box, legend_mark
from .template import FOLDER, render, style
from .training import curves, rollouts
from .verdict import verdicts

COLUMNS = (
    ("exits", "exits"), ("accuracy", "accuracy [95 %]"), ("n", "n"), ("difference", "to teacher [95 %]"),
    ("p_value", "p"), ("mean_depth", "mean depth"), ("total_depth", "total depth"), ("length", "length"),
    ("kl", "KL (nats)"), ("tokens_per_s", "tokens/s"),
)  # fmt: skip


def write_report(runs: Sequence[ReportRun], output: Path) -> Path:
    """Write the report of one run or several to `output` (.html), its charts as PNG to plots/ beside it; returns
    `output`.

    What is missing of a run is named in the report. Raises ValueError if no stage's directory exists, or if runs of
    different numbers of layers are to be compared.
    """
    inputs = read_inputs(runs[0]) if len(runs) == 1 else merge(runs)
    output = Path(output)
    results, outcomes = inputs.results, inputs.outcomes
    table = _table(results)
    found = {"tradeoff": _tradeoff(results, table), "entropy": _entropy(results), "histogram": _histogram(results)}
    parts, training = sections(inputs, runs), curves(inputs)
    changes = differences(results, inputs.problems)
    scripts = ["page.js", *(["differences.js"] if changes else [])]
    page = render(
        FOLDER / "page.html.j2",
        style=style() + Markup(stylesheet(len(outcomes))),
        script=Markup("".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)),
        **_header(inputs, runs),
        verdicts=verdicts(inputs),
        **found,
        columns=COLUMNS,
        table=table,
        correlations=_correlations(results.depth_by_entropy),
        outcomes=outcomes,
        num_layers=results.num_layers,
        sections=parts,
        training=training,
        rollouts=rollouts(inputs),
        problems=problems(results),
        lens=grids(inputs.lens, results.models, results.num_layers) if inputs.lens else None,
        differences=changes,
        links=links(inputs, output),
        csv=table_csv(results) if results.rows else "",
        commands=commands(runs),
        stages=[stage for stage in inputs.stages if stage.config],
        missing=inputs.missing,
        runs=len(runs),
    )
    folder = output.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for chart in (*found.values(), *(chart for section in parts for chart in section.charts)):
        if chart is not None:
            write_atomic(folder / f"{chart.name}.png", picture(chart, len(outcomes)))
    for stage in training:
        panels = [(panel["name"], panel["chart"]) for panel in stage["panels"]]
        if not panels:
            continue
        write_atomic(folder / f"training_{stage['name']}.png", multiples(panels, stage["legend"]))
    write_atomic(output, page)
    return output


def _header(inputs: Inputs, runs: Sequence[ReportRun]) -> dict[str, Any]:
    meta = inputs.results.meta
    config = runs[0].config
    title = str(meta.get("name") or meta.get("title") or (config.name if config else "Early-exit run"))
    if len(runs) > 1:
        title = f"{len(runs)} early-exit runs"
    facts = [(str(key).replace("_", " "), _plain(value)) for key, value in meta.items() if key not in ("name", "title")]
    coming = list(dict.fromkeys(stage for run in runs for stage in run.coming))
    written = time.strftime("%Y-%m-%d %H:%M")
    return {
        "title": title, "facts": facts, "summary": _summary(inputs.results), "coming": coming, "written": written
    }  # fmt: skip


def _summary(results: Results) -> list[tuple[str, str]]:
    """One line per model, over all its rows: nothing is picked by its score on the evaluation set."""
    lines = []
    for model in results.models:
        rows = [r for r in results.rows if r.get("model") == model and is_number(r.get("accuracy"))]
        if rows:
            accuracies = span([r["accuracy"] for r in rows], "{:.1%}".format)
            depths = span([r["mean_depth"] for r in rows if is_number(r.get("mean_depth"))], "{:.2f}".format)
            rules = f", {len(rows)} exit rules" if len(rows) > 1 else ""
            lines.append((model, f"accuracy {accuracies} at mean depth {depths}{rules}"))
    return lines


def _table(results: Results) -> list[dict[str, Any]]:
    """The results' rows, models in order, each with its cells in words by column."""
    table: list[dict[str, Any]] = []
    models = results.models
    for row in sorted(results.rows, key=lambda row: models.index(str(row.get("model", "")))):
        model = str(row.get("model", ""))
        label = f"{model}, {row.get('exits', '')}"
        paired = results.paired.get(label) or {}
        compared = {key: paired.get(key) for key in ("p_value", "difference", "group_low", "group_high")}
        cells = {key: _cell(key, {**row, **compared}) for key, _ in COLUMNS}
        css = colour(models.index(model))
        table.append(
            {"mark": len(table) + 1, "model": model, "colour": css, "label": label, "row": row, "cells": cells}
        )
    return table


def _tradeoff(results: Results, table: Sequence[Mapping[str, Any]]) -> Chart | None:
    points: dict[str, list[Dot]] = {model: [] for model in results.models}
    for entry in table:
        row, cells, mark = entry["row"], entry["cells"], str(entry["mark"])
        if is_number(row.get("accuracy")) and is_number(row.get("mean_depth")):
            accuracy = float(row["accuracy"])
            low, high = (float(row[k]) if is_number(row.get(k)) else accuracy for k in ("low", "high"))
            tip = f"{mark}  {entry['label']}\naccuracy {cells['accuracy']}\nmean depth {cells['mean_depth']}"
            points[entry["model"]].append(Dot(float(row["mean_depth"]), accuracy, low, high, tip, mark))
    series = [(model, group) for model, group in points.items() if group]
    if not series:
        return None
    legend = [(legend_mark(results.models.index(model)), model) for model, _ in series]
    note = "Bars: 95 % intervals. Numbers: rows of the table."
    return Chart("accuracy_depth", "Accuracy against depth", charts.tradeoff(series), note, legend)


def _histogram(results: Results) -> Chart | None:
    if not results.exit_histogram:
        return None
    outcomes, layers = results.outcomes, results.num_layers
    strips = charts.histogram(results.in_order(results.exit_histogram), outcomes, layers)
    note = f"Share of generated tokens by exit depth; {layers} means no exit. Right: mean depth."
    legend = [(Markup(), "depth"), *((legend_box(index), str(depth)) for index, depth in enumerate(outcomes))]
    return Chart("exit_histogram", "Where tokens exit", strips, note, legend)


def _entropy(results: Results) -> Chart | None:
    """A line per label that the evaluation or the kept answers have, a model's rules counted from 0."""
    points = entropy_points(results)
    means: list[Line] = []
    for label in results.in_order(dict.fromkeys((*results.depth_by_entropy, *points))):
        dots = []
        for x, y, error, n in stored_bins(results, label) or binned(points.get(label, [])):
            spread = f" ± {error:.2f}" if math.isfinite(error) else ""
            tip = f"{label}\nentropy {x:.2f} nats (mean of {n:,} tokens)\nmean depth {y:.2f}{spread}"
            dots.append(Dot(x, y, y - error, y + error, tip))
        if dots:
            series = results.rank(label)
            means.append(Line(series, sum(line.series == series for line in means), label, dots))
    if not means:
        return None
    legend = [(legend_mark(line.series, line.rule), line.name) for line in means]
    return Chart("depth_entropy", "Depth against entropy", charts.scatter(means, points), legend=legend)


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row.get(key)
    if key == "exits":
        return str(value if value is not None else "–")
    if not is_number(value):
        return "–"
    if key == "accuracy":
        low, high = row.get("low"), row.get("high")
        interval = f" [{100 * low:.1f}, {100 * high:.1f}]" if is_number(low) and is_number(high) else ""
        return f"{100 * value:.1f}{interval} %"
    if key == "difference":
        # Over groups of problems that are right or wrong together: the other interval is too narrow.
        low, high = row.get("group_low"), row.get("group_high")
        interval = f" [{100 * low:+.1f}, {100 * high:+.1f}]" if is_number(low) and is_number(high) else ""
        return f"{100 * value:+.1f}{interval}"
    forms = {
        "n": "{:,.0f}",
        "p_value": "{:.2g}",
        "mean_depth": "{:.3f}",
        "total_depth": "{:,.0f}",
        "length": "{:.1f}",
        "kl": "{:.3f}",
    }
    return forms.get(key, "{:,.0f}").format(value)


def _correlations(depth_by_entropy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and rank correlation in words, where there is one."""
    lines = []
    for label, values in depth_by_entropy.items():
        if is_number(values.get("spearman")):
            tokens = f", {values['tokens']:,.0f} tokens" if is_number(values.get("tokens")) else ""
            lines.append((label, f"Spearman ρ {estimate({**values, 'value': values['spearman']})}{tokens}"))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return str(value)

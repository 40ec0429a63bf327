"""The report of a run: one HTML file that needs nothing but itself, and PNG copies of its charts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import charts, plots
from .palette import stylesheet
from .report_data import Inputs, Results, Stage, binned, entropy_points, read_inputs, stored_bins
from .rundir import write_atomic

COLUMNS = (
    ("exits", "exits"), ("accuracy", "accuracy [95 %]"), ("n", "n"), ("p_value", "p"), ("mean_depth", "mean depth"),
    ("total_depth", "total depth"), ("length", "length"), ("kl", "KL (nats)"), ("tokens_per_s", "tokens/s"),
)  # fmt: skip
# The loop's own figures first, housekeeping after them.
LEADING = ("reward", "accuracy", "mean_depth", "total_depth", "length", "loss", "kl")

# A prompt with worked examples is long; its end is the problem, the whole stands behind a fold.
PROMPT_SHOWN = 320


def write_report(stage_dirs: Mapping[str, Path], output: Path) -> Path:
    """Write the report of the stages' files to `output` (.html), its plots to plots/ beside it; returns `output`.

    `stage_dirs` maps teacher, traces, calibrate, rl, evaluate to their run directories. What is missing is named in
    the report. Raises ValueError if no stage's directory exists.
    """
    inputs = read_inputs(stage_dirs)
    output = Path(output)
    folder = output.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    results = inputs.results
    context = {
        **_texts(results.outcomes),
        **_header(inputs),
        **_results(results, folder),
        "training": [_training(stage, folder) for stage in inputs.stages if stage.curves],
        "problems": _problems(results),
        "stages": [stage for stage in inputs.stages if stage.config],
        "missing": inputs.missing,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    write_atomic(output, environment.get_template("report.html.j2").render(context))
    return output


def _texts(outcomes: list[int]) -> dict[str, Markup]:
    here = Path(__file__).parent
    style = (here / "report.css").read_text(encoding="utf-8")
    return {
        "style": Markup(style + stylesheet(len(outcomes))),
        "script": Markup((here / "report.js").read_text(encoding="utf-8")),
    }


def _header(inputs: Inputs) -> dict[str, Any]:
    meta = inputs.results.meta
    title = str(meta.get("name") or meta.get("title") or "Early-exit run")
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
        table.append({"mark": index, "model": model, "series": order[model], "cells": cells})
        if _is_number(row.get("accuracy")) and _is_number(row.get("mean_depth")):
            accuracy = float(row["accuracy"])
            low, high = (float(row[k]) if _is_number(row.get(k)) else accuracy for k in ("low", "high"))
            tip = f"{index}  {model}, {row.get('exits', '')}\naccuracy {cells['accuracy']}"
            tip += f"\nmean depth {cells['mean_depth']}"
            points[model].append(charts.Point(float(row["mean_depth"]), accuracy, low, high, str(index), tip))
    series = [(model, group) for model, group in points.items() if group]
    histogram = sorted(results.exit_histogram.items(), key=lambda item: _model_rank(item[0], order))
    trends = _trends(results, order)
    if series:
        plots.tradeoff(series, folder / "accuracy_depth.png")
    if histogram:
        plots.histogram(histogram, results.outcomes, folder / "exit_histogram.png")
    if trends:
        plots.scatter(trends, folder / "depth_entropy.png")
    return {
        "columns": COLUMNS,
        "table": table,
        "legend": [(charts.legend_mark(order[m]), m) for m, _ in series],
        "tradeoff": charts.tradeoff(series) if series else None,
        "histogram": charts.histogram(histogram, results.outcomes, results.num_layers) if histogram else None,
        "entropy": charts.scatter(trends) if trends else None,
        "entropy_legend": [(charts.legend_mark(t.series, t.rule), t.name) for t in trends],
        "correlations": _correlations(results.depth_by_entropy),
        "outcomes": results.outcomes,
        "num_layers": results.num_layers,
    }


def _trends(results: Results, order: dict[str, int]) -> list[charts.Trend]:
    """Each label that the evaluation or the kept answers have, models in order, a model's rules counted from 0."""
    points = entropy_points(results)
    labels = dict.fromkeys((*results.depth_by_entropy, *points))
    trends: list[charts.Trend] = []
    for label in sorted(labels, key=lambda name: _model_rank(name, order)):
        bins = stored_bins(results, label) or binned(points.get(label, []))
        if bins:
            series = _model_rank(label, order)
            rule = sum(t.series == series for t in trends)
            trends.append(charts.Trend(series, rule, label, points.get(label, []), bins))
    return trends


def _model_rank(label: str, order: dict[str, int]) -> int:
    return next((rank for model, rank in order.items() if label.startswith(model)), len(order))


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
            lines.append((label, ", ".join(f"{k} {charts.number(v) if _is_number(v) else v}" for k, v in scalars)))
    return lines


def _training(stage: Stage, folder: Path) -> dict[str, Any]:
    names = sorted(stage.curves, key=lambda n: LEADING.index(n) if n in LEADING else len(LEADING))
    ordered = {name: stage.curves[name] for name in names}
    plots.training(ordered, folder / f"training_{stage.name}.png")
    panels = []
    for name, points in ordered.items():
        last = next(value for _, value in reversed(points) if math.isfinite(value))
        shown = name.replace("_", " ")
        panels.append({"name": shown, "last": charts.number(last), "chart": charts.curve(shown, points)})
    return {"name": stage.name, "steps": max(s for points in ordered.values() for s, _ in points), "panels": panels}


def _problems(results: Results) -> list[dict[str, Any]]:
    """Answers grouped by prompt, one column per model in the method's order, its exit rules one below the other."""
    order = {model: index for index, model in enumerate(results.models)}
    grouped: dict[str, list[dict[str, Any]]] = {}
    for answer in results.answers:
        grouped.setdefault(str(answer.get("prompt", "")), []).append(answer)
    problems = []
    for prompt, answers in grouped.items():
        answers.sort(key=lambda a: order[str(a.get("model", ""))])
        columns: dict[str, list[dict[str, Any]]] = {}
        for a in answers:
            columns.setdefault(str(a.get("model", "")), []).append(_answer(a, results, order))
        heading = prompt if len(prompt) <= PROMPT_SHOWN else "… " + prompt[-PROMPT_SHOWN:].lstrip()
        problems.append(
            {
                "heading": heading,
                "prompt": prompt,
                "reference": answers[0].get("reference", ""),
                "columns": list(columns.values()),
            }
        )
    # Prompts that every model answered first: they are the comparison.
    return sorted(problems, key=lambda p: -len(p["columns"]))


def _answer(answer: Mapping[str, Any], results: Results, order: dict[str, int]) -> dict[str, Any]:
    tokens = answer.get("tokens") or []
    depths = [t["depth"] for t in tokens if _is_number(t.get("depth"))]
    mean = f"{sum(depths) / len(depths) / results.num_layers:.2f}" if depths else "–"
    model = str(answer.get("model", ""))
    return {
        "model": model,
        "mark": charts.legend_mark(order[model]),
        "exits": answer.get("exits", ""),
        "correct": answer.get("correct"),
        "mean": mean,
        "text": answer.get("text", ""),
        "tokens": [_token(token, results) for token in tokens],
    }


def _token(token: Mapping[str, Any], results: Results) -> dict[str, Any]:
    depth = token.get("depth")
    index = min(range(len(results.outcomes)), key=lambda i: abs(results.outcomes[i] - (depth or results.num_layers)))
    lines = [f"depth {depth if depth is not None else '–'} of {results.num_layers}"]
    for key, name in (("logprob", "probability"), ("exit_logprob", "exit probability")):
        if _is_number(token.get(key)):
            lines.append(f"{name} {math.exp(token[key]):.3f}")
    if _is_number(token.get("entropy")):
        lines.append(f"entropy {token['entropy']:.3f} nats")
    text = str(token.get("text", ""))
    visible = text.replace("\n", "↵\n").replace("\t", "⇥\t") or "∅"
    return {"text": visible, "index": index, "tip": f"{json.dumps(text, ensure_ascii=False)}\n" + "\n".join(lines)}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    return str(value)

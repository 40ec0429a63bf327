"""The report's sections behind the results: runs, tasks, thresholds and gates, controls, depth, externalisation.

Each is built from one part of results.json and is None where that part is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import charts
from .charts import Axes, Chart, Dot, Effect, Line
from .data import Inputs, ReportRun
from .numbers import estimate, number, or_nan
from .results import Results
from .svg import legend_mark
from .tables import (
    TextTable,
    controls_table,
    correlation_table,
    depth_table,
    externalisation_table,
    task_table,
)


@dataclass
class ReportSection:
    """What stands under one heading. `tables`: caption and table each."""

    name: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[tuple[str, TextTable]] = field(default_factory=list)


def sections(inputs: Inputs, runs: Sequence[ReportRun]) -> list[ReportSection]:
    """Those that there is something to show in."""
    results = inputs.results
    made = (
        _runs(inputs, runs),
        _tasks(results),
        _exits(results),
        _controls(inputs),
        _depth(results),
        _externalisation(results),
    )
    return [section for section in made if section is not None]


def _drawn(name: str, title: str, lines: Sequence[Line], axes: Axes, note: str) -> Chart | None:
    """None if there is nothing to draw."""
    if not lines:
        return None
    legend = [(legend_mark(line.series, line.rule), line.name) for line in lines if line.joined]
    return Chart(name, title, charts.lines(lines, axes, title), note, legend)


def _present(*found: Chart | None) -> list[Chart]:
    return [chart for chart in found if chart is not None]


# ---- several runs ----


def _runs(inputs: Inputs, runs: Sequence[ReportRun]) -> ReportSection | None:
    if len(runs) < 2:
        return None
    section = ReportSection("runs", "Runs")
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(run.label, *(run.settings.get(key, "–") for key in keys)) for run in runs]
    section.tables.append(("Settings in which the runs differ", TextTable(("run", *keys), rows, names=1 + len(keys))))
    chosen = [(label, row) for label, found in inputs.by_run if (row := found.last_chosen()) is not None]
    seeds = _over_seeds(chosen, runs)
    if seeds.rows:
        section.tables.append((_SEEDS_NOTE, seeds))
    dots = [replace(_row_dot(row, label), word=label) for label, row in chosen]
    if len(dots) > 1:
        front = _front(dots)
        lines = [Line(2, 0, "not beaten by another run", front), Line(2, 0, "beaten", _rest(dots, front), joined=False)]
        note = "One mark per run: its last model at the threshold that validation chose. 95 % intervals; noise alone "
        note += "puts runs on a front."
        axes = Axes("mean depth (fraction of the layers)", "accuracy", percent_y=True)
        section.charts = _present(_drawn("front_runs", "Front over runs", lines, axes, note))
    return section


_SEEDS_NOTE = (
    "Runs that differ in seeds only: the last model at its chosen threshold, mean over runs, least and greatest. The "
    "spread of training; the intervals above are of problems."
)


def _over_seeds(chosen: Sequence[tuple[str, Mapping[str, Any]]], runs: Sequence[ReportRun]) -> TextTable:
    """One row per group of at least two runs with the same settings but for seeds."""
    settings = {run.label: run.settings for run in runs}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for label, row in chosen:
        rest = {k: v for k, v in settings[label].items() if k.rsplit(".", 1)[-1] != "seed"}
        if len(rest) < len(settings[label]):
            groups.setdefault(", ".join(f"{k}={v}" for k, v in rest.items()) or "all runs", []).append(row)
    forms = {"accuracy": "{:.1%}", "mean_depth": "{:.3f}", "total_depth": "{:.0f}", "length": "{:.1f}"}
    rows = [
        (name, str(len(group)), *(_spread([row[key] for row in group], form) for key, form in forms.items()))
        for name, group in groups.items()
        if len(group) > 1
    ]
    return TextTable(("settings", "runs", *(key.replace("_", " ") for key in forms)), rows)


def _spread(values: Sequence[float], form: str) -> str:
    return estimate({"value": sum(values) / len(values), "low": min(values), "high": max(values)}, form)


def _row_dot(row: Mapping[str, Any], head: str) -> Dot:
    tip = f"{head}\n{row.get('exits', '')}\naccuracy {row['accuracy']:.1%}, mean depth {row['mean_depth']:.3f}"
    return Dot(row["mean_depth"], row["accuracy"], or_nan(row.get("low")), or_nan(row.get("high")), tip)


def _front(dots: Sequence[Dot]) -> list[Dot]:
    """Those that none beats (no deeper, no less accurate, and better in one), by depth."""
    kept = [
        d for d in dots if not any(o.x <= d.x and o.y >= d.y and (o.x < d.x or o.y > d.y) for o in dots if o is not d)
    ]
    return sorted(kept, key=lambda d: d.x)


def _rest(dots: Sequence[Dot], front: Sequence[Dot]) -> list[Dot]:
    return [d for d in dots if not any(d is f for f in front)]


# ---- tasks ----


def _tasks(results: Results) -> ReportSection | None:
    if not results.by_task:
        return None
    note = "Accuracy with its 95 % interval (Wilson) and mean depth in layers, by task or family"
    return ReportSection("tasks", "Tasks", tables=[(note, task_table(results.in_order(results.by_task)))])


# ---- thresholds and gates ----


def _exits(results: Results) -> ReportSection | None:
    section = ReportSection("exits", "Thresholds and gates")
    section.charts = _present(_pareto(results), _reliability(results), _kl(results))
    gates = {model: found for model, found in results.gates.items() if found}
    if gates:
        section.tables.append((_GATES_NOTE, _gates_table(gates)))
    return section if section.charts or section.tables else None


def _pareto(results: Results) -> Chart | None:
    lines: list[Line] = []
    for model, entries in results.pareto.items():
        series = results.rank(model)
        dots = [_row_dot(e, f"{model}, validation") for e in entries]
        front = sorted((d for d, e in zip(dots, entries, strict=True) if e.get("front")), key=lambda d: d.x)
        lines += [Line(series, 0, model, front), Line(series, 0, model, _rest(dots, front), joined=False)]
    axes = Axes("mean depth (fraction of the layers)", "accuracy", percent_y=True)
    note = "One mark per hazard threshold, on the validation split; lines join those that none beats."
    return _drawn("pareto", "Fronts over thresholds", lines, axes, note)


def _reliability(results: Results) -> Chart | None:
    lines = []
    for model, found in results.gates.items():
        dots = [
            Dot(
                b["hazard"],
                b["target"],
                tip=f"{model}\nhazard {b['hazard']:.3f}, target {b['target']:.3f}\n{b['asked']:,} times",
            )
            for b in (found or {}).get("bins", [])
        ]
        if dots:
            lines.append(Line(results.rank(model), 0, model, dots))
    axes = Axes("hazard that the gate gave", "target hazard 1 − tanh(c·KL/2)", diagonal=True, unit=True)
    note = "Gates that follow their target lie on the dashed line; RL may move them off it on purpose."
    return _drawn("gates", "Gates: hazard against target", lines, axes, note)


def _kl(results: Results) -> Chart | None:
    lines: list[Line] = []
    for label, found in results.in_order(results.kl_by_exit).items():
        series = results.rank(label)
        dots = [
            Dot(
                float(depth), e["kl"], or_nan(e.get("low")), or_nan(e.get("high")),
                f"{label}\nexit at depth {depth}\nKL {e['kl']:.3g} nats, {e['tokens']:,} tokens",
            )
            for depth, e in sorted(found.items(), key=lambda item: int(item[0]))
        ]  # fmt: skip
        if len(dots) > 1:
            lines.append(Line(series, sum(line.series == series for line in lines), label, dots))
    positive = [d.y for line in lines for d in line.dots if d.y > 0]
    wide = bool(positive) and max(positive) / min(positive) > 30
    axes = Axes("exit depth (layers)", "KL to the teacher (nats)", log_y=wide)
    note = "Mean over the tokens that exited there; tokens aren't assigned to depths at random."
    return _drawn("kl_by_exit", "KL to the teacher by exit depth", lines, axes, note)


_GATES_NOTE = (
    "Calibration of the gates wherever one was asked: expected calibration error (10 bins) and mean absolute error "
    "against the target hazard, with 95 % intervals; then the error at each exit."
)


def _gates_table(gates: Mapping[str, Mapping[str, Any]]) -> TextTable:
    depths = sorted({int(e["depth"]) for found in gates.values() for e in found.get("exits", [])})
    rows = []
    for model, found in gates.items():
        at = {int(e["depth"]): e for e in found.get("exits", [])}
        per_exit = [f"{at[d]['ece']:.3f}" if d in at and at[d]["ece"] is not None else "–" for d in depths]
        errors = (estimate(found.get(key), "{:.3f}") for key in ("ece", "mean_error"))
        rows.append((model, *errors, f"{found['asked']:,}", *per_exit))
    return TextTable(("model", "ECE", "mean error", "asked", *(f"ECE at {d}" for d in depths)), rows)


# ---- controls ----

_CONTROLS_NOTE = (
    "The policy under test against exit rules that know less: each at the policy's mean depth, then with the "
    "least depth found at which validation gave it the policy's accuracy. (!): the depth, or the accuracy, was "
    "not reached, so that it is no comparison. p: McNemar's exact test."
)


def _controls(inputs: Inputs) -> ReportSection | None:
    section = ReportSection("controls", "Controls")
    found = [(run, results.controls) for run, results in inputs.by_run if results.controls]
    for index, (run, entries) in enumerate(found):
        section.tables.append((f"{run}. {_CONTROLS_NOTE}" if run else _CONTROLS_NOTE, controls_table(entries)))
        effects = [_effect(e) for e in entries if e["matched_by"] == "depth"]
        effects = [effect for effect in effects if math.isfinite(effect.value)]
        if effects:
            name = f"controls_{index}" if run else "controls"
            title = f"Policy minus control{f', {run}' if run else ''}"
            note = "Accuracy of the policy minus that of the control at equal mean depth, 95 % intervals."
            section.charts.append(Chart(name, title, charts.forest(effects), note))
    return section if section.tables else None


def _effect(entry: Mapping[str, Any]) -> Effect:
    d, row = entry["comparison"]["difference"], entry["row"]
    tip = f"{entry['control']}: {entry['exits']}\naccuracy {row['accuracy']:.1%} at depth {row['mean_depth']:.3f}"
    kept = bool(entry["within"])
    name = entry["control"] + ("" if kept else " (!)")
    return Effect(name, or_nan(d["value"]), or_nan(d["low"]), or_nan(d["high"]), kept, tip)


# ---- depth ----

_DEPTH_NOTE = (
    "Layers run per token: mean with its 95 % interval over answers, quantiles; then by kind of token, an "
    "answer's first left out. FLOPs of prompt and answer by the exits taken."
)
_CORRELATION_NOTE = (
    "Spearman's rank correlation of a token's depth with the teacher's entropy and with the token's surprisal, by"
    " kind of token; 95 % intervals, answers resampled."
)


def _depth(results: Results) -> ReportSection | None:
    section = ReportSection("depth", "Depth by kind of token")
    if results.depth:
        section.tables.append((_DEPTH_NOTE, depth_table(results.in_order(results.depth))))
    if results.depth_correlations:
        section.tables.append((_CORRELATION_NOTE, correlation_table(results.in_order(results.depth_correlations))))
    return section if section.tables else None


# ---- externalisation ----

_EXTERNALISATION_NOTE = (
    "How much of the reasoning is written down; 95 % intervals over answers. docs/evaluation.md has what each shows."
)


def _externalisation(results: Results) -> ReportSection | None:
    found = results.externalisation
    if not found:
        return None
    section = ReportSection("externalisation", "Externalisation")
    section.tables.append((_EXTERNALISATION_NOTE, externalisation_table(found)))
    section.charts = _present(_truncation(results), _probes(results))
    return section


def _truncation(results: Results) -> Chart | None:
    lines = []
    for model, found in results.externalisation.items():
        curve = found.get("truncation") or {}
        dots = [
            _estimate_dot(f, e, f"{model}\n{f:.0%} of the chain")
            for f, e in zip(curve.get("fractions", []), curve.get("same_answer", []), strict=True)
            if e["value"] is not None
        ]
        if dots:
            lines.append(Line(results.rank(model), 0, model, dots))
    axes = Axes("share of the chain that is kept", "same answer", unit=True)
    note = "Share of answers that are the same as after the whole chain."
    return _drawn("truncation", "Chain cut short", lines, axes, note)


def _probes(results: Results) -> Chart | None:
    depths = results.outcomes
    lines = []
    for model, found in results.externalisation.items():
        for rule, probe in enumerate(found.get("planning_probe") or []):
            if len(probe["uplift"]) != len(depths):
                continue
            name = f"{model}, {probe['ahead']} ahead"
            dots = [
                _estimate_dot(depth, e, f"{name}\ndepth {depth}")
                for depth, e in zip(depths, probe["uplift"], strict=True)
                if e["value"] is not None
            ]
            if dots:
                lines.append(Line(results.rank(model), rule, name, dots))
    axes = Axes("depth (layers)", "probe − n-gram (accuracy)")
    note = "What a linear map reads of later tokens, beyond what the text tells."
    return _drawn("planning_probe", "Planning probe", lines, axes, note)


def _estimate_dot(x: float, e: Mapping[str, Any], head: str) -> Dot:
    low, high = or_nan(e.get("low")), or_nan(e.get("high"))
    return Dot(x, e["value"], low, high, f"{head}\n{number(e['value'])} [{number(low)}, {number(high)}]")

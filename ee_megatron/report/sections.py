"""The report's sections behind the results: runs, tasks, styles, thresholds and gates, controls, depth, externalising,
time.

Each is built from one part of results.json, the last from RL's clocks, and is empty, and left out, where that is
missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from statistics import median
from typing import Any

from . import charts
from .charts import Axes, Chart, Dot, Effect, Line
from .data import Inputs, ReportRun
from .numbers import estimate, number, or_nan, pareto_front
from .results import Results
from .svg import legend_mark
from .tables import (
    TextTable,
    choice_tables,
    controls_table,
    correlation_table,
    depth_table,
    externalisation_table,
    phase_table,
    task_table,
    wide_table,
)

TRADEOFF = Axes("mean depth (fraction of the layers)", "accuracy", percent_y=True)


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
    made = [_tasks(results), _choice(inputs), _exits(results), _controls(inputs), _depth(results)]
    made += [_externalisation(results), _phases(inputs)]
    if len(runs) > 1:
        made.insert(0, _runs(inputs, runs))
    return [section for section in made if section.charts or section.tables]


def _drawn(name: str, title: str, lines: Sequence[Line], axes: Axes, note: str) -> list[Chart]:
    """One chart; [] if there is nothing to draw."""
    legend = [(legend_mark(line.series, line.rule), line.name) for line in lines if line.joined]
    return [Chart(name, title, charts.lines(lines, axes, title), note, legend)] if lines else []


def _runs(inputs: Inputs, runs: Sequence[ReportRun]) -> ReportSection:
    section = ReportSection("runs", "Runs")
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(run.label, *(run.settings.get(key, "–") for key in keys)) for run in runs]
    section.tables.append(("Settings in which the runs differ", TextTable(("run", *keys), rows, names=1 + len(keys))))
    chosen = [(label, row) for label, found in inputs.by_run if (row := found.last_chosen()) is not None]
    seeds = _over_seeds(chosen, runs)
    if seeds.rows:
        note = (
            "Runs that differ in seeds only: the last model at its chosen threshold, mean over runs, least and "
            "greatest. The spread of training; the intervals above are of problems."
        )
        section.tables.append((note, seeds))
    dots = [replace(_row_dot(row, label), word=label) for label, row in chosen]
    if len(dots) > 1:
        front = pareto_front((d.x for d in dots), (d.y for d in dots))
        lines = _front_lines(2, dots, front, "not beaten by another run", "beaten")
        note = "One mark per run: its last model at the threshold that validation chose. 95 % intervals; noise alone "
        note += "puts runs on a front."
        section.charts = _drawn("front_runs", "Front over runs", lines, TRADEOFF, note)
    return section


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


def _front_lines(series: int, dots: Sequence[Dot], front: Sequence[bool], name: str, beaten: str) -> list[Line]:
    """The dots of a front, joined by depth, and the others, loose; a name for each."""
    kept = sorted(compress(dots, front), key=lambda d: d.x)
    rest = [d for d, on in zip(dots, front, strict=True) if not on]
    return [Line(series, 0, name, kept), Line(series, 0, beaten, rest, joined=False)]


def _tasks(results: Results) -> ReportSection:
    section = ReportSection("tasks", "Tasks")
    if results.by_task:
        note = "Accuracy with its 95 % interval (Wilson) and mean depth in layers, by task or family"
        section.tables.append((note, task_table(results.in_order(results.by_task))))
    if results.wide:
        note = (
            "Problems on wide operands: accuracy with its 95 % interval (Wilson), mean depth (fraction of the layers), "
            "length in tokens; difference to the teacher with its 95 % interval over groups of problems that share "
            "operands, problems that only the teacher or only this model has right, groups, McNemar's exact p"
        )
        section.tables.append((note, wide_table(results.in_order(results.wide))))
    return section


def _choice(inputs: Inputs) -> ReportSection:
    section = ReportSection("choice", "Choice of style")
    for run, results in inputs.by_run:
        if results.choice:
            tables = [(f"{run}. {note}" if run else note, table) for note, table in choice_tables(results.choice)]
            section.tables += [(note, table) for note, table in tables if table.rows]
    return section


def _phases(inputs: Inputs) -> ReportSection:
    section = ReportSection("phases", "Where an RL step's time goes")
    for stage in inputs.stages:
        if stage.name != "rl" or "seconds_step" not in stage.timings:
            continue
        timings = {name: median(value for _, value in curve) for name, curve in stage.timings.items()}
        note = f"{stage.run + ': ' if stage.run else ''}median over {len(stage.timings['seconds_step'])} steps; FLOPs "
        note += "by the lengths and exits that there were, recomputation left out"
        if padding := stage.curves.get("padding"):
            note += f"; {median(value for _, value in padding):.1%} of the positions of micro-batches were padding"
        section.tables.append((note, phase_table(timings)))
    return section


def _exits(results: Results) -> ReportSection:
    drawn = [*_pareto(results), *_reliability(results), *_kl(results)]
    section = ReportSection("exits", "Thresholds and gates", drawn)
    gates = {model: found for model, found in results.gates.items() if found}
    if gates:
        note = (
            "Calibration of the gates wherever one was asked: expected calibration error (10 bins) and mean absolute "
            "error against the target hazard, with 95 % intervals; then the error at each exit."
        )
        section.tables.append((note, _gates_table(gates)))
    return section


def _pareto(results: Results) -> list[Chart]:
    lines: list[Line] = []
    for model, entries in results.pareto.items():
        dots = [_row_dot(e, f"{model}, validation") for e in entries]
        front = [bool(e.get("front")) for e in entries]
        lines += _front_lines(results.rank(model), dots, front, model, model)
    note = "One mark per hazard threshold, on the validation split; lines join those that none beats."
    return _drawn("pareto", "Fronts over thresholds", lines, TRADEOFF, note)


def _reliability(results: Results) -> list[Chart]:
    lines = []
    for model, found in results.gates.items():
        tip = "{}\nhazard {hazard:.3f}, target {target:.3f}\n{asked:,} times"
        dots = [Dot(b["hazard"], b["target"], tip=tip.format(model, **b)) for b in (found or {}).get("bins", [])]
        if dots:
            lines.append(Line(results.rank(model), 0, model, dots))
    axes = Axes("hazard that the gate gave", "target hazard 1 − tanh(c·KL/2)", diagonal=True, unit=True)
    note = "Gates that follow their target lie on the dashed line; RL may move them off it on purpose."
    return _drawn("gates", "Gates: hazard against target", lines, axes, note)


def _kl(results: Results) -> list[Chart]:
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


def _gates_table(gates: Mapping[str, Mapping[str, Any]]) -> TextTable:
    depths = sorted({int(e["depth"]) for found in gates.values() for e in found.get("exits", [])})
    rows = []
    for model, found in gates.items():
        at = {int(e["depth"]): e for e in found.get("exits", [])}
        per_exit = [f"{at[d]['ece']:.3f}" if d in at and at[d]["ece"] is not None else "–" for d in depths]
        errors = (estimate(found.get(key), "{:.3f}") for key in ("ece", "mean_error"))
        rows.append((model, *errors, f"{found['asked']:,}", *per_exit))
    return TextTable(("model", "ECE", "mean error", "asked", *(f"ECE at {d}" for d in depths)), rows)


def _controls(inputs: Inputs) -> ReportSection:
    section = ReportSection("controls", "Controls")
    caption = (
        "The policy under test against exit rules that know less: each at the policy's mean depth, then with the "
        "least depth found at which validation gave it the policy's accuracy. (!): the depth, or the accuracy, was "
        "not reached, so that it is no comparison. p: McNemar's exact test."
    )
    found = [(run, results.controls) for run, results in inputs.by_run if results.controls]
    for index, (run, entries) in enumerate(found):
        section.tables.append((f"{run}. {caption}" if run else caption, controls_table(entries)))
        effects = [_effect(e) for e in entries if e["matched_by"] == "depth"]
        effects = [e for e in effects if math.isfinite(e.value)]
        if effects:
            name = f"controls_{index}" if run else "controls"
            title = f"Policy minus control{f', {run}' if run else ''}"
            note = "Accuracy of the policy minus that of the control at equal mean depth, 95 % intervals."
            section.charts.append(Chart(name, title, charts.forest(effects), note))
    return section


def _effect(entry: Mapping[str, Any]) -> Effect:
    d, row = entry["comparison"]["difference"], entry["row"]
    tip = f"{entry['control']}: {entry['exits']}\naccuracy {row['accuracy']:.1%} at depth {row['mean_depth']:.3f}"
    kept = bool(entry["within"])
    name = entry["control"] + ("" if kept else " (!)")
    return Effect(name, or_nan(d["value"]), or_nan(d["low"]), or_nan(d["high"]), kept, tip)


def _depth(results: Results) -> ReportSection:
    section = ReportSection("depth", "Depth by kind of token")
    if results.depth:
        note = (
            "Layers run per token: mean with its 95 % interval over answers, quantiles; then by kind of token, an "
            "answer's first left out. FLOPs of prompt and answer by the exits taken."
        )
        section.tables.append((note, depth_table(results.in_order(results.depth))))
    if results.depth_correlations:
        note = (
            "Spearman's rank correlation of a token's depth with the teacher's entropy and with the token's surprisal, "
            "by kind of token; 95 % intervals, answers resampled."
        )
        section.tables.append((note, correlation_table(results.in_order(results.depth_correlations))))
    return section


def _externalisation(results: Results) -> ReportSection:
    section = ReportSection("externalisation", "Externalisation", [*_truncation(results), *_probes(results)])
    if results.externalisation:
        note = (
            "How much of the reasoning is written down; 95 % intervals over answers. "
            "docs/evaluation.md has what each shows."
        )
        section.tables.append((note, externalisation_table(results.externalisation)))
    return section


def _truncation(results: Results) -> list[Chart]:
    lines = []
    for model, found in results.externalisation.items():
        curve = found.get("truncation") or {}
        heads = {f: f"{model}\n{f:.0%} of the chain" for f in curve.get("fractions", [])}
        lines += _estimates(results.rank(model), 0, model, heads, curve.get("same_answer", []))
    axes = Axes("share of the chain that is kept", "same answer", unit=True)
    note = "Share of answers that are the same as after the whole chain."
    return _drawn("truncation", "Chain cut short", lines, axes, note)


def _probes(results: Results) -> list[Chart]:
    depths = results.outcomes
    lines = []
    for model, found in results.externalisation.items():
        for rule, probe in enumerate(found.get("planning_probe") or []):
            if len(probe["uplift"]) != len(depths):
                continue
            name = f"{model}, {probe['ahead']} ahead"
            heads = {float(depth): f"{name}\ndepth {depth}" for depth in depths}
            lines += _estimates(results.rank(model), rule, name, heads, probe["uplift"])
    axes = Axes("depth (layers)", "probe − n-gram (accuracy)")
    note = "What a linear map reads of later tokens, beyond what the text tells."
    return _drawn("planning_probe", "Planning probe", lines, axes, note)


def _estimates(
    series: int, rule: int, name: str, heads: Mapping[float, str], found: Sequence[Mapping[str, Any]]
) -> list[Line]:
    """A line of estimates, [] without any; `heads`: x and what its tooltip begins with."""
    dots = []
    for (x, head), e in zip(heads.items(), found, strict=True):
        if e["value"] is not None:
            low, high = or_nan(e.get("low")), or_nan(e.get("high"))
            tip = f"{head}\n{number(e['value'])} [{number(low)}, {number(high)}]"
            dots.append(Dot(x, e["value"], low, high, tip))
    return [Line(series, rule, name, dots)] if dots else []

"""The report's page: what there is of the runs, as sections of tables and charts, then answers, training and files."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from ..config.load import settings_of
from ..observe.rundir import write_atomic
from ..statistics import welch_interval
from . import figures, tables
from .answers import differences, grids, problems, shown_answer
from .inputs import Inputs, ReportRun, read_inputs, settings_label
from .numbers import estimate, is_number, number, pareto_front, span
from .plotting import stylesheet
from .results import MADE_BY
from .tables import TextTable
from .template import FOLDER, render, style

# The RL loop's own figures first, housekeeping after them.
LEADING = ("reward", "accuracy", "mean_depth", "total_depth", "length", "loss", "kl")
MEASURES = {"accuracy": "{:+.1%}", "depth": "{:+.3f}", "total_depth": "{:+.1f}", "length": "{:+.1f}"}
"""What models are compared by: depth as a share of the layers, total depth in layers, length in tokens."""
SPREAD = {"accuracy": "{:.1%}", "mean_depth": "{:.3f}", "total_depth": "{:.0f}", "length": "{:.1f}"}
FILES = {
    "results.json": "every figure of the evaluation",
    "answers.jsonl": "every answer, a line per problem",
    "lens.json": "what every exit would write, for a few answers",
    "table.txt": "the table as text",
    "metrics.jsonl": "a line per step",
    "timings.jsonl": "clocks, a line per step",
}
TITLES = {
    "verdict": "Verdict", "results": "Results", "runs": "Runs", "tasks": "Tasks", "choice": "Choice of style",
    "exits": "Thresholds and gates", "controls": "Controls", "depth": "Depth by kind of token",
    "externalisation": "Externalisation", "phases": "Where an RL step's time goes",
}  # fmt: skip
VERDICT = (
    "Held-out problems, each model at the exits that validation chose for it. Intervals: bootstrap over groups of "
    "problems; Welch's over steps for rollouts. They don't cover training runs with other seeds. p: McNemar, exact."
)
RESULTS = (
    "Held-out problems. p: McNemar's exact test against the teacher. Mean depth: layers per generated token as a share "
    "of all; total depth: layers per answer; length: tokens per answer; KL to the teacher per token."
)
CONTROLS = (
    "The policy against exit rules that know less, at its mean depth and at its accuracy on validation. "
    "(!): that was not reached, so that it is no comparison. p: McNemar, exact."
)
SEEDS = "Runs that differ in seeds only: the last model at its chosen threshold, mean over runs, least and greatest"
PHASE = "Median over steps; FLOPs by the lengths and exits that there were, recomputation left out"


class ReportSection(NamedTuple):
    """What stands under one heading. `tables`: caption and table each."""

    name: str
    title: str
    tables: list[tuple[str, TextTable]]
    charts: list[figures.ReportChart]


def write_report(runs: Sequence[ReportRun], output: Path) -> Path:
    """Write the report of one run or several to `output` (.html), its charts as PNG to plots/ beside it; returns
    `output`.

    What is missing of a run is named in the report. Raises ValueError if no stage's directory exists, or if runs of
    different numbers of layers are to be compared.
    """
    inputs, output = read_inputs(runs), Path(output)
    results, outcomes = inputs.results, inputs.outcomes
    parts, changes = sections(inputs, runs), differences(results, inputs.problems)
    scripts = ["page.js", *(["differences.js"] if changes else [])]
    meta, config = dict(results.meta), runs[0].config
    title = str(meta.pop("name", "") or (config.name if config else "Early-exit run"))
    settings = [(run.label, settings_of(run.config)) for run in runs if run.config is not None]
    page = render(
        FOLDER / "page.html.j2",
        style=style() + stylesheet(len(outcomes)),
        script=Markup("".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)),
        title=title if len(runs) == 1 else f"{len(runs)} early-exit runs",
        facts=[(str(key).replace("_", " "), _plain(value)) for key, value in meta.items()],
        coming=list(dict.fromkeys(stage for run in runs for stage in run.coming)),
        written=time.strftime("%Y-%m-%d %H:%M"),
        outcomes=outcomes,
        sections=parts,
        training=_training(inputs),
        rollouts=[(stage.run, kept["step"], kept["rollouts"]) for stage in inputs.stages for kept in stage.samples],
        shown=lambda answer: {**answer, **shown_answer(answer, outcomes)},
        problems=problems(results),
        lens=grids(inputs.lens, results),
        differences=changes,
        links=links(inputs, output),
        commands=[(label, shlex.join(["ee-megatron", "run", *words])) for label, words in settings if words],
        stages=[stage for stage in inputs.stages if stage.config],
        missing=inputs.missing,
    )
    folder = output.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for chart in (chart for section in parts for chart in section.charts):
        write_atomic(folder / f"{chart.name}.png", chart.png)
    write_atomic(output, page)
    return output


def sections(inputs: Inputs, runs: Sequence[ReportRun]) -> list[ReportSection]:
    """Those that there is something to show in."""
    results = inputs.results
    made = {name: ReportSection(name, title, [], []) for name, title in TITLES.items()}
    if (changes := verdict(inputs)).rows:
        made["verdict"].tables.append((VERDICT, changes))
    if results.rows:
        made["results"].tables.append((RESULTS, tables.results_table(results.sorted_rows(), results.paired)))
    for section, part, table, caption in tables.BY_MODEL:
        if found := {label: value for label, value in results.in_order(getattr(results, part)).items() if value}:
            made[section].tables.append((caption, table(found)))
    made["results"].charts.extend(figures.result_charts(results))
    made["exits"].charts.extend(figures.exit_charts(results))
    made["externalisation"].charts.extend(figures.externalisation_charts(results))
    for i, (run, of_run) in enumerate(inputs.by_run):
        before = f"{run}. " if run else ""
        choice = tables.choice_tables(of_run.choice) if of_run.choice else []
        made["choice"].tables.extend((before + caption, table) for caption, table in choice if table.rows)
        if of_run.controls:
            made["controls"].tables.append((before + CONTROLS, tables.controls_table(of_run.controls)))
            name, title = f"controls_{i}" if run else "controls", f"{before}Policy minus control"
            made["controls"].charts.extend(figures.forest(name, title, of_run.controls))
    for stage in inputs.stages:
        if stage.name == "rl" and "seconds_step" in stage.timings:
            timings = {name: median(value for _, value in curve) for name, curve in stage.timings.items()}
            caption = f"{stage.run + ': ' if stage.run else ''}{PHASE}"
            made["phases"].tables.append((caption, tables.phase_table(timings)))
    if len(runs) > 1:
        _compare_runs(made["runs"], inputs, runs)
    return [section for section in made.values() if section.charts or section.tables]


def verdict(inputs: Inputs) -> TextTable:
    """What changed from each model to the one before it, and of RL's rollouts over training: effect, 95 % interval, and
    whether that excludes zero."""
    results, rows = inputs.results, list[tuple[str, ...]]()
    by_label = {f"{row.get('model')}, {row.get('exits')}": row for row in results.rows}
    for label, found in results.in_order(results.compared).items():
        names, n = (label, str(found["against"])), str(found["n"])
        for measure, form in MEASURES.items():
            p = tables.cell(found, "p_value", "{:.2g}") if measure == "accuracy" else "–"
            rows.append((*names, measure.replace("_", " "), *_effect(found.get(measure) or {}, form), n, p))
        model = label.partition(", ")[0]
        full = next((name for name in (f"{model}, full depth", names[1]) if name in by_label), "")
        speed, whole = (by_label.get(name, {}).get("tokens_per_s") for name in (label, full))
        if is_number(speed) and is_number(whole) and whole > 0:
            rows.append((label, full, "tokens/s", f"{speed / whole:.2f}×", "–", "timed once", n, "–"))
    for stage in inputs.stages:
        depths = [value for _, value in stage.curves.get("mean_depth", [])] if stage.name == "rl" else []
        if (size := len(depths) // 4) > 1:
            change = welch_interval(depths[:size], depths[-size:])._asdict()
            names = (f"rollouts of RL's last {size} steps" + (f", {stage.run}" if stage.run else ""), "its first")
            rows.append((*names, "depth", *_effect(change, MEASURES["depth"]), "–", "–"))
    heads = ("", "against", "figure", "effect", "95 % interval", "status", "n", "p")
    return TextTable(heads, [row for row in rows if row[3] != "–"], names=3)


def _effect(change: Mapping[str, Any], form: str) -> tuple[str, str, str]:
    """Effect, interval, status."""
    value, low, high = (change.get(key) for key in ("value", "low", "high"))
    effect = form.format(value) if is_number(value) else "–"
    if not (is_number(low) and is_number(high)):
        return effect, "–", "no interval"
    status = "higher" if low > 0 else "lower" if high < 0 else "no measurable effect"
    return effect, f"[{form.format(low)}, {form.format(high)}]", status


def _compare_runs(section: ReportSection, inputs: Inputs, runs: Sequence[ReportRun]) -> None:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(run.label, *(run.settings.get(key, "–") for key in keys)) for run in runs]
    section.tables.append(("Settings in which the runs differ", TextTable(("run", *keys), rows, names=1 + len(keys))))
    chosen = {label: row for label, found in inputs.by_run if (row := found.last_chosen()) is not None}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key.rsplit(".", 1)[-1] != "seed"}
        if run.label in chosen and len(rest) < len(run.settings):
            groups.setdefault(settings_label(rest) or "all runs", []).append(chosen[run.label])
    spreads = [
        (name, str(len(group)), *(_spread([row[key] for row in group], form) for key, form in SPREAD.items()))
        for name, group in groups.items()
        if len(group) > 1
    ]
    if spreads:
        heads = ("settings", "runs", *(key.replace("_", " ") for key in SPREAD))
        section.tables.append((SEEDS, TextTable(heads, spreads)))
    points = [figures.row_point(row, label) for label, row in chosen.items()]
    if len(points) > 1:
        on_front = pareto_front((point.x for point in points), (point.y for point in points))
        lines = figures.front("not beaten by another run", 2, points, on_front)
        note = "One mark per run: its last model at the threshold that validation chose."
        section.charts.extend(
            figures.line_chart("front_runs", "Front over runs", lines, figures.DEPTH, figures.ACCURACY, note)
        )


def _spread(values: Sequence[float], form: str) -> str:
    """ "mean [least, greatest]"."""
    return estimate({"value": fmean(values), "low": min(values), "high": max(values)}, form)


def _training(inputs: Inputs) -> list[dict[str, Any]]:
    """Per stage that logged steps a small chart for each metric, the loop's own first; several runs share it.
    `constant`: (name, value) of metrics that never changed."""
    found, models = [], inputs.results.models
    makers = {stage: model for model, stages in MADE_BY.items() for stage in stages}
    for name in dict.fromkeys(stage.name for stage in inputs.stages if stage.curves):
        # In the colour of the model that the stage made; where that isn't in the results, by place.
        group = []
        for place, stage in enumerate(stage for stage in inputs.stages if stage.name == name):
            model = f"{makers.get(name)} ({stage.run})" if stage.run else makers.get(name)
            group.append((stage.run, models.index(model) if model in models else place, stage.curves))
        entry: dict[str, Any] = {"name": name, "runs": group, "panels": [], "constant": []}
        entry["steps"] = max(step for _, _, curves in group for points in curves.values() for step, _ in points)
        metrics = dict.fromkeys(metric for _, _, curves in group for metric in curves)
        for metric in sorted(metrics, key=lambda n: LEADING.index(n) if n in LEADING else len(LEADING)):
            lines = [(run, series, curves[metric]) for run, series, curves in group if metric in curves]
            last = [next(v for _, v in reversed(points) if math.isfinite(v)) for _, _, points in lines]
            shown, values = metric.replace("_", " "), {value for _, _, points in lines for _, value in points}
            if len(values) == 1 and max(len(points) for _, _, points in lines) > 1:
                entry["constant"].append((shown, number(last[0])))
            else:
                entry["panels"].append((shown, span(last, number), figures.training_curve(shown, lines)))
        found.append(entry)
    return found


def links(inputs: Inputs, output: Path) -> list[dict[str, str]]:
    """{"href", "name", "what"} of the files that the stages left, relative to the page."""
    found = []
    for stage in inputs.stages:
        for name, what in FILES.items():
            file = stage.directory / name
            if file.is_file():
                href = quote(Path(os.path.relpath(file.resolve(), output.parent.resolve())).as_posix())
                label = f"{stage.name}{f', {stage.run}' if stage.run else ''}: {name}"
                # A colon in the first part of a relative address would make it a scheme.
                found.append({"href": f"./{href}", "name": label, "what": what})
    return found


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)

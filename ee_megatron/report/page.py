"""The report's page: sections of tables and charts, then answers, training and files."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context

from ..config.load import settings_of
from ..config.schema import RunConfig
from ..observe.rundir import check_folder, write_atomic
from . import figures, tables
from .answers import differences, problems, shown_answer
from .inputs import Inputs, ReportRun, read_inputs, runs_in, settings_label, stages_of
from .results import pareto_front, report_path
from .tables import TextTable, cell, number

FOLDER = Path(__file__).parent
# The RL loop's own figures first, housekeeping after them.
LEADING = ("reward", "accuracy", "mean_depth", "total_depth", "length", "loss", "kl")
MEASURES = {"accuracy": "{:+.1%}", "depth": "{:+.3f}", "total_depth": "{:+.1f}", "length": "{:+.1f}"}
"""What models are compared by: depth as a share of the layers, total depth in layers, length in tokens."""
SPREAD = {"accuracy": "{:.1%}", "mean_depth": "{:.3f}", "total_depth": "{:.0f}", "length": "{:.1f}"}
FILES = ("results.json", "answers.jsonl", "table.txt", "metrics.jsonl", "timings.jsonl")
TITLES = {
    "verdict": "Verdict", "results": "Results", "runs": "Runs", "tasks": "Tasks", "choice": "Choice of style",
    "exits": "Thresholds and gates", "controls": "Controls", "depth": "Depth by kind of token",
    "externalisation": "Externalisation", "phases": "Where an RL step's time goes",
}  # fmt: skip
VERDICT = (
    "Held-out problems, each model at the exits that validation chose for it. Intervals: bootstrap over groups of "
    "problems; they don't cover training runs with other seeds. p: sign flips of these groups."
)
RESULTS = (
    "Held-out problems. p: sign flips of groups of problems, against the teacher. Mean depth: layers per generated "
    "token as a share of all; total depth: layers per answer; length: tokens per answer; KL to the teacher per token."
)
CONTROLS = (
    "The policy against exit rules with less information, at its mean depth and at its accuracy on validation. "
    "(!): not reached, so not comparable. p: sign flips of groups of problems."
)
SEEDS = "Runs that differ in seeds only: the last model at its chosen threshold, mean over runs, least and greatest"
PHASE = "Median over steps; FLOPs from measured lengths and exits, without recomputation"


class ReportSection(NamedTuple):
    """Content under one heading. `tables`: caption and table each."""

    title: str
    tables: list[tuple[str, TextTable]]
    charts: list[figures.ReportChart]


def style() -> Markup:
    """Style sheet of the report and of pages like it; without colours of series or depths."""
    return Markup((FOLDER / "page.css").read_text(encoding="utf-8"))


def render(template: Path, **context: Any) -> str:
    """Render a Jinja template, which may import from parts.html.j2. Its values are escaped unless they are Markup; a
    missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, FOLDER]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(context)


def report_run(cfg: RunConfig, coming: Sequence[str] = ()) -> Path:
    """Write report.html of one configuration, from the stages that exist. `coming`: stages that will finish later; with
    them there may be none. Raises ValueError if no stage exists otherwise."""
    folder = report_path(cfg).parent
    stages = stages_of(cfg, folder)
    if not stages and not coming:
        raise ValueError(f"{folder}: no stage has run with these settings; start with `ee-megatron run`")
    return write_report([ReportRun(stages, config=cfg, coming=coming)], report_path(cfg))


def report_directories(named: Sequence[Path], out: Path | None = None) -> Path:
    """Write one report of all runs in the directories (`inputs.runs_in`); `out` is by default report.html in the
    deepest directory that holds them all. Raises ValueError or FileNotFoundError."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out}: a directory; expected the name of a file to write")
    check_folder("--out", (out or named[0]).parent)
    runs, ends = runs_in(named)
    common = os.path.commonpath([end.parent.resolve() for end in ends])
    return write_report(runs, out or Path(common) / "report.html")


def write_report(runs: Sequence[ReportRun], output: Path) -> Path:
    """Write the report of one run or several to `output` (.html), its charts as PNG to plots/ beside it; returns
    `output`.

    What is missing of a run is named in the report. Raises ValueError if no stage's directory exists, or if runs of
    different numbers of layers are to be compared.
    """
    inputs, output = read_inputs(runs), Path(output)
    results, outcomes = inputs.results, inputs.outcomes
    with rc_context(figures.STYLE):
        parts, training = sections(inputs, runs), _training(inputs)
    changes = differences(results, inputs.problems)
    scripts = ["page.js", *(["differences.js"] if changes else [])]
    meta, config = dict(results.meta), runs[0].config
    title = str(meta.pop("name", "") or (config.name if config else "Early-exit run"))
    settings = [(run.label, settings_of(run.config)) for run in runs if run.config is not None]
    page = render(
        FOLDER / "page.html.j2",
        style=style() + figures.stylesheet(len(outcomes)),
        script=Markup("".join((FOLDER / name).read_text(encoding="utf-8") for name in scripts)),
        title=title if len(runs) == 1 else f"{len(runs)} early-exit runs",
        meta=meta,
        coming=list(dict.fromkeys(stage for run in runs for stage in run.coming)),
        written=time.strftime("%Y-%m-%d %H:%M"),
        outcomes=outcomes,
        sections=parts,
        training=training,
        rollouts=[(stage.run, step["step"], step["rollouts"]) for stage in inputs.stages for step in stage.samples],
        shown=lambda answer: shown_answer(answer, outcomes),
        problems=problems(results),
        differences=changes,
        links=links(inputs, output),
        commands=[(label, shlex.join(["ee-megatron", "run", *words])) for label, words in settings if words],
        stages=[stage for stage in inputs.stages if stage.config],
        missing=inputs.missing,
    )
    folder = output.parent / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for chart in (chart for section in parts.values() for chart in section.charts):
        write_atomic(folder / f"{chart.name}.png", chart.png)
    write_atomic(output, page)
    return output


def sections(inputs: Inputs, runs: Sequence[ReportRun]) -> dict[str, ReportSection]:
    """Sections with content, by name."""
    results = inputs.results
    made = {name: ReportSection(title, [], []) for name, title in TITLES.items()}
    if results.compared:
        made["verdict"].tables.append((VERDICT, verdict(results.compared)))
    if results.rows:
        made["results"].tables.append((RESULTS, tables.results_table(results.rows, results.paired)))
    for section, part, table, caption in tables.BY_MODEL:
        if entries := {label: value for label, value in getattr(results, part).items() if value}:
            made[section].tables.append((caption, table(entries)))
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
    return {name: section for name, section in made.items() if section.charts or section.tables}


def verdict(compared: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """Changes from one model to another as text: effect, 95 % interval, and whether that excludes zero."""
    rows = []
    for label, contrast in compared.items():
        for measure, form in MEASURES.items():
            effect, _, interval = cell(contrast, measure, form).partition(" ")
            low, high = (tables.or_nan((contrast.get(measure) or {}).get(end)) for end in ("low", "high"))
            status = "higher" if low > 0 else "lower" if high < 0 else "no measurable effect"
            p = cell(contrast, "p_value", "{:.2g}") if measure == "accuracy" else "–"
            figures_of = (effect, interval or "–", status if interval else "no interval", str(contrast["n"]), p)
            rows.append(
                (contrast.get("model", label), str(contrast["against"]), measure.replace("_", " "), *figures_of)
            )
    return TextTable(("", "against", "figure", "effect", "95 % interval", "status", "n", "p"), rows, names=3)


def _compare_runs(section: ReportSection, inputs: Inputs, runs: Sequence[ReportRun]) -> None:
    """The settings in which runs differ; figures over seeds; the runs' front."""
    settings = pd.DataFrame([run.settings for run in runs], index=[run.label for run in runs])
    rows = [tuple(map(str, row)) for row in settings.fillna("–").itertuples()]
    heads = ("run", *settings.columns)
    section.tables.append(("Settings in which the runs differ", TextTable(heads, rows, names=len(heads))))
    chosen = {label: row for label, results in inputs.by_run if (row := results.last_chosen()) is not None}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key.rsplit(".", 1)[-1] != "seed"}
        if run.label in chosen and len(rest) < len(run.settings):
            groups.setdefault(settings_label(rest) or "all runs", []).append(chosen[run.label])
    if spreads := [(name, pd.DataFrame(of_group)) for name, of_group in groups.items() if len(of_group) > 1]:
        columns = [(key.replace("_", " "), key, form) for key, form in SPREAD.items()]
        entries = []
        for name, of_group in spreads:
            values = of_group[list(SPREAD)].astype(float).agg(["mean", "min", "max"])
            values.index = pd.Index(["value", "low", "high"])
            entries.append(((name, str(len(of_group))), values.to_dict()))
        table = tables.figures_table(("settings", "runs"), entries, columns)
        section.tables.append((SEEDS, TextTable(table.heads, table.rows)))
    points = [figures.row_point(row, label) for label, row in chosen.items()]
    if len(points) > 1:
        on_front = pareto_front((point.x for point in points), (point.y for point in points))
        lines = figures.front("not beaten by another run", 2, points, on_front)
        note = "One mark per run: its last model at the threshold that validation chose."
        section.charts.extend(
            figures.line_chart("front_runs", "Front over runs", lines, figures.DEPTH, figures.ACCURACY, note)
        )


def _training(inputs: Inputs) -> list[dict[str, Any]]:
    """Per stage that logged steps a small chart for each metric, the loop's own first; several runs share it.
    `constant`: (name, value) of metrics that never changed."""
    charts = []
    for name in dict.fromkeys(stage.name for stage in inputs.stages if stage.curves):
        stages = [stage for stage in inputs.stages if stage.name == name]
        metrics = dict.fromkeys(metric for stage in stages for metric in stage.curves)
        panels, constant = [], []
        for metric in sorted(metrics, key=lambda n: LEADING.index(n) if n in LEADING else len(LEADING)):
            lines = {series: stage.curves[metric] for series, stage in enumerate(stages, 1) if metric in stage.curves}
            last = [next(v for _, v in reversed(points) if math.isfinite(v)) for points in lines.values()]
            shown, values = metric.replace("_", " "), [value for points in lines.values() for _, value in points]
            if len(set(values)) == 1 and len(values) > len(lines):
                constant.append((shown, number(last[0])))
            else:
                ends = dict.fromkeys(map(number, (min(last), max(last))))
                panels.append((shown, " to ".join(ends), figures.training_curve(f"{name}: {shown} over steps", lines)))
        steps = max(step for stage in stages for points in stage.curves.values() for step, _ in points)
        runs = [(stage.run, series) for series, stage in enumerate(stages, 1)]
        charts.append({"name": name, "runs": runs, "panels": panels, "constant": constant, "steps": steps})
    return charts


def links(inputs: Inputs, output: Path) -> list[tuple[str, str]]:
    """Address, relative to the page, and name of the stages' files."""
    entries = []
    for stage in inputs.stages:
        for file in (stage.directory / name for name in FILES if (stage.directory / name).is_file()):
            href = quote(Path(os.path.relpath(file.resolve(), output.parent.resolve())).as_posix())
            # A colon in the first part of a relative address would make it a scheme.
            entries.append((f"./{href}", f"{stage.name}{f', {stage.run}' if stage.run else ''}: {file.name}"))
    return entries

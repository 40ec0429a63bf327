"""`ee-megatron scaling fit | predict | check | compare | plot`: a table of runs in, fits or refusals out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import Parser
from .compare import compare
from .fit import METHODS
from .forecasting import add_check_options, add_predict_options, check, predict
from .inputs import (
    FittedGroup,
    column_names,
    compared_columns,
    fit_groups,
    read_rows,
    refuse_all,
    source,
)
from .isoflop_law import IsoFlopFit
from .page import PageSection, write_json, write_page, write_text
from .refusal import Refused
from .table import ColumnNames, RunTable
from .text import comparison_lines, fit_lines

MIN_BOOTSTRAP = 200
FIT = "L(N, D) = E + A/N^alpha + B/D^beta and isoFLOP minima, with 95 % intervals over runs and held-out errors"
PREDICT = (
    "loss of a size and token count, best size of a budget, or any metric of a run to come, with 95 % intervals; with "
    "--out a dated forecast that is not overwritten silently"
)
CHECK = "a forecast that predict wrote beside the runs made since: in its intervals or not, and by how much"
COMPARE = (
    "which form a metric follows: constant, linear, power law, saturating, logistic, with lambda; by held-out error"
)
PLOT = "the fits with bands, isoFLOP curves, Pareto fronts: PNG files and one HTML page"
EPILOG = """\
examples:
  ee-megatron scaling fit runs.csv --params N --tokens D --loss final_loss --out fits
  ee-megatron scaling predict runs.csv --at 7e9,1.4e11 --compute 1e22 --out forecast
  ee-megatron scaling predict runs.csv --metric mean_depth --against layers,params --at 16,786432 --out ahead
  ee-megatron scaling check ahead/predict.json later.csv
  ee-megatron scaling compare runs.parquet --metric mean_depth --against params,lambda
  ee-megatron scaling plot runs.csv --accuracy accuracy --depth mean_depth --out plots

A table has one row per measurement. docs/scaling.md: formulas, what the intervals mean, what is refused and why.
"""


def main(argv: Sequence[str]) -> int:
    """Run one sub-command; returns 0. Raises ValueError (Refused among them) or FileNotFoundError for what a user can
    put right."""
    given = _parser().parse_args(list(argv))
    if given.command == "check":
        return check(given)
    if given.bootstrap < MIN_BOOTSTRAP:
        raise ValueError(
            f"--bootstrap {given.bootstrap}: expected at least {MIN_BOOTSTRAP}, since a 2.5 % quantile of fewer "
            f"resamples rests on fewer than {MIN_BOOTSTRAP // 40} of them"
        )
    if given.seed < 0:
        raise ValueError(f"--seed {given.seed}: expected a number >= 0")
    return int(given.handler(given))


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="ee-megatron scaling",
        description="Scaling laws from a table of runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    fit = _add(commands, "fit", FIT, _fit)
    _add_fit(fit)
    predicting = _add(commands, "predict", PREDICT, predict)
    _add_fit(predicting)
    add_predict_options(predicting)
    checking = commands.add_parser("check", help=CHECK, description=CHECK)
    add_check_options(checking)
    _add_where(checking)
    checking.add_argument("--run", metavar="COL", help="runs, whose rows count once (default: the forecast's)")
    checking.add_argument("--out", type=Path, metavar="DIR", help="write the results there (default: beside FORECAST)")
    checking.set_defaults(command="check")
    comparing = _add(commands, "compare", COMPARE, _compare)
    _add_compare(comparing, required=True)
    plot = _add(commands, "plot", PLOT, _plot)
    _add_fit(plot)
    _add_compare(plot, required=False)
    plot.add_argument("--accuracy", metavar="COL", help="with --depth: Pareto fronts, one per size")
    plot.add_argument("--depth", metavar="COL", help="mean depth or exit fraction; less is better")
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, handler: Any
) -> argparse.ArgumentParser:
    # argparse fills in %(...)s in help texts, and leaves a description without %(prog) as it is.
    parser = commands.add_parser(name, help=text.replace("%", "%%"), description=text)
    parser.add_argument("table", type=Path, metavar="TABLE", help="a .csv or .parquet file, one row per measurement")
    _add_where(parser)
    parser.add_argument("--run", metavar="COL", help="runs, resampled as wholes (default: run; without it, rows)")
    parser.add_argument("--lambda", dest="penalty", metavar="COL", help="depth penalty; may be 0 (default: lambda)")
    parser.add_argument("--params", metavar="COL", help="parameters N (default: params)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of resamples and folds (default: 0)")
    needed = name == "plot"
    parser.add_argument("--out", type=Path, metavar="DIR", required=needed, help="write the results there as files")
    parser.set_defaults(handler=handler, command=name)
    return parser


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="use such rows only: status=finished, status!=failed, params<1e9, loss>=2 (may be repeated)",
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", metavar="COL", help="training tokens D (default: tokens)")
    parser.add_argument("--flops", metavar="COL", help="FLOPs C; D = C/(6N) without tokens (default: flops)")
    parser.add_argument("--loss", metavar="COL", help="loss in nats (default: loss)")
    parser.add_argument("--method", choices=[*METHODS, "all"], default="all", help="default: all")
    parser.add_argument("--budget", metavar="COL", help="isoflop: rows with one value of it are one compute budget")
    parser.add_argument(
        "--budget-within",
        type=float,
        metavar="SHARE",
        help="isoflop: a budget's FLOPs differ by this share at most (default: budgets end at gaps of a tenth)",
    )


def _add_compare(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--metric", metavar="COL", required=required, help="what is to be explained, e.g. mean_depth")
    parser.add_argument("--against", metavar="COL[,COL]", required=required, help="by what, e.g. params,lambda")


def write_results(given: argparse.Namespace, table: RunTable, runs: int, lines: list[str], data: dict[str, Any]) -> int:
    """Print `lines` below what they are of; with --out into files too, as text and `data` as JSON."""
    lines = [f"{table.name}: {len(table)} rows, {runs} runs", f"seed {given.seed}", *data["notes"], "", *lines]
    print("\n".join(lines))
    if given.out is not None:
        print(write_json(given.out / f"{given.command}.json", data))
        print(write_text(given.out / f"{given.command}.txt", lines))
    return 0


def _fit(given: argparse.Namespace) -> int:
    (table, chosen), columns = read_rows(given), column_names(given)
    groups, obs = fit_groups(given, table, columns)
    refuse_all(groups)
    lines: list[str] = []
    for name, part, outcomes, _ in groups:
        lines += [*([f"{name}: {len(part.loss)} rows, {part.run_count} runs"] if name else []), *fit_lines(outcomes)]
        lines.append("")
    data = {
        **source(given, table, [*chosen, *obs.notes]),
        "columns": {n: getattr(columns, n) for n in ("params", "tokens", "flops", "loss", "run")},
        "rows": len(table),
        "runs": obs.run_count,
        "groups": [
            {
                "group": name or "all rows",
                "rows": len(part.loss),
                "runs": part.run_count,
                "methods": {
                    method: {"refused": str(outcome)} if isinstance(outcome, Refused) else outcome.as_json()
                    for method, outcome in outcomes.items()
                },
            }
            for name, part, outcomes, _ in groups
        ],
    }
    return write_results(given, table, obs.run_count, lines[:-1], data)


def _compare(given: argparse.Namespace) -> int:
    table, chosen = read_rows(given)
    comparison = compare(table, column_names(given), given.metric, compared_columns(given), given.bootstrap, given.seed)
    data = {**comparison.as_json(), **source(given, table, [*chosen, *comparison.notes])}
    return write_results(given, table, int(comparison.runs.max()) + 1, comparison_lines(comparison), data)


def _plot(given: argparse.Namespace) -> int:
    (table, chosen), columns = read_rows(given), column_names(given)
    if (given.accuracy is None) != (given.depth is None) or (given.metric is None) != (given.against is None):
        raise ValueError("--accuracy and --depth, --metric and --against: found one of a pair; give both or neither")
    other = given.accuracy is not None or given.metric is not None
    sections: list[PageSection] = []
    notes: Sequence[str] = ()
    # A table without losses can still have fronts and metrics; asked for nothing else, its missing loss is the error.
    if columns.loss in table.columns or "loss" in columns.given or not other:
        groups, obs = fit_groups(given, table, columns)
        if not other:
            refuse_all(groups)
        sections, notes = _law_sections(groups), obs.notes
    if given.accuracy is not None:
        sections.append(_pareto_section(given, table, columns))
    if given.metric is not None:
        sections.append(_metric_section(given, table, columns))
    facts = [f"{table.name}: {len(table)} rows", f"seed {given.seed}", *chosen, *notes]
    print(write_page(given.out, table.name, facts, sections))
    return 0


def _law_sections(groups: Sequence[FittedGroup]) -> list[PageSection]:
    # matplotlib takes a second to load; fit and compare don't need it.
    from . import figures

    sections = []
    for index, (name, obs, outcomes, _) in enumerate(groups):
        label, suffix = (f", {name}", f"_{index}") if name else ("", "")
        pictures = []
        for outcome in outcomes.values():
            if not isinstance(outcome, Refused):
                draw: Any = figures.isoflop if isinstance(outcome, IsoFlopFit) else figures.loss_law
                picture = draw(outcome, obs, label)
                pictures.append(picture._replace(name=picture.name + suffix))
        sections.append(PageSection(f"Loss law{label}", fit_lines(outcomes), pictures))
    return sections


def _pareto_section(given: argparse.Namespace, table: RunTable, columns: ColumnNames) -> PageSection:
    from . import figures

    accuracy = table.numbers(given.accuracy, "--accuracy")
    depth = table.numbers(given.depth, "--depth")
    sizes, rows = ["all runs"] * len(table), np.arange(len(table))
    if columns.params in table.columns or "params" in columns.given:
        params = table.numbers(columns.params, "--params", positive=True)
        sizes = [f"{size:.3g} parameters" for size in params]
        rows = np.argsort(params, kind="stable")
    names = (given.accuracy, given.depth)
    picture = figures.pareto(accuracy[rows], depth[rows], [sizes[i] for i in rows], names)
    return PageSection(f"{given.accuracy} against {given.depth}", [picture.caption], [picture])


def _metric_section(given: argparse.Namespace, table: RunTable, columns: ColumnNames) -> PageSection:
    from . import figures

    title = f"{given.metric} against {given.against}"
    try:
        comparison = compare(table, columns, given.metric, compared_columns(given), given.bootstrap, given.seed)
    except Refused as refusal:
        return PageSection(title, [f"refused: {refusal}"], [])
    pictures = [figures.metric(comparison, column) for column in range(len(comparison.feats.names))]
    return PageSection(title, comparison_lines(comparison), pictures)

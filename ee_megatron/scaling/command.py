"""`ee-megatron scaling fit | predict | check | compare | plot`: fit a table of runs, or refuse with the reason."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from .. import __version__
from ..arguments import Parser
from ..observe.rundir import check_folder, write_atomic
from ..report.results import strict_json
from .bootstrap import Refused
from .compare import FormComparison, compare
from .forecast import check_forecast, forecast_losses, forecast_metric, forecast_optimum, read_forecast
from .laws import ScalingFit, fit_isoflop, fit_loss_law
from .table import RunTable, observations, read_table

MIN_BOOTSTRAP, MAX_BOOTSTRAP = 200, 10**5
METHODS = {"huber": fit_loss_law, "isoflop": fit_isoflop}
HELP = {
    "fit": "fit L(N, D) = E + A/N^alpha + B/D^beta and isoFLOP minima, with 95 %% intervals over runs",
    "predict": "forecast a planned run's loss or other metric, or the best model size for a compute budget",
    "check": "compare a stored forecast with later runs: are they within its intervals?",
    "compare": "compare forms of a metric (constant, linear, power law, logistic, with lambda) by held-out error",
    "plot": "draw fits with confidence bands, isoFLOP curves, a metric with its best form: PNG files",
}
EPILOG = """\
examples:
  ee-megatron scaling fit runs.csv --params N --tokens D --loss final_loss --out fits
  ee-megatron scaling predict runs.csv --at 7e9,1.4e11 --compute 1e22 --out forecast
  ee-megatron scaling predict runs.csv --metric mean_depth --against layers,params --at 16,786432 --out ahead
  ee-megatron scaling check ahead/predict.json later.csv
  ee-megatron scaling compare runs.parquet --metric mean_depth --against params,lambda
  ee-megatron scaling plot runs.csv --metric mean_depth --against params,lambda --out plots

A table has one row per measurement. docs/scaling.md: formulas, what the intervals mean, what is refused and why.
"""
Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run one sub-command; returns 0. Raises ValueError (Refused included) or FileNotFoundError for user errors."""
    given = _parser().parse_args(list(argv))
    if not MIN_BOOTSTRAP <= given.bootstrap <= MAX_BOOTSTRAP or given.seed < 0:
        wanted = f"expected {MIN_BOOTSTRAP} (for a 2.5 % quantile) to {MAX_BOOTSTRAP} resamples, and a seed >= 0"
        raise ValueError(f"--bootstrap {given.bootstrap}, --seed {given.seed}: {wanted}")
    if (given.metric is None) != (given.against is None) or (given.command == "compare" and given.metric is None):
        raise ValueError(f"{given.command}: found not both of --metric and --against; expected both")
    if given.command == "plot" and given.out is None:
        raise ValueError("plot: found no --out; expected a directory for the pictures")
    check_folder("--out", given.out or ".")
    whole = read_table(given.table)
    table = whole.where(given.where)
    used = {name: value for name, value in vars(given).items() if name not in ("handler", "command", "table", "out")}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in used.items()}
    rows = f"{table.name}: {len(table.frame)} of {len(whole.frame)} rows, seed {given.seed}"
    result = given.handler(given, table)
    source = {"table": table.name, "sha256": whole.digest, "options": options}
    _write(given, {**source, **result, "notes": [rows, *result["notes"]]})
    return 0


def _parser() -> argparse.ArgumentParser:
    rows, draws, metric, laws, check, predict = (Parser(add_help=False) for _ in range(6))
    where = "use only rows with status=finished, status!=failed, params<1e9, loss>=2, ... (repeatable)"
    rows.add_argument("table", type=Path, metavar="TABLE", help="a .csv or .parquet file, one row per measurement")
    rows.add_argument("--where", action="append", default=[], metavar="CONDITION", help=where)
    rows.add_argument("--run", metavar="COL", help="column of runs, resampled whole (default: run, else each row)")
    rows.add_argument("--out", type=Path, metavar="DIR", help="write the results there as files")
    draws.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="bootstrap resamples (default: 1000)")
    draws.add_argument("--seed", type=int, default=0, help="seed of resamples and folds (default: 0)")
    metric.add_argument("--metric", metavar="COL", help="column to explain, e.g. mean_depth")
    metric.add_argument("--against", metavar="COL[,COL]", help="columns that explain it, e.g. params,lambda")
    metric.add_argument("--lambda", metavar="COL", help="column of --against that may be 0 (default: lambda)")
    for option in ("params", "tokens", "flops", "loss"):
        laws.add_argument(f"--{option}", metavar="COL", help=f"column of {option} (default: {option})")
    laws.add_argument("--method", choices=[*METHODS, "all"], default="all", help="how to fit (default: all)")
    laws.add_argument("--budget", metavar="COL", help="isoflop: column of compute budgets")
    at = "a planned run: parameters and tokens, or with --metric a value for each column of --against"
    predict.add_argument("--at", action="append", default=[], metavar="N,D", help=at)
    predict.add_argument("--compute", action="append", default=[], metavar="C", help="a planned compute budget, FLOPs")
    predict.add_argument("--again", action="store_true", help="replace the forecast in --out")
    check.add_argument("forecast", type=Path, metavar="FORECAST", help="predict.json, as predict wrote it")
    check.add_argument("--within", type=float, default=0.01, help="relative distance from a point (default: 0.01)")
    form = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = Parser(prog="ee-megatron scaling", formatter_class=form, epilog=EPILOG)
    parser.description = "Fit scaling laws to a table of runs."
    # For commands that don't have these options.
    parser.set_defaults(bootstrap=MIN_BOOTSTRAP, seed=0, metric=None, against=None)
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for handler, parents in (
        (_fit, [rows, draws, laws]),
        (_predict, [rows, draws, laws, metric, predict]),
        (_check, [check, rows]),
        (_compare, [rows, draws, metric]),
        (_plot, [rows, draws, laws, metric]),
    ):
        name = handler.__name__[1:]
        one = commands.add_parser(name, help=HELP[name], description=HELP[name].replace("%%", "%"), parents=parents)
        one.set_defaults(command=name, handler=handler)
    return parser


def _fits(
    given: argparse.Namespace, table: RunTable
) -> tuple[pd.DataFrame, dict[str, ScalingFit], dict[str, str], list[str]]:
    """What the laws are fitted to, each method's fit, why others were refused, and notes. Raises Refused with every
    reason in one line if nothing was fitted."""
    obs, notes = observations(table, vars(given))
    fits, refused = dict[str, ScalingFit](), dict[str, str]()
    for method in METHODS if given.method == "all" else (given.method,):
        try:
            fits[method] = METHODS[method](obs, given.bootstrap, given.seed)
        except Refused as refusal:
            refused[method] = str(refusal)
    if not fits:
        raise Refused(" | ".join(f"{method}: {reason}" for method, reason in refused.items()))
    return obs, fits, refused, notes


def _against(given: argparse.Namespace) -> list[str]:
    penalty = vars(given)["lambda"]
    names = given.against.split(",")
    names += [penalty] if penalty and penalty not in names else []
    if not all(names) or len(set(names)) < len(names) or given.metric in names:
        raise ValueError(f"--against {given.against}: expected one or more different columns other than the metric's")
    return names


def _comparison(given: argparse.Namespace, table: RunTable) -> FormComparison:
    return compare(table, vars(given), given.metric, _against(given), given.bootstrap, given.seed)


def _fit(given: argparse.Namespace, table: RunTable) -> Result:
    _, fits, refused, notes = _fits(given, table)
    laws = {method: {**fit.details, "parameters": fit.table, "budgets": fit.budgets} for method, fit in fits.items()}
    return {**laws, "refused": refused, "notes": notes}


def _compare(given: argparse.Namespace, table: RunTable) -> Result:
    forms = _comparison(given, table)
    shown = [] if forms.best == "constant" else [forms.best, *forms.near]
    slopes = {f"slopes of {name}, {forms.fits[name][0].formula}": forms.slopes(name) for name in shown}
    return {"forms": forms.forms, **slopes, "refused": forms.refused, "verdict": forms.verdict(), "notes": forms.notes}


def _predict(given: argparse.Namespace, table: RunTable) -> Result:
    names = ["params", "tokens"] if given.metric is None else _against(given)
    points = [_numbers("--at", text, names, vars(given)["lambda"] or "lambda") for text in given.at]
    budgets = [_numbers("--compute", text, ["FLOPs"])[0] for text in given.compute]
    if not (points or budgets) or (given.metric is not None and budgets):
        raise ValueError(f"predict: expected --at {','.join(names)}, or without --metric --compute C, once or more")
    # Before anything is fitted: a refusal should not take a minute.
    if given.out and (given.out / "predict.json").exists() and not given.again:
        raise ValueError(f"{given.out}: holds a forecast already; give another --out, or --again to replace it")
    forecasts, refused = [], dict[str, str]()
    if given.metric is not None:
        comparison = _comparison(given, table)
        notes = [*comparison.notes, comparison.verdict()]
        forecasts += [one for point in points for one in forecast_metric(comparison, point)]
    else:
        obs, fits, refused, notes = _fits(given, table)
        if "huber" in fits:
            forecasts += forecast_losses(fits["huber"], obs, points, given.seed)
        forecasts += [forecast_optimum(method, fit, obs, flops) for method, fit in fits.items() for flops in budgets]
    if not forecasts:
        raise Refused(
            f"no law of losses for --at ({refused.get('huber', '')}); expected --compute beside isoflop alone"
        )
    made = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "ee_megatron": __version__}
    return {**made, "forecasts": pd.DataFrame(forecasts), "refused": refused, "notes": notes}


def _numbers(option: str, text: str, names: Sequence[str], may_be_zero: str = "") -> list[float]:
    values = pd.to_numeric(pd.Series(text.split(",")), errors="coerce").tolist()
    good = [0 < x < math.inf or (x == 0 and name == may_be_zero) for name, x in zip(names, values, strict=False)]
    if len(values) != len(names) or not all(good):
        raise ValueError(f"{option} {text}: expected {', '.join(names)} as numbers above 0, e.g. 7e9")
    return [float(value) for value in values]


def _check(given: argparse.Namespace, table: RunTable) -> Result:
    if not 0 <= given.within < 1:
        raise ValueError(f"--within {given.within:g}: expected a share from 0 to below 1, e.g. 0.01")
    stored = read_forecast(given.forecast)
    points, note = check_forecast(stored, table, given.run, given.within)
    given.out = given.out or given.forecast.parent
    return {"points": pd.DataFrame(points), "notes": [note, f"forecast of {stored['made']} from {stored['table']}"]}


def _plot(given: argparse.Namespace, table: RunTable) -> Result:
    # matplotlib takes a second to load; the other commands don't need it.
    from matplotlib import rc_context

    from ..report.figures import STYLE, figure_png
    from . import figures

    notes, refused = list[str](), dict[str, str]()
    # Powers of ten on logarithmic axes are set as formulas.
    with rc_context({**STYLE, "text.parse_math": True}):
        pictures = {"metric": figures.metric(_comparison(given, table))} if given.metric is not None else {}
        try:
            obs, fits, refused, notes = _fits(given, table)
            for method, fit in fits.items():
                pictures[method] = figures.loss_law(fit, obs) if method == "huber" else figures.isoflop(fit, obs)
        except ValueError as error:
            # A table of a metric need not have losses.
            if not pictures:
                raise
            notes.append(f"no law of losses: {error}")
        given.out.mkdir(parents=True, exist_ok=True)
        for name, drawn in pictures.items():
            write_atomic(given.out / f"{name}.png", figure_png(drawn))
    return {"pictures": [f"{name}.png" for name in pictures], "refused": refused, "notes": notes}


def _write(given: argparse.Namespace, result: Result) -> None:
    """Print a result; with --out write it, as text and as JSON, into files that appear whole."""
    text = "\n".join(_lines({name: value for name, value in result.items() if name not in ("options", "sha256")}))
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        # JSON last: a forecast exists once its JSON does.
        for kind, content in (
            ("txt", text),
            ("json", json.dumps(result, indent=2, ensure_ascii=False, default=_plain)),
        ):
            write_atomic(given.out / f"{given.command}.{kind}", content + "\n")
            print(given.out / f"{given.command}.{kind}")


def _plain(frame: pd.DataFrame) -> Any:
    """A frame as JSON has it: its rows by name, or in order where they have none."""
    return strict_json(frame.to_dict("records" if isinstance(frame.index, pd.RangeIndex) else "index"))


def _lines(result: Result) -> list[str]:
    """A result as text: frames as tables, everything else by name; empty parts are left out."""
    lines = []
    for name, value in result.items():
        if isinstance(value, pd.DataFrame):
            lines += [f"{name}:", value.map(_cell).to_string(), ""] if len(value) else []
        elif isinstance(value, dict):
            lines += [f"{name}:", *_lines(value), ""] if value else []
        else:
            lines += [f"{name}: {_cell(one)}" for one in (value if isinstance(value, list) else [value])]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    return "" if value is None or value != value else f"{value:.5g}" if isinstance(value, float) else str(value)

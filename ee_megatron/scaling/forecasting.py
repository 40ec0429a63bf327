"""`scaling predict` and `scaling check`: forecasts that are kept with their date, and what came of them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .check import check_forecast, check_lines
from .compare import Comparison, coefficients, compare
from .fit import LawFit
from .forecast import Forecast, forecast_lines, forecast_losses, forecast_metric, forecast_optima, noise_of
from .forecast_file import earlier, keep, load, options_of, row_digests
from .inputs import column_names, compared_columns, fit_groups, read_rows, refuse_all, source
from .page import write_json, write_text
from .refusal import Refused
from .table import ColumnNames, RunTable, read_table

OF_LOSS_ONLY = ("tokens", "flops", "loss", "budget", "budget_within")


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="N,D",
        help="a run to come: its parameters and tokens; with --metric one value for each column of --against (may be "
        "repeated)",
    )
    parser.add_argument("--compute", action="append", default=[], metavar="C", help="FLOPs of a budget to come")
    parser.add_argument("--metric", metavar="COL", help="forecast this column, by the forms of compare, not the loss")
    parser.add_argument("--against", metavar="COL[,COL]", help="with --metric: by what, e.g. layers,params")
    parser.add_argument("--again", action="store_true", help="replace the forecast that --out holds")


def predict(given: argparse.Namespace) -> int:
    """Handler of `scaling predict`."""
    columns = column_names(given)
    against = _read_points(given)
    whole, (table, chosen) = read_table(given.table), read_rows(given)
    options = options_of(given)
    # Before anything is fitted: a refusal should not take a minute.
    known = None if given.out is None or given.again else earlier(given.out, table.digest, options)
    if given.metric is not None:
        lines, data = _of_metric(given, table, columns, against, chosen)
        compared = [*against, given.metric]
    else:
        lines, data = _of_losses(given, table, columns, chosen)
        compared = [columns.params, columns.tokens if columns.tokens in table.columns else columns.flops, columns.loss]
        compared += [columns.penalty] * ("penalty" in columns.given)
    compared += [columns.run] * (columns.run in table.columns)
    data |= {"options": options, "row_columns": compared, "rows": row_digests(whole, compared)}
    print("\n".join(lines))
    if given.out is not None:
        print("\n".join(keep(given.out, lines, data, known)))
    return 0


def _read_points(given: argparse.Namespace) -> tuple[str, ...]:
    """Check the options against one another and turn --at and --compute into numbers, in place; returns the columns of
    --against. Raises ValueError."""
    if (given.metric is None) != (given.against is None):
        raise ValueError("--metric and --against: found one of them; give both or neither")
    if given.metric is None:
        if not given.at and not given.compute:
            raise ValueError("predict: found nothing to predict; expected --at N,D or --compute C, each once or more")
        given.at = [_point(text, ("parameters", "tokens"), "7e9,1.4e11") for text in given.at]
        given.compute = [_number("--compute", text) for text in given.compute]
        return ()
    of_loss = [name for name in OF_LOSS_ONLY if getattr(given, name) is not None]
    of_loss += ["compute"] * bool(given.compute) + ["method"] * (given.method != "all")
    if of_loss:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in of_loss)
        raise ValueError(
            f"{names} with --metric: belong to the law of losses; leave out those, or --metric and --against"
        )
    against = compared_columns(given)
    if not given.at:
        raise ValueError(f"predict: found nothing to predict; expected --at {','.join(against)}, once or more")
    penalty = column_names(given).penalty
    given.at = [_point(text, against, ",".join(["8", "1e6", "0.5", "4"][: len(against)]), penalty) for text in given.at]
    return against


def _point(text: str, names: Sequence[str], example: str, may_be_zero: str = "") -> list[float]:
    parts = text.split(",")
    if len(parts) != len(names):
        expected = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        raise ValueError(
            f"--at {text}: found {len(parts)} value{'s' * (len(parts) != 1)}; expected {expected}, as in {example}"
        )
    return [_number("--at", part, name == may_be_zero) for name, part in zip(names, parts, strict=True)]


def _number(option: str, text: str, may_be_zero: bool = False) -> float:
    value = float(text) if re.fullmatch(r"\s*\d+\.?\d*(?:[eE][+-]?\d+)?\s*|\s*\.\d+\s*", text) else -1.0
    if not (0 < value < math.inf or (may_be_zero and value == 0)):
        raise ValueError(f"{option} {text!r}: expected a number {'>= 0' if may_be_zero else 'above 0'}, as in 7e9")
    return value


def _heading(given: argparse.Namespace, table: RunTable, runs: int, notes: Sequence[str]) -> list[str]:
    return [f"{table.name}: {len(table)} rows, {runs} runs", f"seed {given.seed}", *notes, ""]


def _of_losses(
    given: argparse.Namespace, table: RunTable, columns: ColumnNames, chosen: list[str]
) -> tuple[list[str], dict[str, Any]]:
    groups, obs = fit_groups(given, table, columns)
    refuse_all(groups)
    lines = _heading(given, table, obs.run_count, [*chosen, *obs.notes])
    results: list[dict[str, Any]] = []
    for group in groups:
        forecasts: list[Forecast] = []
        refused = [f"  {method}: refused: {o}" for method, o in group.outcomes.items() if isinstance(o, Refused)]
        for method, outcome in group.outcomes.items():
            if isinstance(outcome, LawFit) and given.at:
                forecasts += forecast_losses(method, outcome, group.obs, given.at, given.seed)
            if not isinstance(outcome, Refused):
                forecasts += forecast_optima(method, outcome, group.obs, given.compute)
        lines += [*([group.name] if group.name else []), *(forecast_lines(forecasts) if forecasts else []), *refused]
        under = {} if group.penalty is None else {"lambda": {columns.penalty: group.penalty}}
        results += [{"group": group.name or "all rows", **under, **one.as_json()} for one in forecasts]
    return lines, {**source(given, table, [*chosen, *obs.notes]), "forecasts": results}


def _of_metric(
    given: argparse.Namespace, table: RunTable, columns: ColumnNames, against: tuple[str, ...], chosen: list[str]
) -> tuple[list[str], dict[str, Any]]:
    comparison = compare(table, columns, given.metric, against, given.bootstrap, given.seed)
    notes = [*chosen, *comparison.notes]
    lines = _heading(given, table, int(comparison.runs.max()) + 1, notes)
    forecasts = [one for point in given.at for one in forecast_metric(comparison, point)]
    lines += forecast_lines(forecasts)
    results = [one.as_json() for one in forecasts]
    facts = _what_is_used(comparison)
    data = {**source(given, table, notes), "verdict": comparison.verdict(), "used": facts, "forecasts": results}
    return [*lines, f"  {comparison.verdict()}", *(f"  {fact}" for fact in facts)], data


def _what_is_used(comparison: Comparison) -> list[str]:
    """What the intervals rest on, and slopes that the runs do not determine."""
    facts = [f"intervals: resampled runs; a run's noise is the error of runs left out ({comparison.how})"]
    for result in (comparison.best, *comparison.near):
        noise, share = noise_of(result, comparison.values)
        size = f"{noise:.2%} of the value" if share else f"{noise:.4g}"
        slopes = coefficients(comparison, result)
        loose = [f"; slope of {name} {value['refused']}" for name, value in slopes.items() if "refused" in value]
        facts.append(f"{result.form.name}, {result.form.formula}: noise {size}{''.join(loose)}")
    return facts


def add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "forecast", type=Path, metavar="FORECAST", help="predict.json, as predict wrote it before the runs"
    )
    parser.add_argument("table", type=Path, metavar="TABLE", help="a .csv or .parquet file with the runs made since")
    parser.add_argument(
        "--within",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="a row is at the forecast's point if each column differs by this share at most (default: 0.01)",
    )


def check(given: argparse.Namespace) -> int:
    """Handler of `scaling check`; 0 whatever came of the forecast."""
    if not 0 <= given.within < 1:
        raise ValueError(f"--within {given.within:g}: expected a share from 0 to below 1, e.g. 0.01")
    stored = load(given.forecast)
    table, chosen = read_rows(given)
    result = check_forecast(stored, table, given.run, given.within)
    notes = [*chosen, *result["notes"]]
    facts = {"forecast": stored.path.name, "forecast_sha256": stored.digest, "made": stored.data["made"]}
    data = {
        **facts,
        "made_from": stored.data["table"],
        "table": table.name,
        "sha256": table.digest,
        **result,
        "notes": notes,
    }
    lines = [
        f"forecast of {stored.data['made']} from {stored.data['table']}, {table.name}: {len(table)} rows",
        *notes,
        "",
        *check_lines(result),
    ]
    print("\n".join(lines))
    out = given.forecast.parent if given.out is None else given.out
    print(write_text(out / "check.txt", lines))
    print(write_json(out / "check.json", data))
    return 0

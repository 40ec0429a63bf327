"""A forecast beside what was measured afterwards.

Shape suffix: R rows of the new table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .forecast import columns_text, interval_text, point_text
from .forecast_file import StoredForecast
from .inputs import column_names
from .intervals import BootstrapInterval
from .solver import Array
from .table import ColumnNames, RunTable, observations, run_index

INSIDE_LAW, INSIDE_RUN, FAILED = "held", "held within a run's noise", "FAILED"
MEANING = (
    f"{INSIDE_LAW}: the runs' mean lies in the interval of the law",
    f"{INSIDE_RUN}: outside that, in the interval of one run",
    f"{FAILED}: outside both",
    "errors: mean less forecast, in half-widths of the interval before them",
)


def check_forecast(stored: StoredForecast, table: RunTable, run: str | None, within: float) -> dict[str, Any]:
    """Each forecast of a run beside the rows of `table` at its point, `within` a share of each of its columns. `run`
    names the column of runs, the forecast's own without it.

    Raises ValueError where the table lacks a column, and where no row lies at any point but those that the forecast's
    table had.
    """
    columns = _columns(stored, run)
    compared = [columns.run if name == _own_run(stored) else name for name in stored.data["row_columns"]]
    for name in compared:
        if name not in table.columns:
            raise ValueError(
                f"{table.name}: no column {name!r}; expected the columns of the forecast, {', '.join(compared)}; there "
                f"are {', '.join(table.columns)}"
            )
    where, values, what = _measured(stored, table, columns)
    runs, note = run_index(table, columns)
    names = _run_names(table, columns, runs)
    known = _known(stored, table, compared)
    result: dict[str, Any] = {"notes": [note], "points": [], "without_rows": [], "not_checked": []}
    by_point: dict[str, list[dict[str, Any]]] = {}
    for one in stored.data["forecasts"]:
        if one.get("interval_of_run"):
            by_point.setdefault(_point_name(one), []).append(one)
        else:
            result["not_checked"].append(f"{one['quantity']} at {point_text(one['at'])}")
    for name, forecasts in by_point.items():
        at = {**forecasts[0]["at"], **forecasts[0].get("lambda", {})}
        there = np.all([np.abs(where[column] - x) <= within * abs(x) for column, x in at.items()], axis=0)
        new = there & ~known
        if new.any():
            means = {names[r]: float(values[new & (runs == r)].mean()) for r in np.unique(runs[new])}
            result["points"].append(_judged(name, forecasts, means, int(new.sum()), int((there & known).sum())))
        else:
            result["without_rows"].append(_nothing_new(name, at, where, int(there.sum())))
    if not result["points"]:
        raise ValueError(_refusal(stored, table, result, within))
    return {"quantity": what, "within": within, **result}


def _columns(stored: StoredForecast, run: str | None) -> ColumnNames:
    """The forecast's columns. Compute budgets are of no use here."""
    options = {"penalty" if name == "lambda" else name: value for name, value in stored.options.items()}
    columns = replace(column_names(argparse.Namespace(**options)), budget="")
    return columns if run is None else replace(columns, run=run, given=columns.given | {"run"})


def _measured(stored: StoredForecast, table: RunTable, columns: ColumnNames) -> tuple[dict[str, Array], Array, str]:
    """Where each row lies, by the names that forecasts give their points; what it measured [R], and what that is."""
    metric = stored.options.get("metric")
    if metric is not None:
        axes = [name for one in stored.data["forecasts"][:1] for name in one["at"]]
        return {n: table.numbers(n, "--where") for n in axes}, table.numbers(metric, "--where"), metric
    obs = observations(table, columns)
    where = {"params": obs.params, "tokens": obs.tokens}
    if "penalty" in columns.given:
        where[columns.penalty] = table.numbers(columns.penalty, "--where")
    return where, obs.loss, columns.loss


def _run_names(table: RunTable, columns: ColumnNames, runs: Array) -> dict[int, str]:
    cells = table.columns.get(columns.run)
    return {int(r): f"row {i + 1}" if cells is None else str(cells[i]) for i, r in enumerate(runs)}


def _own_run(stored: StoredForecast) -> str:
    return stored.options.get("run") or ColumnNames.run


def _known(stored: StoredForecast, table: RunTable, compared: Sequence[str]) -> Array:
    """Rows (bool [R]) that the forecast's table had: all of them where it is that table."""
    if table.digest == stored.data["sha256"]:
        return np.ones(len(table), dtype=bool)
    return stored.known(table, compared)


def _point_name(forecast: Mapping[str, Any]) -> str:
    return point_text({**forecast["at"], **forecast.get("lambda", {})})


def _nothing_new(name: str, at: Mapping[str, float], where: Mapping[str, Array], known: int) -> dict[str, Any]:
    """A point without later rows: how many the forecast's table had there, else where the nearest row is."""
    if known:
        return {"at": name, "known_rows": known}
    apart = [np.abs(where[c] - x) / (abs(x) or 1.0) for c, x in at.items()]
    row = int(np.argmin(np.max(apart, axis=0)))
    return {"at": name, "nearest": point_text({c: float(where[c][row]) for c in at})}


def _refusal(stored: StoredForecast, table: RunTable, result: Mapping[str, Any], within: float) -> str:
    if not result["without_rows"]:
        what = ", ".join(result["not_checked"])
        return f"{stored.path}: {what}: no run measures that; expected a forecast of runs (--at)"
    known = [point for point in result["without_rows"] if "known_rows" in point]
    if known:
        own = "is the table that the forecast was made from and has" if table.digest == stored.data["sha256"] else "has"
        count = known[0]["known_rows"]
        return (
            f"{table.name}: {own} {count} row{'s' * (count > 1)} at {known[0]['at']}, known when it was made: that "
            f"is no forecast; expected runs made after {stored.data['made']}"
        )
    first = result["without_rows"][0]
    return (
        f"{table.name}: no row within {within:g} of {first['at']}, the nearest is at {first['nearest']}; expected the "
        f"runs that were forecast; add them, or allow more with --within"
    )


def _judged(
    name: str, forecasts: Sequence[Mapping[str, Any]], means: Mapping[str, float], rows: int, known: int
) -> dict[str, Any]:
    """A point's runs [each the mean of its rows] and what each forecast of it came to."""
    values = np.array(list(means.values()))
    judged = []
    for one in forecasts:
        law, run = (BootstrapInterval(**one[f"interval_of_{kind}"]) for kind in ("law", "run"))
        mean = float(values.mean())
        inside = int(((run.low <= values) & (values <= run.high)).sum())
        verdict = INSIDE_LAW if law.low <= mean <= law.high else INSIDE_RUN if run.low <= mean <= run.high else FAILED
        judged.append(
            {
                "method": one["method"],
                "value": one["value"],
                "interval_of_law": law._asdict(),
                "interval_of_run": run._asdict(),
                "runs_inside": inside,
                "error": mean - one["value"],
                "error_in_half_widths": {
                    "law": _share(mean - one["value"], law),
                    "run": _share(mean - one["value"], run),
                },
                "verdict": verdict,
            }
        )
    facts = {"at": name, "beyond": forecasts[0]["beyond"], "rows": rows, "known_rows_left_out": known}
    return {**facts, "runs": dict(means), "mean": float(values.mean()), "forecasts": judged}


def _share(error: float, interval: BootstrapInterval) -> float | None:
    """None where the interval has no width."""
    half = (interval.high - interval.low) / 2
    return error / half if half > 0 else None


def check_lines(result: Mapping[str, Any]) -> list[str]:
    """Points, their runs and a table of the forecasts, for the terminal."""
    lines: list[str] = []
    for point in result["points"]:
        each = ", ".join(f"{name} {value:.4g}" for name, value in point["runs"].items())
        count = len(point["runs"])
        lines.append(f"{point['at']} (beyond the forecast's table: {', '.join(point['beyond']) or 'no'})")
        lines.append(f"  {result['quantity']} of {count} run{'s' * (count > 1)}: mean {point['mean']:.4g} ({each})")
        if point["known_rows_left_out"]:
            lines.append(f"  {point['known_rows_left_out']} rows left out: the forecast's table had them")
        rows = [("method", "forecast", "law, 95 %", "error", "one run, 95 %", "error", "runs inside", "the forecast")]
        for one in point["forecasts"]:
            law, run = (interval_text(BootstrapInterval(**one[f"interval_of_{kind}"])) for kind in ("law", "run"))
            errors = ["–" if share is None else f"{share:+.2f}" for share in one["error_in_half_widths"].values()]
            inside = f"{one['runs_inside']} of {count}"
            rows.append(
                (one["method"], f"{one['value']:.4g}", law, errors[0], run, errors[1], inside, one["verdict"])
            )  # fmt: skip
        lines += [*columns_text(rows), ""]
    lines += [f"no later rows at {point['at']}" for point in result["without_rows"]]
    lines += [f"not checked: {what}: no run measures that" for what in result["not_checked"]]
    return [*lines, *MEANING]

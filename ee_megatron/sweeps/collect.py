"""One table of a sweep: a row per run, from its result file alone. The same files give the same bytes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ..observe.rundir import write_atomic
from . import records
from .sweep import Sweep

FIRST = ("run", "status")
LAST = ("error",)


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """In the grid's order. A run without a result has its settings, its status and its error only.

    What varies goes by its setting's name, so that no figure of the same name hides it: `steps` is not `rl.steps`.
    """
    table = []
    for run in sweep.runs:
        state = records.run_state(sweep, run)
        result = (records.read_result(sweep, run.id) or {}) if state == records.FINISHED else {}
        # A table that is made while runs go on must not depend on the second in which it is made.
        status = state if state in (records.FINISHED, records.FAILED) else "unfinished"
        settings = {key: plain(value) for key, value in run.settings.items()}
        figures = {key: value for key, value in result.items() if key not in settings}
        table.append({"run": run.id, "status": status} | settings | figures | {"error": records.error_of(sweep, run)})
    return table


def plain(value: Any) -> Any:
    """Lists and the like as text: a cell holds one value."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def columns(table: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in table for name in row)
    return [*FIRST, *(name for name in names if name not in (*FIRST, *LAST)), *LAST]


def collect(sweep: Sweep, out: Path | None = None) -> tuple[Path, Path]:
    """Write table.csv and table.parquet into `out`, or the sweep's directory; returns their paths."""
    table = rows(sweep)
    names = columns(table)
    folder = out or sweep.directory
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "table.csv", folder / "table.parquet"
    write_atomic(paths[0], to_csv(table, names))
    write_atomic(paths[1], to_parquet(table, names))
    return paths


def to_csv(table: list[dict[str, Any]], names: list[str]) -> str:
    """Numbers by repr, so that they read back exactly; what is missing is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in table)
    return text.getvalue()


def _cell(value: Any) -> Any:
    # csv writes floats by repr and None as nothing.
    return str(value).lower() if isinstance(value, bool) else value


def to_parquet(table: list[dict[str, Any]], names: list[str]) -> bytes:
    """A column is whole numbers, numbers, booleans or, where values are of several kinds, text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(values: list[Any]) -> Any:
        kinds = {type(value) for value in values if value is not None}
        if kinds in ({bool}, {int}):
            return pa.array(values)
        if kinds and kinds <= {int, float}:
            # NaN is missing.
            return pa.array(values, pa.float64(), from_pandas=True)
        return pa.array([None if value is None else str(_cell(value)) for value in values], pa.string())

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([column([row.get(name) for row in table]) for name in names], names=names), sink)
    return bytes(sink.getvalue())

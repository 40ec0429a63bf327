"""One table of a sweep: a row per run, from its result file alone. The same files give the same bytes."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from ..observe.rundir import write_atomic
from . import manifest as disk
from .sweep import Sweep

FIRST = ("run", "status")
LAST = ("error",)


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """In the grid's order. A run without a result has its settings, its status and its error only.

    What varies goes by its setting's name, so that no figure of the same name hides it: `steps` is not `rl.steps`.
    """
    found = []
    for run in sweep.runs:
        state = disk.run_state(sweep, run)
        result = (disk.read_result(sweep, run.id) or {}) if state == disk.FINISHED else {}
        # A table that is made while runs go on must not depend on the second in which it is made.
        status = state if state in (disk.FINISHED, disk.FAILED) else "unfinished"
        settings = {key: plain(value) for key, value in run.settings.items()}
        figures = {key: value for key, value in result.items() if key not in settings}
        found.append({"run": run.id, "status": status} | settings | figures | {"error": disk.error_of(sweep, run)})
    return found


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
    for row in table:
        writer.writerow(["" if row.get(name) is None else _cell(row[name]) for name in names])
    return text.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def to_parquet(table: list[dict[str, Any]], names: list[str]) -> bytes:
    """A column is whole numbers, numbers, booleans or, where values are of several kinds, text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array(*_typed(pa, [row.get(name) for row in table])) for name in names]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, names=names), sink)
    return bytes(sink.getvalue())


def _typed(pa: Any, values: list[Any]) -> tuple[list[Any], Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return values, pa.bool_()
    if kinds == {int}:
        return values, pa.int64()
    if kinds and kinds <= {int, float}:
        return [None if v is None or math.isnan(v) else float(v) for v in values], pa.float64()
    return [None if v is None else _cell(v) if not isinstance(v, str) else v for v in values], pa.string()

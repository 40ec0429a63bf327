"""One table of runs: CSV or Parquet, columns named by the user, each value checked before anything is fitted."""

from __future__ import annotations

import csv
import difflib
import hashlib
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .solver import Array

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""C = 6ND: forward and backward pass of a dense transformer (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
# Counts that are not those of the table's other columns: attention, embeddings or active parameters counted otherwise.
FLOPS_TOLERANCE = 0.2
_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|!=|<|>|=)(.*)")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class RunTable:
    """Cells by column, as they stand in the file; `name` and `digest` (SHA-256) say which file that was."""

    name: str
    digest: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def cells(self, column: str, option: str) -> list[Any]:
        """A column's cells. Raises ValueError with the nearest column for one that isn't there."""
        if column in self.columns:
            return self.columns[column]
        near = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.0)
        folded = [name for name in self.columns if name.lower() == column.lower()]
        raise ValueError(
            f"{self.name}: no column {column!r}; the nearest is {(folded or near)[0]!r} "
            f"(of {', '.join(self.columns)}); name the right one with {option} COLUMN"
        )

    def where(self, conditions: Sequence[str]) -> RunTable:
        """The rows in which every condition holds: COLUMN=VALUE and COLUMN!=VALUE compare text, <, <=, >, >= numbers.
        Raises ValueError for what is no condition, a cell that is no number, and where no row is left."""
        kept = list(range(len(self)))
        for condition in conditions:
            parts = _CONDITION.fullmatch(condition)
            if parts is None:
                raise ValueError(f"--where {condition}: expected COLUMN=VALUE or COLUMN<NUMBER, e.g. status=finished")
            column, sign, value = parts.groups()
            cells = self.cells(column, "--where")
            if sign in ("=", "!="):
                kept = [row for row in kept if (str(cells[row]) == value) == (sign == "=")]
            else:
                bound, numbers = as_number(value), self.numbers(column, "--where")
                if math.isnan(bound):
                    raise ValueError(f"--where {condition}: {value!r} is no number; expected one beside {sign}")
                kept = [row for row in kept if _COMPARE[sign](numbers[row], bound)]
            if not kept:
                there = ", ".join(sorted({str(cell) for cell in cells})[:5])
                raise ValueError(f"--where {condition}: no row is left of {len(self)}; {column} has {there}")
        rows = {name: [cells[row] for row in kept] for name, cells in self.columns.items()}
        return replace(self, columns=rows)

    def numbers(self, column: str, option: str, *, positive: bool = False) -> Array:
        """A column as float64 [R]. Raises ValueError for a cell that is no finite number or, where asked, not > 0."""
        cells = self.cells(column, option)
        values = np.array([as_number(cell) for cell in cells])
        wrong = ~np.isfinite(values) | (positive & (values <= 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            expected = "a number > 0" if positive else "a finite number"
            shown = "an empty cell" if cells[row] is None or str(cells[row]).strip() == "" else str(cells[row])
            raise ValueError(
                f"{self.name}: row {row + 1}, column {column}: found {shown}, expected {expected}; "
                f"correct the row or leave it out with --where"
            )
        return values


def as_number(cell: Any) -> float:
    """A cell's value; NaN for one that is no number."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


@dataclass(frozen=True)
class ColumnNames:
    """Names of the columns; `given` holds the options that were named on the command line."""

    params: str = "params"
    tokens: str = "tokens"
    flops: str = "flops"
    loss: str = "loss"
    run: str = "run"
    penalty: str = "lambda"
    budget: str = ""
    given: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Observations:
    """Rows to fit: parameters N, tokens D, FLOPs C = 6ND unless the table has them, loss (float64 [R]) and run (int
    [R], 0..G-1). `budgets`: int [R], rows of equal FLOPs where the user named them. `notes` say what was derived or
    assumed."""

    params: Array
    tokens: Array
    flops: Array
    loss: Array
    runs: Array
    notes: tuple[str, ...] = ()
    budgets: Array | None = None

    @property
    def run_count(self) -> int:
        return int(self.runs.max()) + 1

    def rows(self, chosen: Array) -> Observations:
        """The rows where `chosen` (bool [R]), runs counted anew."""
        _, runs = np.unique(self.runs[chosen], return_inverse=True)
        kept = replace(self, params=self.params[chosen], tokens=self.tokens[chosen], flops=self.flops[chosen])
        budgets = None if self.budgets is None else self.budgets[chosen]
        return replace(kept, loss=self.loss[chosen], runs=runs, budgets=budgets)


def read_table(path: Path) -> RunTable:
    """Read a .csv or .parquet file. Raises FileNotFoundError, or ValueError for what is no table with rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; expected a .csv or .parquet file with one row per measurement")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    columns = _read_parquet(path) if path.suffix.lower() in (".parquet", ".pq") else _read_csv(path)
    if not columns or not len(next(iter(columns.values()))):
        raise ValueError(f"{path.name}: no rows; expected a header and one row per measurement")
    return RunTable(path.name, digest, columns)


def _read_csv(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path.name}: {error}; expected a CSV file in UTF-8, or a name that ends in .parquet"
        ) from None
    header, body = (rows[0], rows[1:]) if rows else ([], [])
    names = [name.strip() for name in header]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path.name}: two columns are called {twice!r}; expected different names; rename one")
    for number, row in enumerate(body, start=1):
        if len(row) != len(names):
            raise ValueError(
                f"{path.name}: row {number} has {len(row)} cells, the header {len(names)}; correct the row"
            )
    return {name: [row[index] for row in body] for index, name in enumerate(names)}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    # pyarrow comes with `datasets`; loading it takes longer than reading a CSV file.
    import pyarrow
    import pyarrow.parquet

    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: {error}; expected a Parquet file") from None
    return columns


def run_index(table: RunTable, columns: ColumnNames) -> tuple[Array, str]:
    """The run of each row (int [R], 0..G-1) and a note on what a run is. Without such a column each row is one."""
    if columns.run in table.columns or "run" in columns.given:
        _, runs = np.unique(np.array([str(cell) for cell in table.cells(columns.run, "--run")]), return_inverse=True)
        return runs, f"a run is one value of column {columns.run}"
    return np.arange(len(table)), "each row is a run of its own (no column for runs was named)"


def observations(table: RunTable, columns: ColumnNames) -> Observations:
    """What the loss law is fitted to. Raises ValueError for missing columns and for values that are not > 0."""
    runs, note = run_index(table, columns)
    notes = [note]
    params = table.numbers(columns.params, "--params", positive=True)
    loss = table.numbers(columns.loss, "--loss", positive=True)
    has_tokens, has_flops = (name in table.columns for name in (columns.tokens, columns.flops))
    flops: Array | None = None
    if has_flops or "flops" in columns.given:
        flops = table.numbers(columns.flops, "--flops", positive=True)
    if not has_tokens and flops is not None and "tokens" not in columns.given:
        notes.append(
            f"no column {columns.tokens}: tokens derived from FLOPs, D = {columns.flops} / (6 {columns.params})"
        )
        tokens = flops / (FLOPS_PER_PARAMETER_AND_TOKEN * params)
    else:
        tokens = table.numbers(columns.tokens, "--tokens", positive=True)
    product = FLOPS_PER_PARAMETER_AND_TOKEN * params * tokens
    if flops is None:
        flops = product
        notes.append(f"no column {columns.flops}: FLOPs derived, C = 6 {columns.params} {columns.tokens}")
    elif np.abs(np.log(flops / product)).max() > FLOPS_TOLERANCE:
        ratio = flops / product
        notes.append(
            f"column {columns.flops} is {ratio.min():.2f} to {ratio.max():.2f} times 6ND; isoFLOP uses the column"
        )
    budgets: Array | None = None
    if columns.budget:
        _, budgets = np.unique(
            np.array([str(cell) for cell in table.cells(columns.budget, "--budget")]), return_inverse=True
        )
        notes.append(f"a compute budget is one value of column {columns.budget}")
    return Observations(params, tokens, flops, loss, runs, tuple(notes), budgets)

"""Tables of runs: read a CSV or Parquet file, choose rows and columns, and check every value before a fit."""

from __future__ import annotations

import difflib
import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

Array = np.ndarray
Columns = Mapping[str, str | None]
"""Column names by option: params, tokens, flops, loss, run, budget, lambda; None or absent: the option's own name."""

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""C = 6ND: forward and backward pass of a dense transformer (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
# Larger differences mean FLOPs counted otherwise: with attention, without embeddings, active parameters only.
FLOPS_TOLERANCE = 0.2
# Budgets are planned as equal and come out a few per cent apart.
BUDGET_GAP = np.log(1.1)
_CONDITION = re.compile(r"([^<>=!]+)(<=|>=|!=|<|>|=)(.*)")
_COMPARE = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip


@dataclass(frozen=True)
class RunTable:
    """A table, one row per measurement. `name` and `digest` (SHA-256) identify the file, `frame` has its raw cells."""

    name: str
    digest: str
    frame: pd.DataFrame

    def column(self, column: str, option: str) -> pd.Series:
        """Cells of a column. Raises ValueError that names the nearest column if there is none of this name."""
        if column in self.frame:
            return self.frame[column]
        near = difflib.get_close_matches(column, self.frame.columns, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{self.name}: no column {column!r}; the nearest is {near!r} (of {', '.join(self.frame)}); name the right "
            f"one with {option}"
        )

    def numbers(self, column: str, option: str, *, positive: bool = False) -> Array:
        """A column as float64 [R]. Raises ValueError for a cell that is not a finite number (`positive`: not > 0)."""
        cells = self.column(column, option)
        values = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
        wrong = ~np.isfinite(values) | (positive & (values <= 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            cell = str(cells.iloc[row]) or "an empty cell"
            raise ValueError(
                f"{self.name}: row {row + 1}, column {column}: found {cell}, expected "
                f"{'a number > 0' if positive else 'a finite number'}; correct the row or leave it out with --where"
            )
        return values

    def where(self, conditions: Sequence[str]) -> RunTable:
        """Select the rows in which every condition holds: COLUMN=VALUE and COLUMN!=VALUE compare text, <, <=, >, >=
        numbers. Raises ValueError for a malformed condition, a cell that is not a number, and if no row is left."""
        table = self
        for condition in conditions:
            parts = _CONDITION.fullmatch(condition)
            if parts is None:
                raise ValueError(f"--where {condition}: expected COLUMN=VALUE or COLUMN<NUMBER, e.g. status=finished")
            name, sign, value = parts.groups()
            if sign in ("=", "!="):
                keep = _COMPARE[sign](table.column(name, "--where").astype(str).to_numpy(), value)
            else:
                try:
                    keep = _COMPARE[sign](table.numbers(name, "--where"), float(value))
                except ValueError as error:
                    raise ValueError(f"--where {condition}: {error}; expected numbers on both sides") from None
            if not keep.any():
                there = ", ".join(sorted(set(table.frame[name].astype(str)))[:5])
                raise ValueError(f"--where {condition}: no row is left of {len(self.frame)}; {name} has {there}")
            table = replace(table, frame=table.frame[keep].reset_index(drop=True))
        return table


def read_table(path: Path) -> RunTable:
    """Read a .csv or .parquet file. Raises FileNotFoundError, or ValueError if it is not a table with rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table; expected a .csv or .parquet file with one row per measurement")
    try:
        parquet = path.suffix.lower() in (".parquet", ".pq")
        frame = pd.read_parquet(path) if parquet else _read_csv(path)
        if not len(frame):
            raise ValueError("no rows")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name}: {error}; expected a CSV (UTF-8) or Parquet file, one row per run") from None
    return RunTable(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), frame)


def _read_csv(path: Path) -> pd.DataFrame:
    # The header is read as a row: pandas would rename a second column of one name, and take the first cell of a row
    # that is too long for an index.
    cells = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    names = cells.iloc[0].str.strip()
    if names.duplicated().any():
        raise ValueError(f"two columns are called {names[names.duplicated()].iloc[0]!r}; rename one")
    return cells.iloc[1:].set_axis(names, axis=1).reset_index(drop=True)


def run_index(table: RunTable, columns: Columns) -> tuple[Array, str]:
    """Index of each row's run, 0..G-1 (int [R]), and a note on what a run is. Without such a column each row is one."""
    name = columns.get("run") or "run"
    if name not in table.frame and not columns.get("run"):
        return np.arange(len(table.frame)), "each row is a run of its own (--run COLUMN names runs)"
    return pd.factorize(table.column(name, "--run").astype(str))[0], f"a run is one value of column {name}"


def observations(table: RunTable, columns: Columns) -> tuple[pd.DataFrame, list[str]]:
    """Data to fit the loss laws to, and notes on derived columns.

    Columns of the frame: params N, tokens D, flops C, loss (nats), run and budget (int from 0). Without tokens
    D = C/(6N); without FLOPs C = 6ND. Raises ValueError for missing columns and values that are not > 0.
    """
    runs, note = run_index(table, columns)
    notes = [note]

    def is_there(option: str) -> bool:
        return bool(columns.get(option)) or option in table.frame

    def numbers(option: str) -> Array:
        return table.numbers(columns.get(option) or option, f"--{option}", positive=True)

    frame = pd.DataFrame({"params": numbers("params"), "loss": numbers("loss"), "run": runs})
    per_token = FLOPS_PER_PARAMETER_AND_TOKEN * frame["params"]
    if is_there("tokens") or not is_there("flops"):
        frame["tokens"] = numbers("tokens")
    else:
        frame["tokens"] = numbers("flops") / per_token
        notes.append("no column of tokens: D = C/(6N)")
    product = per_token * frame["tokens"]
    frame["flops"] = numbers("flops") if is_there("flops") else product
    ratio = frame["flops"] / product
    if not is_there("flops"):
        notes.append("no column of FLOPs: C = 6ND")
    elif np.abs(np.log(ratio)).max() > FLOPS_TOLERANCE:
        notes.append(f"FLOPs are {ratio.min():.2f} to {ratio.max():.2f} times 6ND; isoflop uses them as given")
    if name := columns.get("budget"):
        frame["budget"] = pd.factorize(table.column(name, "--budget").astype(str))[0]
    else:
        order = np.argsort(frame["flops"].to_numpy(), kind="stable")
        gaps = np.diff(np.log(frame["flops"].to_numpy()[order])) > BUDGET_GAP
        frame.loc[order, "budget"] = np.append(0, np.cumsum(gaps))
    return frame, notes

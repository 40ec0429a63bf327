"""What the commands take from their options: rows, columns, the laws of their groups."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .fit import METHODS, FitOrRefusal, fit_all
from .isoflop_law import group_budgets
from .refusal import Refused
from .table import ColumnNames, Observations, RunTable, observations, read_table


def column_names(given: argparse.Namespace) -> ColumnNames:
    names = ("params", "tokens", "flops", "loss", "run", "penalty", "budget")
    chosen = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    return replace(ColumnNames(**chosen), given=frozenset(chosen))


def read_rows(given: argparse.Namespace) -> tuple[RunTable, list[str]]:
    """The table's chosen rows, and notes on what was chosen."""
    whole = read_table(given.table)
    table = whole.where(given.where)
    chosen = f"{len(table)} of {len(whole)} rows: {', '.join(given.where)}"
    return table, [chosen] if given.where else []


class FittedGroup(NamedTuple):
    """Runs that follow one law, and what each method made of them; `name` is "" and `penalty` None where there is one
    group only."""

    name: str
    obs: Observations
    outcomes: dict[str, FitOrRefusal]
    penalty: float | None


def fit_groups(
    given: argparse.Namespace, table: RunTable, columns: ColumnNames
) -> tuple[list[FittedGroup], Observations]:
    """One law per value of lambda where such a column was named: runs under another penalty follow another law."""
    if given.budget and given.budget_within is not None:
        raise ValueError("--budget with --budget-within: the column names the budgets already; give one of them")
    obs = observations(table, columns)
    if given.budget_within is not None:
        if not 0 < given.budget_within < 10:
            raise ValueError(f"--budget-within {given.budget_within:g}: expected a share above 0, e.g. 0.1")
        note = f"a compute budget's FLOPs differ by {given.budget_within:g} at most"
        obs = replace(obs, budgets=group_budgets(obs.flops, given.budget_within), notes=(*obs.notes, note))
    methods = METHODS if given.method == "all" else (given.method,)
    parts: list[tuple[str, Observations, float | None]] = [("", obs, None)]
    if "penalty" in columns.given:
        penalty = table.numbers(columns.penalty, "--lambda")
        levels = np.unique(penalty).tolist()
        parts = [(f"{columns.penalty} = {level:g}", obs.rows(penalty == level), level) for level in levels]
    fitted = [(name, part, fit_all(part, methods, given.bootstrap, given.seed), level) for name, part, level in parts]
    return [FittedGroup(*group) for group in fitted], obs


def refuse_all(groups: Sequence[FittedGroup]) -> None:
    """Raises Refused with every reason in one line where nothing was fitted."""
    outcomes = [(f"{g.name + ', ' if g.name else ''}{method}", o) for g in groups for method, o in g.outcomes.items()]
    if all(isinstance(outcome, Refused) for _, outcome in outcomes):
        raise Refused(" | ".join(f"{label}: {outcome}" for label, outcome in outcomes))


def source(given: argparse.Namespace, table: RunTable, notes: Sequence[str]) -> dict[str, Any]:
    facts = {"table": table.name, "sha256": table.digest, "bootstrap": given.bootstrap, "seed": given.seed}
    return {**facts, "notes": list(notes)}


def compared_columns(given: argparse.Namespace) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.against.split(",") if name.strip())
    if given.penalty is not None and given.penalty not in names:
        names = (*names, given.penalty)
    if not names or len(set(names)) < len(names) or given.metric in names:
        raise ValueError(f"--against {given.against}: expected one or more different columns other than the metric's")
    return names

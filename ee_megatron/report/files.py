"""Where a report's figures come from: the files, its table for a spreadsheet, the command that makes the run again."""

from __future__ import annotations

import csv
import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..config.command import settings_of
from .data import Inputs, ReportRun
from .results import Results

KEPT = {
    "results.json": "every figure of the evaluation",
    "answers.jsonl": "every answer, a line per problem",
    "lens.json": "what every exit would write, for a few answers",
    "table.txt": "the table as text",
    "metrics.jsonl": "a line per step",
    "timings.jsonl": "clocks, a line per step",
}


def links(inputs: Inputs, output: Path) -> list[dict[str, str]]:
    """{"href", "name", "what"} of the files that the stages left, relative to the page."""
    found = []
    for stage in inputs.stages:
        for name, what in KEPT.items():
            file = stage.directory / name
            if file.is_file():
                href = quote(Path(os.path.relpath(file.resolve(), output.parent.resolve())).as_posix())
                label = f"{stage.name}{f', {stage.run}' if stage.run else ''}: {name}"
                # A colon in the first part of a relative address would make it a scheme.
                found.append({"href": f"./{href}", "name": label, "what": what})
    return found


def table_csv(results: Results) -> str:
    """The results' rows with all their figures, as a data: address."""
    columns = list(dict.fromkeys(key for row in results.rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: _plain(v) for k, v in row.items()} for row in results.rows])
    return f"data:text/csv;charset=utf-8,{quote(text.getvalue())}"


def _plain(value: Any) -> Any:
    # A spreadsheet takes text that begins so for a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def commands(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """(label, command) for the runs whose settings can be said on a command line."""
    found = []
    for run in runs:
        settings = settings_of(run.config) if run.config is not None else None
        if settings is not None:
            found.append((run.label, shlex.join(["ee-megatron", "run", *settings])))
    return found

"""A forecast on disk: predict.json says when it was made, of which table and by which options. Another forecast does
not take its place silently, and the rows that it knew can be told from those that came later."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..report.numbers import strict_json
from .page import write_json, write_text
from .solver import Array
from .table import RunTable, as_number

FILE = "predict.json"
# Where a forecast is written, and which table it is of, are no part of what was asked.
_NO_OPTIONS = ("handler", "command", "table", "out", "again")
_NEW_EACH_TIME = ("made", "ee_megatron", "table")


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """The options that decide a forecast, as they stand in JSON."""
    chosen = {name: value for name, value in sorted(vars(given).items()) if name not in _NO_OPTIONS}
    return {"lambda" if name == "penalty" else name: value for name, value in chosen.items()}


def earlier(folder: Path, digest: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The forecast of the same table (SHA-256) and options that `folder` holds, None where it holds none.

    Raises ValueError for another forecast, or for a predict.json that is none.
    """
    path = folder / FILE
    if not path.exists():
        return None
    found = _read(path)
    if found["sha256"] == digest and found["options"] == strict_json(options):
        return found
    what = "other options" if found["sha256"] == digest else f"another table, {found['table']}"
    raise ValueError(
        f"{path}: holds the forecast of {found['made']} from {what}; expected a directory without one; give another "
        f"--out, or --again to put this forecast in its place"
    )


def keep(folder: Path, lines: list[str], data: dict[str, Any], known: dict[str, Any] | None) -> list[str]:
    """Write predict.json and predict.txt, or leave those of `known`, the same forecast made before; returns what to
    print: the files, or why they stay."""
    if known is not None:
        differs = "" if _figures(known) == _figures(strict_json(data)) else (
            f", with other figures than today's (ee_megatron {known['ee_megatron']} then, {__version__} now)"
        )  # fmt: skip
        return [f"{folder / FILE}: the forecast of {known['made']} stays, the same table and options{differs}"]
    made = datetime.now(UTC).isoformat(timespec="seconds")
    data = {"made": made, "ee_megatron": __version__, **data}
    # JSON last: it is what says that there is a forecast.
    text = write_text(folder / "predict.txt", [f"made {made} by ee_megatron {__version__}", *lines])
    return [str(write_json(folder / FILE, data)), str(text)]


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in _NEW_EACH_TIME}


def row_digests(table: RunTable, columns: Sequence[str]) -> list[str]:
    """What tells a row by its cells in `columns`; numbers by value, so that 1e3 in one table is 1000 in another."""
    cells = [table.columns[name] for name in columns]
    keys = [[_same_text(cell) for cell in row] for row in zip(*cells, strict=True)]
    return [hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] for key in keys]


def _same_text(cell: Any) -> str:
    value = as_number(cell)
    return repr(value) if math.isfinite(value) else str(cell)


@dataclass(frozen=True)
class StoredForecast:
    """A predict.json: `data` as it stands there, digest the file's SHA-256."""

    path: Path
    digest: str
    data: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        chosen: dict[str, Any] = self.data["options"]
        return chosen

    def known(self, table: RunTable, columns: Sequence[str]) -> Array:
        """Which rows (bool [R]) were in the forecast's table. Each row there stands for one here: a later run with the
        same cells is a further row."""
        left = Counter(self.data["rows"])
        found = []
        for digest in row_digests(table, columns):
            found.append(left[digest] > 0)
            left[digest] -= 1
        return np.array(found)


def load(path: Path) -> StoredForecast:
    """Read a forecast. Raises FileNotFoundError, or ValueError for what is none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such forecast; expected the {FILE} that `ee-megatron scaling predict` wrote"
        )
    return StoredForecast(path, hashlib.sha256(path.read_bytes()).hexdigest(), _read(path))


_FIELDS = {
    "made": str,
    "ee_megatron": str,
    "table": str,
    "sha256": str,
    "options": dict,
    "forecasts": list,
    "rows": list,
    "row_columns": list,
}
_OF_EACH = {"method", "at", "quantity", "value", "interval_of_law", "beyond"}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected the forecast of `ee-megatron scaling predict --out`") from None
    lacking = [n for n, kind in _FIELDS.items() if not (isinstance(found, dict) and isinstance(found.get(n), kind))]
    if not lacking and not all(isinstance(one, dict) and one.keys() >= _OF_EACH for one in found["forecasts"]):
        lacking = [f"{', '.join(sorted(_OF_EACH))} in each of its forecasts"]
    if lacking:
        raise ValueError(
            f"{path}: lacks {', '.join(lacking)}; expected a forecast as `ee-megatron scaling predict --out` writes "
            f"it; make it again, in another directory"
        )
    forecast: dict[str, Any] = found
    return forecast

"""`ee-megatron externalise DIRECTORY`: a study's finished evaluations in, one page, a table and its figures out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import Parser
from ..observe.rundir import write_atomic
from ..report.numbers import strict_json
from ..report.tables import TextTable
from .page import write_page
from .rows import Row, rows, to_csv
from .study import Study, counted, read_study
from .verdicts import Verdict, at_tau, verdicts

ABOUT = "whether a price on depth makes a model write its steps down: a study's runs on one page, with a table"
EPILOG = """\
reads   every finished evaluation below DIRECTORY: */evaluate-*/ with config.yaml, results.json and DONE, of runs that
        measured the choice of style (task.name=hops, evaluate.choice=reinforced or all); others are counted
writes  externalise.html  the question, the answer, figures, acceptance points, controls; needs nothing but itself
        plots/            the figures once more, as PNG
        externalise.csv   a row per run and family of problems: shares, right, depth, length, the closed form's forecast
        externalise.json  the same rows and the acceptance points with their intervals

example:
  ee-megatron externalise runs --out study
"""


def main(argv: Sequence[str]) -> int:
    """Returns 0. Raises ValueError or FileNotFoundError for what a user can put right."""
    parser = Parser(
        prog="ee-megatron externalise", description=ABOUT, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="holds the study's runs, at any depth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: DIRECTORY)")
    given = parser.parse_args(list(argv))
    study = read_study(given.directory)
    table, points = rows(study), verdicts(study)
    print("\n".join([facts(study), *study.remarks, "", points_table(points).text(), ""]))
    out = given.out or given.directory
    out.mkdir(parents=True, exist_ok=True)
    print(_write(out / "externalise.csv", to_csv(strict_json(table))))
    print(write_page(out / "externalise.html", given.directory, study, table, points, facts(study)))
    data = json.dumps(strict_json(as_json(study, table, points)), indent=1, ensure_ascii=False, allow_nan=False)
    print(_write(out / "externalise.json", data + "\n"))
    return 0


def facts(study: Study) -> str:
    """How much there is of it, and the time it took where that is known."""
    bases = len({r.base for r in study.records})
    parts = [f"{counted(len(study.records), 'run')} of {counted(bases, 'base')}"]
    parts.append("tokens a step: " + ", ".join(map(str, study.taus)))
    if study.timed:
        whole = "" if study.timed == study.stages else f" ({study.timed} of {study.stages} stages have it on record)"
        parts.append(f"{study.device_seconds / 3600:.1f} core hours{whole}")
    return "; ".join(parts)


def points_table(points: Sequence[Verdict]) -> TextTable:
    """The acceptance points in words."""
    heads = ("point", "met", "tokens a step", "bases", "runs", "found (mean over bases, 95 %)")
    found = [
        (f"{v.point} {v.name}", v.answer, v.tau, str(v.bases), str(v.runs), "; ".join(part.words for part in v.parts))
        for v in points
    ]
    return TextTable(heads, found, names=2)


def as_json(study: Study, table: Sequence[Row], points: Sequence[Verdict]) -> dict[str, Any]:
    """The study's figures. `points_at`: points 1 to 5 by tokens a step."""
    return {
        "runs": len(study.records),
        "remarks": list(study.remarks),
        "device_seconds": study.device_seconds if study.timed else None,
        "points": [point.as_json() for point in points],
        "points_at": {tau: [point.as_json() for point in at_tau(study, tau)] for tau in study.taus},
        "rows": list(table),
    }


def _write(path: Path, text: str) -> Path:
    write_atomic(path, text)
    return path

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
from .laws import LEVEL, laws, laws_rows
from .page import write_page
from .rows import Row, of_shape, rows, to_csv
from .study import Study, counted, read_study
from .verdicts import Points, Verdict, at_tau, verdicts

ABOUT = "whether a price on depth makes a model write its steps down: a study's runs on one page, with a table"
EPILOG = """\
reads   every finished evaluation below DIRECTORY: */evaluate-*/ with config.yaml, results.json and DONE, of runs that
        measured the choice of style (task.name=hops or sums, evaluate.style_choice.models=reinforced or all); others
        are counted
writes  externalise.html  the question, the answer, figures, acceptance points, controls; needs nothing but itself
        plots/            the figures once more, as PNG
        externalise.csv   a row per run and family of problems: shares, right, depth, length, the closed form's forecast
        laws.csv          a row per model, family and cost of depth: layers that a hop takes, the price at which steps
                          take over, by the closed form and as found
        externalise.json  the same rows and the acceptance points with their intervals

example:
  ee-megatron externalise runs --out study

Runs whose models have other numbers of layers, or another width, are judged by themselves, each shape with its figures
and its acceptance points; the page then begins with what the laws say of all of them.
"""


def main(argv: Sequence[str]) -> int:
    """Returns 0. Raises ValueError or FileNotFoundError for what a user can put right."""
    parser = Parser(
        prog="ee-megatron externalise", description=ABOUT, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="holds the study's runs, at any depth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: DIRECTORY)")
    parser.add_argument(
        "--level",
        type=float,
        default=LEVEL,
        metavar="SHARE",
        help="of written steps, whose price laws.csv has (%(default)s)",
    )
    given = parser.parse_args(list(argv))
    if not 0 < given.level < 1:
        raise ValueError(f"--level {given.level:g}: expected a share between 0 and 1, e.g. 0.75")
    study = read_study(given.directory)
    table, found = rows(study), laws(study, given.level)
    points = {shape: verdicts(study.of_shape(shape)) for shape in study.shapes}
    print("\n".join([facts(study), *study.remarks, "", points_table(points).text(), ""]))
    out = given.out or given.directory
    out.mkdir(parents=True, exist_ok=True)
    print(_write(out / "externalise.csv", to_csv(strict_json(table))))
    if found:
        print(_write(out / "laws.csv", to_csv(strict_json(laws_rows(found)))))
    print(write_page(out / "externalise.html", given.directory, study, table, points, found, facts(study)))
    data = json.dumps(strict_json(as_json(study, table, points)), indent=1, ensure_ascii=False, allow_nan=False)
    print(_write(out / "externalise.json", data + "\n"))
    return 0


def facts(study: Study) -> str:
    """How much there is of it, and the time it took where that is known."""
    bases, shapes = len({(r.shape, r.base) for r in study.records}), len(study.shapes)
    of = f" in {shapes} shapes" if shapes > 1 else ""
    parts = [f"{counted(len(study.records), 'run')} of {counted(bases, 'base')}{of}"]
    parts.append("tokens a step: " + ", ".join(map(str, study.taus)))
    if study.timed:
        whole = "" if study.timed == study.stages else f" ({study.timed} of {study.stages} stages have it on record)"
        parts.append(f"{study.device_seconds / 3600:.1f} core hours{whole}")
    return "; ".join(parts)


def points_table(points: Points) -> TextTable:
    """The acceptance points in words; with several shapes each shape's, its name before them."""
    heads = ("point", "met", "tokens a step", "bases", "runs", "found (mean over bases, 95 %)")
    found = [
        (shape.label, f"{v.point} {v.name}", v.answer, v.tau, str(v.bases), str(v.runs), _found(v))
        for shape, judged in points.items()
        for v in judged
    ]
    if len(points) == 1:
        return TextTable(heads, [cells[1:] for cells in found], names=2)
    return TextTable(("shape", *heads), found, names=3)


def _found(point: Verdict) -> str:
    return "; ".join(part.words for part in point.parts)


def as_json(study: Study, table: Sequence[Row], points: Points) -> dict[str, Any]:
    """The study's figures. `points_at`: points 1 to 5 by tokens a step. With several shapes both stand in `shapes`, by
    shape."""
    judged = [
        {
            "points": [point.as_json() for point in found],
            "points_at": {
                tau: [point.as_json() for point in at_tau(study.of_shape(shape), tau)]
                for tau in study.of_shape(shape).taus
            },
        }
        for shape, found in points.items()
    ]
    several = [{**of_shape(shape), **found} for shape, found in zip(points, judged, strict=True)]
    return {
        "runs": len(study.records),
        "remarks": list(study.remarks),
        "device_seconds": study.device_seconds if study.timed else None,
        **(judged[0] if len(judged) == 1 else {"shapes": several}),
        "rows": list(table),
    }


def _write(path: Path, text: str) -> Path:
    write_atomic(path, text)
    return path

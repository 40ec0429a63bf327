"""`ee-megatron externalise DIRECTORY`: a study's finished evaluations in; one page, tables and figures out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..arguments import Parser
from ..observe.rundir import write_atomic
from .effects import effects
from .laws import laws, runs_table, with_forecast
from .page import page
from .study import read_study

ABOUT = "does a depth penalty make a model write out its reasoning? A study's runs on one page, with tables"
EPILOG = """\
reads   every finished evaluation below DIRECTORY (*/evaluate-*/) of runs that measured the choice of style
        (task.name=hops or sums, evaluate.style_choice.models=reinforced or all)
writes  externalise.html  points, figures, conditions side by side; needs nothing but itself. plots/: figures as PNG
        effects.csv       a row per acceptance point: effect, interval, replicates, status
        externalise.csv   a row per run and family of problems: shares, right, depth, length, the closed form's forecast
        laws.csv          a row per model, family and cost of depth: layers that a hop takes, the penalty at which steps
                          take over, by the closed form and as found

example: ee-megatron externalise runs --out study
"""


def main(argv: Sequence[str]) -> int:
    """Returns 0. Raises ValueError or FileNotFoundError for what a user can put right."""
    parser = Parser(
        prog="ee-megatron externalise", description=ABOUT, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="holds the study's runs, at any depth")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: DIRECTORY)")
    help_level = "share of written steps whose penalty laws.csv has (%(default)s)"
    parser.add_argument("--level", type=float, default=0.5, metavar="SHARE", help=help_level)
    given = parser.parse_args(list(argv))
    if not 0 < given.level < 1:
        raise ValueError(f"--level {given.level:g}: expected a share between 0 and 1, e.g. 0.75")
    study, remarks = read_study(given.directory)
    runs = with_forecast(study)
    found, prices = effects(runs), laws(runs, given.level)
    shapes, bases = runs["shape"].nunique(), len(runs[["shape", "base"]].drop_duplicates())
    facts = f"runs: {runs['path'].nunique()}, bases: {bases}, shapes of model: {shapes}"
    html, pictures = page(runs, found, facts, remarks)
    shown = found.drop(columns=["question", "by_base"])
    print(facts, *remarks, "", shown.to_string(index=False, na_rep="–", float_format="{:+.3f}".format), "", sep="\n")
    out = given.out or given.directory
    (out / "plots").mkdir(parents=True, exist_ok=True)
    tables = {"externalise.csv": runs_table(runs), "effects.csv": found, "laws.csv": prices}
    files: dict[str, str | bytes] = {name: table.to_csv(index=False) for name, table in tables.items() if len(table)}
    files |= {f"plots/{name}": png for name, png in pictures.items()} | {"externalise.html": html}
    for name, content in files.items():
        write_atomic(out / name, content)
        print(out / name)
    return 0

"""A screen of tasks before any RL under a penalty: does the calibrated model have a choice of how much to write? Only a
task whose silent answers need depth that its steps don't can show an effect of a penalty on depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..config.load import read_saved
from ..observe.rundir import DONE
from .study import REINFORCED, START, STEPS, TERSE, choice_of

CRITERIA: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "steps_at_exit": ("≥ .9", lambda right: right >= 0.9),
    "terse_at_exit": ("≤ .5", lambda right: right <= 0.5),
    "terse_full": ("≥ .9", lambda right: right >= 0.9),
    "gap_own_exits": ("within .05", lambda gap: abs(gap) <= 0.05 + 1e-9),
    "share_lambda_0": (".3 to .7", lambda share: 0.3 <= share <= 0.7),
}
"""By column, what a task must meet at some number of hops: its text and the test."""


def screen(directory: Path) -> pd.DataFrame:
    """A row per run below `directory` and number of hops:

    task, path, hops    of the problems; `path` of the evaluation
    exit                the exit before the last layer where steps are furthest ahead of silent answers, of those that
                        meet both criteria if some do
    steps_at_exit, terse_at_exit, terse_full    share of right answers, the style given, all tokens at one depth
    gap_own_exits       right, terse less steps, under the model's own exits
    share_lambda_0      share of steps after RL without a penalty; NaN without RL
    verdict             "go", or what isn't met; what was not measured counts as open

    Raises FileNotFoundError if no evaluation measured styles at fixed depths, ValueError for damaged results.
    """
    rows = [
        row
        for stage in sorted(path.parent for path in directory.rglob(f"evaluate-*/{DONE}"))
        if (part := choice_of(stage)) and START in part["models"]
        for row in _rows(stage, part)
    ]
    if not rows:
        raise FileNotFoundError(
            f"{directory}: no evaluation that measured styles at fixed depths before RL; make some by "
            "`ee-megatron sweep sweep=choice_screen`"
        )
    return pd.DataFrame([row | {"path": str(Path(row["path"]).relative_to(directory))} for row in rows])


def _rows(stage: Path, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cfg = read_saved(stage / "config.yaml")
    after = part["models"].get(REINFORCED, {}).get("families", {})
    for family, figures in part["models"][START]["families"].items():
        right = {
            depth: {style: values["correct"] for style, values in styles.items()}
            for depth, styles in figures["fixed"].items()
            if int(depth) < part["num_layers"]
        }
        ahead = {depth: of[STEPS] - of[TERSE] for depth, of in right.items()}
        met = [d for d, of in right.items() if all(CRITERIA[f"{s}_at_exit"][1](of[s]) for s in (STEPS, TERSE))]
        exit_ = max(met or right, key=lambda depth: ahead[depth])
        unpenalised = not cfg.rl.depth_penalty.weight and not cfg.rl.fixed_depth
        row = {
            "task": cfg.task.name, "hops": figures["hops"], "exit": int(exit_),
            "steps_at_exit": right[exit_][STEPS], "terse_at_exit": right[exit_][TERSE],
            "terse_full": figures["forced_full"][TERSE]["correct"],
            "gap_own_exits": figures["forced"][TERSE]["correct"] - figures["forced"][STEPS]["correct"],
            "share_lambda_0": after[family]["free"]["share"][STEPS] if family in after and unpenalised else math.nan,
        }  # fmt: skip
        missed = [name for name, (_, test) in CRITERIA.items() if not math.isnan(row[name]) and not test(row[name])]
        unknown = [name for name in CRITERIA if math.isnan(row[name])]
        verdict = f"no: {', '.join(missed)}" if missed else f"open: {', '.join(unknown)}" if unknown else "go"
        yield row | {"verdict": verdict, "path": str(stage)}

"""Effects of a study's conditions: acceptance points with intervals, conditions side by side, models before RL.

RL seeds are averaged within a base; intervals are Student's, over bases (one base: no interval). Whatever is averaged
or compared is of models of one shape. `runs` is always as `laws.with_forecast` returns it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from ..report.tables import cell
from ..statistics import Estimate, t_interval
from .study import CAP, FREE, LENGTH, NO_EXITS, PADDED, SHAPE, START, STEPS, STYLES, TEACHER, TERSE

EVERY = "above 0 on every base"
TARGETS: dict[str, Callable[[Estimate, pd.Series], bool]] = {
    # .90 - .88 is a rounding error more than .02.
    "mean within ±0.02": lambda mean, _: abs(mean.value) <= 0.02 + 1e-9,
    "mean within ±0.06": lambda mean, _: abs(mean.value) <= 0.06 + 1e-9,
    "mean within ±0.1": lambda mean, _: abs(mean.value) <= 0.1 + 1e-9,
    "mean at least 0.9": lambda mean, _: mean.value >= 0.9,
    "mean above 0": lambda mean, _: mean.value > 0,
    "mean below 0": lambda mean, _: mean.value < 0,
    "interval above 0": lambda mean, _: mean.low > 0,
    "interval includes 0": lambda mean, _: mean.low <= 0 <= mean.high,
    EVERY: lambda _, by_base: bool((by_base > 0).all()),
}
EACH, ALL = "each", "all"
TAUS = (1, 4)
ORDER = (NO_EXITS, FREE, "mean", "total", "max", CAP, LENGTH)


class Effect(NamedTuple):
    """A figure (name and column; with * the furthest from 0 of several) under a condition, less the same under
    `against`. condition "": before RL. hops: of problems of so many; EACH: a row for each; ALL: their mean. tau: at so
    many tokens a step, on the families that were measured at all TAUS if there are such; None: at each."""

    point: int
    figure: tuple[str, str]
    condition: str
    against: str
    hops: str | int
    target: str
    tau: int | None = None


SHARE, ODDS = ("share of steps", "share_steps"), ("log odds padded : terse", "log_odds_padded_terse")
GAP, PADDED_GAP = (
    ("right, terse − steps, own exits", "gap_steps"),
    ("right, padded − terse, all tokens at depth", "gap_padded_*"),
)
POINTS = (
    Effect(1, GAP, "", "", EACH, "mean within ±0.02"),
    Effect(1, PADDED_GAP, "", "", EACH, "mean within ±0.06"),
    Effect(2, SHARE, FREE, NO_EXITS, EACH, "mean within ±0.1"),
    Effect(3, SHARE, "max 1", FREE, 3, EVERY),
    Effect(4, ODDS, "mean 1", FREE, ALL, "interval above 0"),
    Effect(4, ODDS, "max 1", FREE, ALL, "interval includes 0"),
    Effect(5, ("share of steps − the teacher's", "gain_on_teacher"), "cap 2", "", 1, "mean within ±0.1"),
    Effect(5, SHARE, "cap 2", "", 3, "mean at least 0.9"),
    Effect(6, SHARE, "total 1", FREE, ALL, "mean above 0", TAUS[0]),
    Effect(6, SHARE, "total 1", FREE, ALL, "mean below 0", TAUS[1]),
)
"""The points on which the study is accepted, set before it ran."""
QUESTIONS = (
    "can the base do both?", "do exits alone change nothing?", "does a penalty on the deepest token externalise?",
    "does only the mean pay for padding?", "does a cap externalise what doesn't fit?",
    "does the total's sign turn with the length of a step?",
)  # fmt: skip


def effects(runs: pd.DataFrame) -> pd.DataFrame:
    """Table of a row per shape, effect of POINTS and tokens a step: `effect` with its 95 % interval `low`, `high` over
    `bases`, from `runs` runs; `target`; `status`: met, missed or open (runs are missing); `by_base`: of each base."""
    rows = []
    for shape, group in runs.sort_values([*SHAPE, "hops"], kind="stable").groupby("shape", sort=False):
        gaps = {"gap_steps": group[f"{START}.forced.{TERSE}.correct"] - group[f"{START}.forced.{STEPS}.correct"]}
        for depth in range(1, group["layers"].iloc[0] + 1):
            held = f"{START}.fixed.{depth}"
            gaps[f"gap_padded_{depth}"] = group[f"{held}.{PADDED}.correct"] - group[f"{held}.{TERSE}.correct"]
        gaps["gain_on_teacher"] = group["share_steps"] - group[f"{TEACHER}.free.share.{STEPS}"]
        group = pd.concat([group, pd.DataFrame(gaps)], axis=1)
        for effect in POINTS:
            for tau in [effect.tau] if effect.tau else sorted(group["tau"].unique()):
                row = {"shape": shape, "point": effect.point, "question": QUESTIONS[effect.point - 1], "tau": tau}
                rows += [row | _effect(part, effect) for part in _parts(group, effect, tau)]
    return pd.DataFrame(rows)


def _parts(runs: pd.DataFrame, effect: Effect, tau: int) -> list[pd.DataFrame]:
    """The runs of each row that the effect has."""
    here = runs[runs["tau"] == tau]
    if effect.hops == EACH:
        return [part for _, part in here.groupby("family", sort=False)]
    if effect.hops != ALL:
        return [here[here["hops"] == effect.hops]]
    measured = [set(_changes(runs[runs["tau"] == at], effect, effect.figure[1])) for at in TAUS]
    shared = set.intersection(*measured) if effect.tau else None
    return [here[here["family"].isin(list(shared or _changes(here, effect, effect.figure[1])))]]


def _changes(runs: pd.DataFrame, effect: Effect, column: str) -> pd.DataFrame:
    """A row per base, a column per family in which any base has the change."""
    rows = runs[runs["compared"]] if effect.condition else runs.assign(condition="")
    means = rows.pivot_table(column, "base", ["condition", "family"]) if len(rows) else pd.DataFrame()
    changes = means.get(effect.condition, pd.DataFrame(dtype=float))
    if effect.against:
        changes = changes - means.get(effect.against, pd.DataFrame(dtype=float))
    return changes.dropna(axis=1, how="all")


def _effect(runs: pd.DataFrame, effect: Effect) -> dict[str, Any]:
    """Columns of the effect's row: mean over the families of `runs`, of bases that have all of them."""
    changes = {
        c: _changes(runs, effect, c).dropna().mean(axis=1).dropna()
        for c in fnmatch.filter(runs.columns, effect.figure[1])
    }
    column = max(changes, key=lambda name: abs(changes[name].mean()) if len(changes[name]) else -1.0)
    by_base, target = changes[column], effect.target
    mean = t_interval(by_base.tolist())
    taken = runs["compared"] & runs["condition"].isin([effect.condition, effect.against])
    used = runs[taken if effect.condition else runs["models"].str.contains(START)]
    met = len(by_base) > 0 and TARGETS[target](mean, by_base)
    # One base against EVERY is enough, whatever the others' results.
    missing = by_base.empty or (len(by_base) < runs["base"].nunique() and (met or target != EVERY))
    decided = not missing and (math.isfinite(mean.low) or not target.startswith("interval"))
    return {
        "figure": effect.figure[0] + (f" {column.rpartition('_')[2]}" if "*" in effect.figure[1] else ""),
        "condition": effect.condition or "before RL", "against": effect.against,
        "hops": ", ".join(map(str, runs["hops"].unique())) or str(effect.hops),
        "effect": mean.value, "low": mean.low, "high": mean.high, "bases": len(by_base), "runs": used["path"].nunique(),
        "target": target, "status": ("met" if met else "missed") if decided else "open",
        "by_base": ", ".join(f"{base}: {value:+.3f}" for base, value in by_base.items()),
    }  # fmt: skip


def over_bases(rows: pd.DataFrame, by: Sequence[str], columns: Mapping[str, str]) -> pd.DataFrame:
    """Columns as cells "mean [low, high]" over bases, by head, for each group of `by`; groups in the rows' order."""
    means = rows.groupby([*by, "base"], sort=False)[list(columns)].mean()
    cells = means.groupby(level=list(by), sort=False).agg(
        lambda values: cell(t_interval(values.dropna().tolist())._asdict())
    )
    return cells.rename(columns=columns).reset_index()


def conditions(runs: pd.DataFrame) -> pd.DataFrame:
    """Table with a row per shape, tokens a step, hops and condition: the change in the share of steps against no
    penalty (λ = 0) on the same base, shares beside their forecasts, and how the styles' answers changed."""
    rows = runs[runs["compared"]].assign(rank=runs["kind"].map(ORDER.index))
    rows = rows.sort_values([*SHAPE, "tau", "hops", "rank", "number"], kind="stable")
    place = ["shape", "tau", "family", "base"]
    free = rows[rows["condition"] == FREE].groupby(place)["share_steps"].mean().rename("free")
    rows["gain"] = (rows["share_steps"] - rows.join(free, on=place)["free"]).where(rows["condition"] != FREE)
    heads = {
        "gain": "steps − at λ = 0", "share_steps": "steps", "forecast_steps": "steps, forecast",
        "share_padded": "padded", "forecast_padded": "padded, forecast", "correct": "right", "mean_depth": "mean depth",
        "max_depth": "deepest token", "length": "length", "right_terse": "terse, forced: right",
        "right_terse_full": "terse, full depth: right", "corrupted_right": "wrong step: right",
        "corrupted_followed": "wrong step: followed",
    }  # fmt: skip
    return over_bases(rows, ["shape", "tau", "hops", "condition"], heads)


def before_rl(runs: pd.DataFrame) -> pd.DataFrame:
    """Table with a row per shape, tokens a step, hops and style: right answers before RL under own exits, the depth of
    their deepest token; right answers at full depth and with every token held to one depth."""
    depths = range(1, runs["layers"].max() + 1)
    columns = {"right": "forced.{}.correct", "deepest token": "forced.{}.max_depth"}
    columns |= {"full depth": "forced_full.{}.correct"}
    columns |= {f"depth {depth}": f"fixed.{depth}.{{}}.correct" for depth in depths}
    by = [*SHAPE, "tau", "hops", "base"]
    parts = [
        runs[by].assign(style=style, **{head: runs[f"{START}.{name.format(style)}"] for head, name in columns.items()})
        for style in STYLES
    ]
    rows = pd.concat(parts).sort_values(by[:-1], kind="stable")
    return over_bases(rows, ["shape", "tau", "hops", "style"], {head: head for head in columns})

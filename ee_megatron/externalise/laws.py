"""Closed-form forecasts of a run, and the laws of a study: layers that a hop takes, the penalty at which models begin
to write their steps.

The forecast (objectives/optimum.py has the formula and its sources) uses what was measured before RL, the style given,
so nothing is fitted. It assumes that these figures stay; styles that RL hardly writes any more get worse.

The penalty λ is charged on shares of the L layers, so one layer costs λ / L: laws give both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pandas as pd

from ..objectives.optimum import answer_costs, closed_form, takeover_price
from .study import (
    CAP,
    COSTS,
    FIGURES,
    FREE,
    NO_EXITS,
    OTHER,
    PADDED,
    REINFORCED,
    SHAPE,
    START,
    STEPS,
    STYLES,
    TEACHER,
    TERSE,
    depth_of_hops,
    shares_of,
)

Row = Mapping[str, Any]  # of the study's data frame


def reference_shares(row: Row) -> dict[str, float]:
    """The teacher's shares of the styles, without answers in no style; if not measured, the corpus'."""
    source = f"{TEACHER}.free.share." if row[f"{TEACHER}.free.n"] > 0 else "corpus."
    return shares_of({style: row[source + style] for style in STYLES}, STYLES)


def values_and_costs(row: Row, exits: str, cost: str) -> tuple[dict[str, float], dict[str, float]]:
    """By style, before RL under `exits`: an answer's value without the penalty, and the cost that λ multiplies."""
    value, charged = {}, {}
    for style in STYLES:
        figures = {figure: row.get(f"{START}.{exits}.{style}.{figure}", math.nan) for figure in FIGURES}
        value[style] = figures["correct"] - row["lambda_length"] * figures["length"] / row["cost_length"]
        charged[style] = answer_costs(figures, row["cost_length"])[cost]
    return value, charged


def forecast(row: Row, lambda_exit: float | None = None) -> dict[str, float]:
    """Forecast of the styles' shares after RL from measurements before it, at `lambda_exit` or the run's; or NaN."""
    exits = {CAP: f"fixed.{row['fixed_depth']}", NO_EXITS: "forced_full"}.get(row["kind"], "forced")
    value, charged = values_and_costs(row, exits, row["depth_cost"])
    weight = row["lambda_exit"] if lambda_exit is None else lambda_exit
    net = {style: value[style] - weight * charged[style] for style in STYLES}
    reference = reference_shares(row)
    if any(map(math.isnan, (*net.values(), *reference.values()))):
        return dict.fromkeys(STYLES, math.nan)
    return closed_form(reference, net, row["beta"])


def padding_odds(row: Row) -> float:
    """log of padded to terse answers. One answer is added, shared as in the corpus, so that the odds are finite; where
    hardly any of both are left they are the corpus'."""
    corpus = row[f"corpus.{PADDED}"] + row[f"corpus.{TERSE}"]
    free = f"{REINFORCED}.free"
    padded, terse = (
        row[f"{free}.share.{style}"] * row[f"{free}.n"] + row[f"corpus.{style}"] / corpus for style in (PADDED, TERSE)
    )
    return math.log(padded / terse)


def with_forecast(runs: pd.DataFrame) -> pd.DataFrame:
    """The study's data frame with the columns of externalise.csv: measurements and their forecasts."""
    names = {f"{REINFORCED}.free.share.{style}": f"share_{style}" for style in (*STYLES, OTHER)}
    names |= {f"{REINFORCED}.free.{figure}": figure for figure in ("n", *FIGURES)}
    names |= {f"{REINFORCED}.forced.{style}.correct": f"right_{style}" for style in STYLES}
    names |= {f"{REINFORCED}.forced_full.{TERSE}.correct": "right_terse_full"}
    names |= {f"{START}.forced.{TERSE}.correct": "start_right_terse"}
    names |= {f"{START}.forced_full.{TERSE}.correct": "start_right_terse_full"}
    names |= {f"{REINFORCED}.corrupted.correct": "corrupted_right"}
    names |= {f"{REINFORCED}.corrupted.followed": "corrupted_followed"}
    rows = runs.to_dict("records")
    expected = pd.DataFrame([forecast(row) for row in rows], index=runs.index).add_prefix("forecast_")
    odds = pd.Series([padding_odds(row) for row in rows], runs.index, name="log_odds_padded_terse")
    return pd.concat([runs, runs[list(names)].rename(columns=names), expected, odds], axis=1)


def runs_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns of externalise.csv: a row per run and family that it trained on."""
    first = ["task", *SHAPE[:3], "base", "seed", "tau", "family", "hops", "trained_on", "condition", "kind", "number"]
    last = runs.loc[:, f"share_{STYLES[0]}" :].columns
    return runs.loc[runs["trained"], [*first, "lambda_exit", *last, "path"]].rename(columns={"path": "evaluation"})


def crossing(shares: Mapping[float, float], level: float) -> float:
    """The lowest penalty at which `shares` (penalty -> share) reach the level, interpolated linearly between
    neighbours. 0 if they reach it without one; NaN if they never do, or already do at a lowest penalty above 0."""
    points = sorted(shares.items())
    if points and points[0][1] >= level:
        return 0.0 if points[0][0] == 0 else math.nan
    for (price, share), (next_price, next_share) in pairwise(points):
        if share < level <= next_share:
            return price + (level - share) / (next_share - share) * (next_price - price)
    return math.nan


def laws(runs: pd.DataFrame, level: float) -> pd.DataFrame:
    """Table laws.csv with a row per shape, tokens a step, family, cost of depth and base, RL seeds averaged
    (docs/scaling.md). `level`: the share of steps whose penalty is given. `runs`: as `with_forecast` returns them.

    Bases that only had fixed depths or a charge on length have no row. Where other bases were trained on a family
    alone, a base that was not has no prices, but has what was measured before RL.
    """
    line = runs[runs["trained"] & ((runs["condition"] == FREE) | runs["priced"])]
    groups = line.sort_values("compared", ascending=False, kind="stable").groupby(
        [*SHAPE, "tau", "hops", "family"], dropna=False
    )
    return pd.DataFrame(
        _law(runs, of_base, cost, level)
        for _, of_family in groups
        for cost in COSTS
        for _, of_base in of_family.groupby("base")
    )


def _law(runs: pd.DataFrame, of_base: pd.DataFrame, cost: str, level: float) -> dict[str, Any]:
    """One base on one family. `of_base`: its runs that paid for depth or nothing, the compared ones first."""
    one = of_base.iloc[0]
    paid = of_base[of_base["compared"] & ((of_base["condition"] == FREE) | (of_base["kind"] == cost))]
    shares = paid.groupby("number")["share_steps"].mean().to_dict()
    alike = runs[runs["origin"] == one["origin"]].drop_duplicates("family")
    own, full, layers = f"{START}.forced", f"{START}.forced_full", one["layers"]
    depths = layers * alike[f"{own}.{TERSE}.max_depth"]
    per_hop, at_no_hop = depth_of_hops(zip(alike["hops"], alike[f"{own}.{TERSE}.correct"], depths, strict=True))
    value, charged = values_and_costs(one, "forced", cost)
    prices = {
        "forecast": takeover_price(reference_shares(one), value, charged, one["beta"], STEPS, level),
        "observed": crossing(shares, level),
    }
    row: dict[str, Any] = {"model": f"{one['shape']}#{one['base']}"}
    row |= {name: one[name] for name in (*SHAPE[:3], "base", "tau", "family", "hops")} | {"cost": cost}
    row |= {f"layers_{style}": layers * one[f"{own}.{style}.max_depth"] for style in STYLES}
    row |= {f"depth_{style}": one[f"{own}.{style}.max_depth"] for style in STYLES}
    row |= {f"right_{style}": one[f"{own}.{style}.correct"] for style in STYLES}
    row |= {f"right_{style}_full": one[f"{full}.{style}.correct"] for style in STYLES}
    row |= {"level": level, "layers_per_hop": per_hop, "layers_at_no_hop": at_no_hop}
    for name, price in prices.items():
        row |= {f"price_{name}": price, f"price_{name}_per_layer": None if price is None else price / layers}
    return row | {"runs": len(paid)} | {f"share_steps_{number:g}": share for number, share in shares.items()}

"""Columns of a sweep's table from part "choice" of results.json: which style models write in where they may choose,
what each style takes of them, and the price of depth at which writing should take over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from ..config.schema import RLConfig
from ..objectives.optimum import Shares, answer_costs, takeover_price
from ..report.numbers import is_number, or_nan
from ..statistics import least_squares_line

TERSE, STEPS = "terse", "steps"
"""Styles of tasks/chains.py: all hops inside one token; a token, or a few, for each."""
CHOSEN = ("correct", "length", "mean_depth", "total_depth", "max_depth")
"""Of free answers; columns have the family behind the name, correct_hop3 for one."""
SKILLED = 0.8
"""Least share of right terse answers for the family's depth to count as that of its hops: a model that can't follow a
chain in its layers runs all of them, however long the chain is, and the line would be flat."""
COSTS = ("mean", "max", "total")

Columns = dict[str, float | None]
Families = Mapping[str, Mapping[str, Any]]
"""Family -> a model's entry in the part."""


class Priced(Protocol):
    """What of the settings of RL, besides the price of depth, says what a style is worth."""

    @property
    def beta(self) -> float: ...
    @property
    def cost_length(self) -> int: ...
    @property
    def lambda_length(self) -> float: ...


class OfSettings(NamedTuple):
    """`Priced`, of a run's settings."""

    beta: float
    cost_length: int
    lambda_length: float


def chosen_styles(choice: Mapping[str, Any], rl: RLConfig) -> Columns:
    """The last model's free answers and forced styles by family, where evaluate.style_choice.models asked for them;
    the forced ones of the policy that RL began with as `start_...`, with the prices at which steps should take over.
    None: not defined.
    """
    models = {name: model["families"] for name, model in choice.get("models", {}).items()}
    if not models:
        return {}
    # Held to one depth a style's depth says nothing of it.
    layers = 0 if rl.fixed_depth else int(choice.get("num_layers", 0))
    last = list(models.values())[-1]
    columns = free_answers(last) | forced_styles(last, layers)
    if (start := models.get("start")) is None:
        return columns
    before = forced_styles(start, layers)
    if layers:
        before |= takeover_prices(start, _references(choice), rl)
    return columns | {f"start_{name}": value for name, value in before.items()}


def free_answers(families: Families) -> Columns:
    """Shares of the styles, and CHOSEN."""
    columns: Columns = {}
    for family, entry in families.items():
        free = entry["free"]
        columns |= {f"share_{style}_{family}": share for style, share in free["share"].items()}
        columns |= {f"{name}_{family}": free[name] for name in CHOSEN}
    return columns


def forced_styles(families: Families, layers: int) -> Columns:
    """By style and family how often the answer is right when the style is given, and how many of the `layers` its
    deepest token takes, mean over answers; with several families `layers_per_hop`, and `layers_at_no_hop`, the same
    line's intercept. Without depths for `layers` 0."""
    columns: Columns = {}
    terse = []
    for family, entry in families.items():
        for style, figures in (entry.get("forced") or {}).items():
            right, depth = or_nan(figures.get("correct")), layers * or_nan(figures.get("max_depth"))
            columns[f"right_{style}_{family}"] = _known(right)
            if layers:
                columns[f"layers_{style}_{family}"] = _known(depth)
            if style == TERSE:
                terse.append((int(entry["hops"]), right, depth))
    if layers and len(families) > 1:
        slope, intercept = depth_of_hops(terse)
        columns |= {"layers_per_hop": _known(slope), "layers_at_no_hop": _known(intercept)}
    return columns


def depth_of_hops(terse: Iterable[tuple[int, float, float]]) -> tuple[float, float]:
    """Layers per hop, and those that an answer of none would take: the least-squares line through (hops, share of right
    answers, layers of the deepest token) of terse answers, those that SKILLED lets in. NaN where they are fewer than
    two."""
    skilled = [(hops, layers) for hops, right, layers in terse if right >= SKILLED]
    return least_squares_line([hops for hops, _ in skilled], [layers for _, layers in skilled])


def takeover_prices(families: Families, references: Mapping[str, Shares], rl: RLConfig) -> Columns:
    """`steps_price` by cost of depth and family, `price_max_hop3` for one. `references`: family -> shares of the styles
    among the reference's answers."""
    columns: Columns = {}
    penalty = rl.depth_penalty
    priced = OfSettings(rl.kl_penalty.weight, penalty.cost_tokens, penalty.length_weight)
    for family, entry in families.items():
        forced = {
            style: {name: or_nan(value) for name, value in figures.items()}
            for style, figures in (entry.get("forced") or {}).items()
        }
        for cost in COSTS:
            columns[f"price_{cost}_{family}"] = steps_price(forced, references[family], priced, cost)
    return columns


def steps_price(
    forced: Mapping[str, Mapping[str, float]], reference: Shares, objective: Priced, cost: str, level: float = 0.5
) -> float | None:
    """The least price of depth, charged for `cost`, from which on the closed form has the share `level` of the answers
    in steps (objectives/optimum.py); None where there is none. `forced`: figures of every style when it is given,
    before RL."""
    if STEPS not in forced or not set(reference) <= set(forced):
        return None
    charged = {style: answer_costs(figures, objective.cost_length)[cost] for style, figures in forced.items()}
    worth = {
        style: figures["correct"] - objective.lambda_length * figures["length"] / objective.cost_length
        for style, figures in forced.items()
    }
    return takeover_price(reference, worth, charged, objective.beta, STEPS, level)


def shares_of(written: Shares, styles: Iterable[str]) -> dict[str, float]:
    """The styles' shares among answers in any of them; NaN where there are none."""
    found = {style: or_nan(written.get(style)) for style in styles}
    total = sum(found.values())
    return {style: share / total if total else math.nan for style, share in found.items()}


def _references(choice: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Family -> the teacher's shares, the corpus' where it was not measured."""
    corpus = dict(zip(choice["styles"], choice["weights"], strict=True))
    teacher = choice["models"].get("teacher", {}).get("families", {})
    return {
        family: shares_of(teacher[family]["free"]["share"] if family in teacher else corpus, corpus)
        for family in choice["models"]["start"]["families"]
    }


def _known(value: float) -> float | None:
    return value if is_number(value) else None

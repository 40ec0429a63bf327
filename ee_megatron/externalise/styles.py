"""Styles of answers to chains of hops: layers per hop, and the price of depth at which written steps take over."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from ..objectives.optimum import Shares, answer_costs, takeover_price
from ..report.numbers import or_nan
from ..statistics import least_squares_line

TERSE, STEPS = "terse", "steps"
"""Styles of tasks/chains.py: all hops inside one token; a token, or a few, for each."""
SKILLED = 0.8
"""Least share of right terse answers for the family's depth to count as that of its hops: a model that can't follow a
chain in its layers runs all of them, however long the chain is, and the line would be flat."""


class Priced(Protocol):
    """What of the settings of RL, besides the price of depth, says what a style is worth."""

    @property
    def beta(self) -> float: ...
    @property
    def cost_length(self) -> int: ...
    @property
    def lambda_length(self) -> float: ...


def depth_of_hops(terse: Iterable[tuple[int, float, float]]) -> tuple[float, float]:
    """Layers per hop, and those that an answer of none would take: the least-squares line through (hops, share of right
    answers, layers of the deepest token) of terse answers, those that SKILLED lets in. NaN where they are fewer than
    two."""
    skilled = [(hops, layers) for hops, right, layers in terse if right >= SKILLED]
    return least_squares_line([hops for hops, _ in skilled], [layers for _, layers in skilled])


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

"""Controls for learnt exits: exit rules with less information, and whether the gates are calibrated.

A gain of learnt exits over full depth says little: any rule that exits early saves depth. What has to be shown is that
at the same depth the policy is more accurate than these rules, or as accurate with less depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..exit_rules import CONTROLS, Dial, DialRange, ExitRule, Threshold
from ..exits import target_hazards
from ..statistics import bootstrap_interval
from .evaluate import AnswerRecord, EvaluationRow
from .results import paired_test, pairs_of

TOLERANCE = 0.01  # mean depths count as the same within this, relative
TRIALS = 20
ACCURACY_TRIALS = 8


def marginal_exits(answers: Sequence[AnswerRecord], outcomes: Sequence[int], first_token: bool = False) -> list[float]:
    """Share of each outcome over all tokens; first tokens count only with `first_token`. ValueError without tokens."""
    depths = [t["depth"] for a in answers for t in a["tokens"][not first_token :]]
    if not depths:
        raise ValueError("answers of one token have no exits to measure; raise rollout.max_new_tokens")
    return [depths.count(outcome) / len(depths) for outcome in outcomes]


@dataclass
class Matched:
    """A control at one dial setting. target: the value to match; row: its validation results. within: the mean depth
    matches the target up to `TOLERANCE` (for accuracy: it reaches the target). tried: dial settings, with results."""

    policy: ExitRule
    row: EvaluationRow
    target: float
    within: bool
    trials: int = 0
    tried: list[tuple[float, EvaluationRow]] = field(default_factory=list)


Measure = Callable[[ExitRule], EvaluationRow]


def match_depth(measure: Measure, dial: Dial, target: float, trials: int = TRIALS) -> Matched:
    """Find the exit rule on a dial whose measured mean depth is nearest to the target's.

    By bisection. The depth is only nearly monotone, and it may jump over the target where many tokens share a value:
    then two settings on either side are mixed token by token, and the share is bisected. Raises ValueError for a target
    outside 0..1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"mean depth {target} to match: expected a share of the layers, above 0 and at most 1")

    def search(policy: Dial, count: int) -> list[tuple[float, ExitRule, EvaluationRow]]:
        """The dial settings that were tried, the exit rule at each and its results."""
        low, high, measured = 0.0, 1.0, []
        for _ in range(count):
            middle = (low + high) / 2
            exits = policy(middle)
            measured.append((middle, exits, row := measure(exits)))
            if abs(row.mean_depth / target - 1) <= TOLERANCE / 5:
                break
            low, high = (middle, high) if row.mean_depth < target else (low, middle)
        return measured

    tried = on_dial = search(dial, trials // 2)
    below = [one for one in on_dial if one[2].mean_depth / target - 1 < -TOLERANCE]
    above = [one for one in on_dial if one[2].mean_depth / target - 1 > TOLERANCE]
    if len(below) + len(above) == len(on_dial) and below and above:
        shallow, deep = max(below, key=lambda one: one[2].mean_depth), min(above, key=lambda one: one[2].mean_depth)
        tried = on_dial + search(lambda share: shallow[1].mixed(deep[1], share), trials - len(on_dial))
    _, policy, row = min(tried, key=lambda one: abs(one[2].mean_depth - target))
    within = abs(row.mean_depth / target - 1) <= TOLERANCE
    return Matched(policy, row, target, within, len(tried), [(place, row) for place, _, row in on_dial])


def match_accuracy(
    measure: Measure, dial: Dial, target: float, tried: Sequence[tuple[float, EvaluationRow]] = (),
    trials: int = ACCURACY_TRIALS,
) -> Matched:  # fmt: skip
    """Find by bisection the shallowest setting at which a control is as accurate as the target; settings in `tried` are
    reused. If none reaches the target: the most accurate setting, with `within` False."""

    def reaches(row: EvaluationRow) -> bool:
        return row.accuracy >= target - 1e-9

    seen = list(tried)
    if not any(reaches(row) for _, row in seen):
        seen.append((1.0, measure(dial(1.0))))
    low = max((place for place, row in seen if not reaches(row)), default=0.0)
    high = min((place for place, row in seen if reaches(row)), default=0.0)
    while high > low and len(seen) - len(tried) < trials:
        place = (low + high) / 2
        seen.append((place, measure(dial(place))))
        low, high = (low, place) if reaches(seen[-1][1]) else (place, high)
    enough = [pair for pair in seen if reaches(pair[1])]
    place, row = min(enough, key=lambda p: p[1].mean_depth) if enough else max(seen, key=lambda p: p[1].accuracy)
    return Matched(dial(place), row, target, bool(enough), len(seen) - len(tried), seen)


def compare(reference: Sequence[AnswerRecord], control: Sequence[AnswerRecord]) -> dict[str, Any]:
    """Accuracy of the reference minus that of the control on the prompts that both answered, tested by `paired_test`:
    {"difference": {"value", "low", "high"}, "only_reference", "only_control", "p_value", "n"}."""
    pairs = pairs_of(control, reference)
    test, difference = paired_test(pairs)
    right_alone = {"only_reference": test.only_second, "only_control": test.only_first}
    return {"difference": difference._asdict(), **right_alone, "p_value": test.p_value, "n": len(pairs)}


BINS = 10
RESAMPLES = 500


def gate_calibration(
    hazards: Sequence[np.ndarray], divergences: Sequence[np.ndarray], kl_factor: float, exit_depths: Sequence[int]
) -> dict[str, Any] | None:
    """Reliability of the hazards against the target hazards 1 - tanh(c d / 2), c = kl_factor, d the divergence in nats.

    hazards[i], divergences[i]: float [T_i, M] of answer i, NaN where no gate decides (`Inspection`). Bins of equal
    width over the hazard; ECE = Σ_b n_b/N |mean hazard_b - mean target_b| (Naeini et al., AAAI 2015; Guo et al. 2017,
    arXiv 1706.04599, here with a target that is a probability instead of a label). A gate may be right on average
    in each bin without any information: `mean_error`, the mean of |hazard - target|, shows it.

    {"ece", "mean_error": {"value", "low", "high"}, "asked", "bins": [{"hazard", "target", "asked"}],
    "exits": [{"depth", "ece", "hazard", "target", "asked"}]}; None if no gate decided. Intervals are 95 % over
    answers; that of the ECE shares its upward bias where bins hold few.
    """
    # Answers, exits, bins, (count, hazard, target, |difference|).
    stacked = np.array([_sums(h, d, kl_factor) for h, d in zip(hazards, divergences, strict=True) if len(h)])
    if not stacked.size or stacked[..., 0].sum() == 0:
        return None

    def ece(sums: np.ndarray) -> float:
        """Of [..., B, 4], bins of all that stands before them together."""
        bins = sums.reshape(-1, BINS, 4).sum(0)
        return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()) if bins[:, 0].any() else math.nan

    def mean_error(sums: np.ndarray) -> float:
        count = sums[..., 0].sum()
        return float(sums[..., 3].sum() / count) if count else math.nan

    def means(sums: np.ndarray) -> dict[str, Any]:
        return {"hazard": float(sums[1] / sums[0]), "target": float(sums[2] / sums[0]), "asked": int(sums[0])}

    total = stacked.sum(0)
    return {
        "ece": bootstrap_interval(stacked, ece, resamples=RESAMPLES)._asdict(),
        "mean_error": bootstrap_interval(stacked, mean_error, resamples=RESAMPLES)._asdict(),
        "asked": int(total[..., 0].sum()),
        "bins": [means(sums) for sums in total.sum(0) if sums[0] > 0],
        "exits": [
            {"depth": int(depth), "ece": ece(bins), **means(bins.sum(0))}
            for depth, bins in zip(exit_depths, total, strict=True)
            if bins[:, 0].any()
        ],
    }


def _sums(hazards: np.ndarray, divergences: np.ndarray, kl_factor: float) -> np.ndarray:
    """float [M, BINS, 4]: per exit and bin the count and the sums of hazard, target and their absolute difference."""
    h = np.asarray(hazards, dtype=np.float64)
    target = target_hazards(torch.from_numpy(np.asarray(divergences, dtype=np.float64)), kl_factor).numpy()
    gate_mask = ~(np.isnan(h) | np.isnan(target))
    exits, (h, target) = np.nonzero(gate_mask)[1], (h[gate_mask], target[gate_mask])
    table = np.zeros((hazards.shape[1], BINS, 4))
    places = exits, np.minimum((h * BINS).astype(int), BINS - 1)
    np.add.at(table, places, np.stack([np.ones_like(h), h, target, np.abs(h - target)], axis=-1))
    return table


@dataclass(frozen=True)
class Reference:
    """The policy under test: its name, exit rule and results on the validation and the test split."""

    model: str
    exits: ExitRule
    validation: EvaluationRow
    validation_answers: Sequence[AnswerRecord]
    test: EvaluationRow
    test_answers: Sequence[AnswerRecord]


class ControlMeasurer(Protocol):
    """The part of `Measurer` that controls need."""

    def load(self, checkpoint: Path) -> None: ...

    def on_validation(self, model: str, exits: ExitRule) -> EvaluationRow: ...

    def on_test(self, model: str, exits: ExitRule) -> tuple[EvaluationRow, list[AnswerRecord]]: ...


@dataclass(frozen=True)
class ControlRule:
    """A control: its name, the model whose weights it runs on, and its dial."""

    name: str
    model: str
    checkpoint: Path
    dial: Dial


def all_controls(
    reference: Reference,
    checkpoints: dict[str, Path],
    outcomes: Sequence[int],
    vocab: int,
    other: tuple[str, Path] | None,
    first_token: bool = False,
) -> list[ControlRule]:
    """All controls: every control rule on the reference's own weights, then the gates of other policies: calibrated but
    not reinforced, and those of `other` (name and checkpoint)."""
    model, own = reference.model, checkpoints[reference.model]
    span = DialRange(outcomes, vocab, marginal_exits(reference.validation_answers, outcomes, first_token))
    gates = Threshold.sweep_curve(span)
    controls = [ControlRule(rule.control, model, own, rule.sweep_curve(span)) for rule in CONTROLS]
    if model != "calibrated":
        controls.append(ControlRule("calibrated gates", "calibrated", checkpoints["calibrated"], gates))
    if other is not None:
        controls.append(ControlRule(other[0], *other, gates))
    return controls


def run_controls(
    judge: ControlMeasurer, reference: Reference, controls: Sequence[ControlRule], done: Callable[[EvaluationRow], None]
) -> list[dict[str, Any]]:
    """Results of the reference, then two per control: at its mean depth and at its accuracy; plain JSON values."""
    validation = reference.validation
    itself = Matched(reference.exits, validation, validation.mean_depth, within=True)
    entries = [_entry(f"({reference.model})", "itself", reference, itself, reference.test, reference.test_answers)]
    for control in controls:
        judge.load(control.checkpoint)
        measure = partial(judge.on_validation, control.model)
        depth = match_depth(measure, control.dial, validation.mean_depth)
        accuracy = match_accuracy(measure, control.dial, validation.accuracy, depth.tried)
        for matched_by, matched in (("depth", depth), ("accuracy", accuracy)):
            row, answers = judge.on_test(control.model, matched.policy)
            entries.append(_entry(control.name, matched_by, reference, matched, row, answers))
            done(row)
    return entries


def _entry(
    name: str,
    matched_by: str,
    reference: Reference,
    matched: Matched,
    row: EvaluationRow,
    answers: Sequence[AnswerRecord],
) -> dict[str, Any]:
    return {
        "control": name,
        "matched_by": matched_by,
        "model": row.model,
        "exits": matched.policy.label,
        "policy": matched.policy.to_results(),
        # On validation, where the matching was done; how near it is on the test split stands beside it.
        "target": matched.target,
        "validation": asdict(matched.row),
        "within": matched.within,
        "trials": matched.trials,
        "row": asdict(row),
        "depth_ratio": row.mean_depth / reference.test.mean_depth,
        "comparison": compare(reference.test_answers, answers),
    }

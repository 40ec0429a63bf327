"""What learnt exits are held against: exit rules that know less, and whether the gates are calibrated.

A gain of learnt exits over full depth says little: any rule that exits early saves depth. What has to be shown is that
at the same depth the policy is more accurate than rules that know less, or as accurate with less depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..exit_rules import CONTROLS, Dial, DialRange, ExitRule, Threshold
from ..exits import target_hazards
from ..statistics import bootstrap_interval
from .evaluate import Answer, EvaluationRow
from .results import pair_up, paired_test

TOLERANCE = 0.01  # mean depths count as the same within this, relative
TRIALS = 20
ACCURACY_TRIALS = 8


def marginal_exits(answers: Sequence[Answer], outcomes: Sequence[int], first_token: bool = False) -> list[float]:
    """Shares of the outcomes over all tokens; answers' first count only where `first_token`. ValueError for none."""
    depths = [t["depth"] for a in answers for t in a["tokens"][not first_token :]]
    if not depths:
        raise ValueError("answers of one token each have no exits; raise rollout.max_new_tokens")
    return [depths.count(outcome) / len(depths) for outcome in outcomes]


@dataclass
class Matched:
    """A control at a place on its dial. target: what was to be matched; row: what was measured there, on validation.
    within: the mean depth is the target's up to `TOLERANCE` (of accuracy: it reaches the target). tried: places on the
    dial and what was measured there."""

    policy: ExitRule
    row: EvaluationRow
    target: float
    within: bool
    trials: int = 0
    tried: list[tuple[float, EvaluationRow]] = field(default_factory=list)


Measure = Callable[[ExitRule], EvaluationRow]


def match_depth(measure: Measure, dial: Dial, target: float, trials: int = TRIALS) -> Matched:
    """The exit policy on a dial whose measured mean depth is the target's: the nearest of those that were tried.

    By bisection. The depth is only nearly monotone, and it may jump over the target where many tokens share a value:
    then two places on either side are mixed token by token, and the share is bisected. Raises ValueError for a target
    outside 0..1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"mean depth {target} to match: expected a share of the layers, above 0 and at most 1")
    tried: list[tuple[float, EvaluationRow]] = []
    policies: list[ExitRule] = []

    def off(row: EvaluationRow) -> float:
        return row.mean_depth / target - 1

    def search(policy: Dial, place: Callable[[float], float], count: int) -> None:
        low, high = 0.0, 1.0
        for _ in range(count):
            middle = (low + high) / 2
            policies.append(policy(middle))
            tried.append((place(middle), measure(policies[-1])))
            if abs(off(tried[-1][1])) <= TOLERANCE / 5:
                return
            low, high = (middle, high) if off(tried[-1][1]) < 0 else (low, middle)

    search(dial, lambda position: position, trials // 2)
    on_dial = list(tried)
    below = [pair for pair in on_dial if off(pair[1]) < -TOLERANCE]
    above = [pair for pair in on_dial if off(pair[1]) > TOLERANCE]
    if len(below) + len(above) == len(on_dial) and below and above:
        shallow, deep = max(below, key=lambda p: p[1].mean_depth)[0], min(above, key=lambda p: p[1].mean_depth)[0]
        search(lambda share: dial(shallow).mixed(dial(deep), share), lambda _: math.nan, trials - len(tried))
    policy, (_, row) = min(zip(policies, tried, strict=True), key=lambda pair: abs(pair[1][1].mean_depth - target))
    return Matched(policy, row, target, abs(off(row)) <= TOLERANCE, len(tried), on_dial)


def match_accuracy(
    measure: Measure, dial: Dial, target: float, tried: Sequence[tuple[float, EvaluationRow]] = (),
    trials: int = ACCURACY_TRIALS,
) -> Matched:  # fmt: skip
    """The least depth tried at which a control is as accurate as the target, by bisection; `tried` places are used
    again. If nothing that was tried is, the most accurate place with `within` False."""

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


def compare(reference: Sequence[Answer], control: Sequence[Answer]) -> dict[str, Any]:
    """Reference minus control in accuracy on the prompts that both answered, as `paired_test` has it: {"difference":
    {"value", "low", "high"}, "only_reference", "only_control", "p_value", "n"}."""
    pairs = pair_up(control, reference)
    test, difference, _ = paired_test(pairs)
    right_alone = {"only_reference": test.only_second, "only_control": test.only_first}
    return {"difference": difference._asdict(), **right_alone, "p_value": test.p_value, "n": len(pairs)}


BINS = 10
RESAMPLES = 500


def gate_calibration(
    hazards: Sequence[np.ndarray], divergences: Sequence[np.ndarray], kl_factor: float, exit_depths: Sequence[int]
) -> dict[str, Any] | None:
    """Reliability of the hazards against the target hazards 1 - tanh(c d / 2), c = kl_factor, d the divergence in nats.

    hazards[i], divergences[i]: float [T_i, M] of answer i, NaN where a gate was not asked (`Inspection`). Bins of equal
    width over the hazard; ECE = Σ_b n_b/N |mean hazard_b - mean target_b| (Naeini et al., AAAI 2015; Guo et al. 2017,
    arXiv 1706.04599, here with a target that is a probability instead of a label). A gate may be on average right in
    each bin and know nothing: `mean_error`, the mean of |hazard - target|, is the figure that sees it.

    {"ece", "mean_error": {"value", "low", "high"}, "asked", "bins": [{"hazard", "target", "asked"}],
    "exits": [{"depth", "ece", "hazard", "target", "asked"}]}; None if no gate was asked. Intervals are 95 % over
    answers; that of the ECE shares its upward bias where bins hold few.
    """
    tables = [_sums(h, d, kl_factor) for h, d in zip(hazards, divergences, strict=True) if len(h)]
    stacked = np.array(tables)  # answers, exits, bins, (count, hazard, target, |difference|)
    if not len(stacked) or stacked[..., 0].sum() == 0:
        return None

    def mean_error(sample: np.ndarray) -> float:
        count = sample[..., 0].sum()
        return float(sample[..., 3].sum() / count) if count else math.nan

    total = stacked.sum(0)
    exits = [(int(depth), bins, bins.sum(0)) for depth, bins in zip(exit_depths, total, strict=True)]

    def means(sums: np.ndarray) -> dict[str, Any]:
        return {"hazard": float(sums[1] / sums[0]), "target": float(sums[2] / sums[0]), "asked": int(sums[0])}

    return {
        "ece": bootstrap_interval(stacked, lambda sample: _ece(sample.sum((0, 1))), resamples=RESAMPLES)._asdict(),
        "mean_error": bootstrap_interval(stacked, mean_error, resamples=RESAMPLES)._asdict(),
        "asked": int(total[..., 0].sum()),
        "bins": [means(sums) for sums in total.sum(0) if sums[0] > 0],
        "exits": [{"depth": d, "ece": _ece(bins), **means(sums)} for d, bins, sums in exits if sums[0] > 0],
    }


def _ece(bins: np.ndarray) -> float:
    """Bins [B, >= 3] of (count, sum of hazards, sum of targets)."""
    count = bins[:, 0].sum()
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / count) if count else math.nan


def _sums(hazards: np.ndarray, divergences: np.ndarray, kl_factor: float) -> np.ndarray:
    """float [M, BINS, 4]: per exit and bin the count and the sums of hazard, target and their absolute difference."""
    h = np.asarray(hazards, dtype=np.float64)
    target = target_hazards(torch.from_numpy(np.asarray(divergences, dtype=np.float64)), kl_factor).numpy()
    asked = ~(np.isnan(h) | np.isnan(target))
    place = np.minimum((np.where(asked, h, 0.0) * BINS).astype(int), BINS - 1)
    table = np.zeros((h.shape[1], BINS, 4))
    exits = np.broadcast_to(np.arange(h.shape[1]), h.shape)
    for k, values in enumerate((np.ones_like(h), h, target, np.abs(h - target))):
        np.add.at(table[..., k], (exits[asked], place[asked]), values[asked])
    return table


@dataclass(frozen=True)
class Reference:
    """The policy under test: its name and exit rule, what it did on validation and on the test split."""

    model: str
    exits: ExitRule
    validation: EvaluationRow
    validation_answers: Sequence[Answer]
    test: EvaluationRow
    test_answers: Sequence[Answer]


class ControlMeasurer(Protocol):
    """What controls need of a `Measurer`."""

    def load(self, checkpoint: Path) -> None: ...

    def on_validation(self, model: str, exits: ExitRule) -> EvaluationRow: ...

    def on_test(self, model: str, exits: ExitRule) -> tuple[EvaluationRow, list[Answer]]: ...


@dataclass(frozen=True)
class ControlRule:
    """A rule: its name, the model whose weights it runs on, and its dial."""

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
    """Every rule that is a control, on the reference's own weights; then other policies' gates: calibrated but not
    reinforced, and those of `other`, a policy by its name and checkpoint."""
    model, own = reference.model, checkpoints[reference.model]
    span = DialRange(outcomes, vocab, marginal_exits(reference.validation_answers, outcomes, first_token))
    controls = [ControlRule(rule.control, model, own, rule.dial(span)) for rule in CONTROLS]
    gates = Threshold.dial(span)
    if model != "calibrated":
        controls.append(ControlRule("calibrated gates", "calibrated", checkpoints["calibrated"], gates))
    if other is not None:
        name, checkpoint = other
        controls.append(ControlRule(name, name, checkpoint, gates))
    return controls


def run_controls(
    judge: ControlMeasurer, reference: Reference, controls: Sequence[ControlRule], done: Callable[[EvaluationRow], None]
) -> list[dict[str, Any]]:
    """One entry for the reference, then two per control: at its mean depth, at its accuracy; plain JSON values."""
    entries = [_entry(f"({reference.model})", "itself", reference, None, reference.test, reference.test_answers)]
    for control in controls:
        judge.load(control.checkpoint)

        def measure(exits: ExitRule, model: str = control.model) -> EvaluationRow:
            return judge.on_validation(model, exits)

        depth = match_depth(measure, control.dial, reference.validation.mean_depth)
        accuracy = match_accuracy(measure, control.dial, reference.validation.accuracy, depth.tried)
        for matched_by, matched in (("depth", depth), ("accuracy", accuracy)):
            row, answers = judge.on_test(control.model, matched.policy)
            entries.append(_entry(control.name, matched_by, reference, matched, row, answers))
            done(row)
    return entries


def _entry(
    name: str,
    matched_by: str,
    reference: Reference,
    matched: Matched | None,
    row: EvaluationRow,
    answers: Sequence[Answer],
) -> dict[str, Any]:
    policy = matched.policy if matched else reference.exits
    return {
        "control": name,
        "matched_by": matched_by,
        "model": row.model,
        "exits": policy.label,
        "policy": policy.to_results(),
        # On validation, where the matching was done; how near it is on the test split stands beside it.
        "target": matched.target if matched else reference.validation.mean_depth,
        "validation": asdict(matched.row if matched else reference.validation),
        "within": matched.within if matched else True,
        "trials": matched.trials if matched else 0,
        "row": asdict(row),
        "depth_ratio": row.mean_depth / reference.test.mean_depth,
        "comparison": compare(reference.test_answers, answers),
    }

"""The evaluation's controls: every rule that knows less, matched on validation, measured on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..evaluation.controls import Matched, compare, marginal_exits, match_accuracy, match_depth
from ..evaluation.evaluate import Answer, EvaluationRow
from ..exit_rules import CONTROLS, Dial, DialRange, ExitRule, Threshold


@dataclass(frozen=True)
class Reference:
    """The policy under test: its name and exit rule, what it did on validation and on the test split."""

    model: str
    exits: ExitRule
    validation: EvaluationRow
    validation_answers: Sequence[Answer]
    test: EvaluationRow
    test_answers: Sequence[Answer]


class Judge(Protocol):
    """What controls are measured by. The weights named by `load` answer until the next `load`."""

    def load(self, checkpoint: Path) -> None: ...

    def on_validation(self, model: str, exits: ExitRule) -> EvaluationRow: ...

    def on_test(self, model: str, exits: ExitRule) -> tuple[EvaluationRow, list[Answer]]: ...


@dataclass(frozen=True)
class Control:
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
) -> list[Control]:
    """Every rule that is a control, on the reference's own weights; then other policies' gates: calibrated but not
    reinforced, and those of `other`, a policy by its name and checkpoint."""
    model, own = reference.model, checkpoints[reference.model]
    span = DialRange(outcomes, vocab, marginal_exits(reference.validation_answers, outcomes, first_token))
    controls = [Control(rule.control, model, own, rule.dial(span)) for rule in CONTROLS]
    gates = Threshold.dial(span)
    if model != "calibrated":
        controls.append(Control("calibrated gates", "calibrated", checkpoints["calibrated"], gates))
    if other is not None:
        name, checkpoint = other
        controls.append(Control(name, name, checkpoint, gates))
    return controls


def run_controls(
    judge: Judge, reference: Reference, controls: Sequence[Control], done: Callable[[EvaluationRow], None]
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

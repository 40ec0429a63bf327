"""The evaluation's controls from end to end on a planted judge: what is matched where, and what is measured once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ee_megatron.config.identity import to_yaml
from ee_megatron.config.schema import AccuracyTarget, DepthPenalty, RunConfig
from ee_megatron.evaluation.controls import ControlRule, Reference, all_controls, run_controls
from ee_megatron.evaluation.evaluate import AnswerRecord, EvaluationRow
from ee_megatron.exit_rules import CONTROLS, Entropy, ExitRule, Patience, Random, Threshold
from ee_megatron.report.tables import controls_table
from ee_megatron.training.stages import trained_as
from tests.by_hand import a_row, an_answer

OUTCOMES = (2, 4, 6)
CHECKPOINTS = {"calibrated": Path("calibrated"), "reinforced": Path("reinforced")}


def answers(correct: int) -> list[AnswerRecord]:
    return [an_answer(str(i), [6, 2, 2, 4], i < correct) for i in range(100)]


def row(model: str, depth: float, accuracy: float) -> EvaluationRow:
    return a_row(accuracy, depth, model=model)


class PlantedJudge:
    """Depth is what a rule asks for, a tenth more on the test split; accuracy rises with it from 0 to 1."""

    def __init__(self) -> None:
        self.loaded: Path | None = None
        self.calls: list[tuple[str, Path | None, str]] = []

    def load(self, checkpoint: Path) -> None:
        self.loaded = checkpoint

    def depth(self, exits: ExitRule) -> float:
        if isinstance(exits, Random):
            return float(np.dot(exits.shares, OUTCOMES)) / 6
        if isinstance(exits, Patience):
            return 1 / 3 + 2 / 3 * (exits.mean - 1) / 2
        share = exits.value if not isinstance(exits, Entropy) else 1 - exits.value / 5
        return 1 / 3 + 2 / 3 * max(0.0, float(share))

    def on_validation(self, model: str, exits: ExitRule) -> EvaluationRow:
        self.calls.append(("validation", self.loaded, model))
        return row(model, self.depth(exits), self.depth(exits))

    def on_test(self, model: str, exits: ExitRule) -> tuple[EvaluationRow, list[AnswerRecord]]:
        self.calls.append(("test", self.loaded, model))
        depth = 1.1 * self.depth(exits)
        return row(model, depth, depth), answers(round(100 * depth))


def reference(model: str) -> Reference:
    exits = Threshold(0.5)
    return Reference(model, exits, row(model, 0.5, 0.8), answers(80), row(model, 0.55, 0.85), answers(85))


def controls(model: str, other: tuple[str, Path] | None = None) -> list[ControlRule]:
    known = {name: path for name, path in CHECKPOINTS.items() if model == "reinforced" or name == model}
    return all_controls(reference(model), known, OUTCOMES, 130, other)


def test_the_rules_run_on_the_weights_they_are_about() -> None:
    names = [rule.control for rule in CONTROLS]
    assert [c.name for c in controls("calibrated")] == names
    found = controls("reinforced", ("lambda = 0", Path("unpriced")))
    assert [c.name for c in found] == [*names, "calibrated gates", "lambda = 0"]
    assert [str(c.checkpoint) for c in found] == ["reinforced"] * len(CONTROLS) + ["calibrated", "unpriced"]
    # The middle of the dial is the reference's own marginal, first tokens left out.
    assert found[1].dial(0.5).shares == pytest.approx((2 / 3, 1 / 3, 0.0))


def test_every_control_is_matched_on_validation_and_measured_once_on_the_test_split() -> None:
    judge, done = PlantedJudge(), []
    entries = run_controls(
        judge, reference("reinforced"), controls("reinforced", ("lambda = 0", Path("unpriced"))), done.append
    )
    json.dumps(entries)
    made = 2 * (len(CONTROLS) + 2)
    assert len(entries) == 1 + made and len(done) == made
    assert sum(where == "test" for where, _, _ in judge.calls) == made
    assert {(str(loaded), model) for _, loaded, model in judge.calls} == {
        ("reinforced", "reinforced"), ("calibrated", "calibrated"), ("unpriced", "lambda = 0"),
    }  # fmt: skip
    for entry in entries[1:]:
        if entry["matched_by"] == "depth":
            assert entry["target"] == 0.5 and entry["within"]
            assert entry["validation"]["mean_depth"] == pytest.approx(0.5, rel=0.01)
            # What it then does on the test split is said as it is: 0.55 here, as deep as the reference there.
            assert entry["row"]["mean_depth"] == pytest.approx(0.55, rel=0.01)
            assert entry["depth_ratio"] == pytest.approx(1.0, rel=0.01)
            # 55 of 100 right against the reference's 85.
            assert entry["comparison"]["difference"]["value"] == pytest.approx(0.30, abs=0.011)
            assert entry["comparison"]["p_value"] <= 1e-4
        elif entry["control"] == "random exits":
            # Its exits are never deeper than 4 of 6, so that it never gets as accurate.
            assert not entry["within"] and entry["validation"]["accuracy"] < 0.8
        else:
            assert entry["within"] and entry["target"] == 0.8
            assert 0.8 - 1e-9 <= entry["validation"]["accuracy"] < 0.85
    own = entries[0]
    assert own["control"] == "(reinforced)" and own["comparison"]["difference"]["value"] == 0
    assert "accuracy (!)" in controls_table(entries).text()


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"depth_penalty": DepthPenalty(weight=0.0)}, "lambda = 0"),
        ({"depth_penalty": DepthPenalty(weight=0.3, target=AccuracyTarget(margin=1.0))}, "lambda = 0.3 at first"),
        ({"fixed_depth": 30, "depth_penalty": DepthPenalty(weight=0.0)}, "trained at 30 layers"),
    ],
)
def test_another_policy_is_called_by_what_sets_its_run_apart(changed: dict[str, Any], name: str, tmp_path: Path):
    stage, checkpoint = tmp_path / "rl-01234567", tmp_path / "rl-01234567" / "checkpoints" / "step_9"
    cfg = RunConfig(name="x")
    cfg.model.path = "models/x"
    cfg.rl = replace(cfg.rl, **changed)  # type: ignore[arg-type]
    checkpoint.mkdir(parents=True)
    assert trained_as(checkpoint) == "another policy"
    (stage / "config.yaml").write_text(to_yaml(cfg))
    assert trained_as(checkpoint) == name
    assert trained_as(stage.rename(tmp_path / "calibrate-01234567") / "checkpoints" / "step_9") == "another policy"

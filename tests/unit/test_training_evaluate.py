"""The evaluation stage, without models: which threshold it chooses from planted rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ee_megatron.config.load import load
from ee_megatron.evaluation import EvaluationRow
from ee_megatron.exit_rules import Threshold
from ee_megatron.training.evaluate import Evaluation, Measured

# Right answers of 100 by threshold: validation's own can't tell them apart, wide ones can.
RIGHT = {"own": {0.1: 75, 0.9: 76}, "wide": {0.1: 40, 0.9: 47}}
DEPTH = {0.1: 0.5, 0.9: 0.6}


class Planted(Evaluation):
    def __init__(self, wide: bool) -> None:
        self.session: Any = SimpleNamespace(cfg=load(["experiment=smollm2", "evaluate.thresholds=[0.1,0.9]"]))
        self.validation: Any = "own"
        self.wide: Any = "wide" if wide else []
        self.meta, self.logged, self.more = {}, {}, {"pareto": {}}

    def try_out(self, model: str, rules: Any, prompts: Any) -> list[Measured]:
        assert all(isinstance(exits, Threshold) for exits in rules)
        return [Measured(exits, self.row(model, exits, prompts), [prompts], []) for exits in rules]

    def row(self, model: str, exits: Threshold, prompts: str) -> EvaluationRow:
        right, depth = RIGHT[prompts][exits.value], DEPTH[exits.value]
        return EvaluationRow(model, exits.label, 100, right, right / 100, 0.0, 1.0, depth, depth * 600, 20.0)


@pytest.mark.parametrize(("wide", "threshold"), [(False, 0.1), (True, 0.9)])
def test_wide_problems_choose_too_and_the_validation_splits_own_row_is_kept(wide: bool, threshold: float) -> None:
    work = Planted(wide)
    exits, row, answers, _ = work.choose("reinforced")
    assert isinstance(exits, Threshold)
    assert exits.value == threshold == work.meta["threshold_reinforced"] == work.logged["reinforced/threshold"]
    assert answers == ["own"] and row.correct == RIGHT["own"][threshold]
    assert [entry["accuracy"] for entry in work.meta["validation_reinforced"]] == [0.75, 0.76]
    assert ("wide_reinforced" in work.meta) == wide
    assert [entry["accuracy"] for entry in work.more["pareto"]["reinforced"]] == [0.75, 0.76]

"""The evaluation stage: which threshold it chooses from planted rows, how often it reads a tiny model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ee_megatron.config.load import load
from ee_megatron.config.schema import TaskConfig
from ee_megatron.evaluation.evaluate import EvaluationRow
from ee_megatron.exit_rules import Off, Sample, Speculate, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tasks import VerifierPool, make_task
from ee_megatron.training.answer_cache import AnswerCache
from ee_megatron.training.evaluate import Measured, Measurer, Part, choose, policy_part
from ee_megatron.types import Rollout
from tests.tiny import firing_policy, tiny_hf

# Right answers of 100 by threshold: validation's own can't tell them apart, wide ones can.
RIGHT = {"own": {0.1: 75, 0.9: 76}, "wide": {0.1: 40, 0.9: 47}}
DEPTH = {0.1: 0.5, 0.9: 0.6}
SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
TASK = make_task(TaskConfig("arithmetic", train=3, validation=4, evaluation=6))


class Planted(Measurer):
    def __init__(self, wide: bool) -> None:
        self.context: Any = SimpleNamespace(cfg=load(["experiment=smollm2", "evaluate.thresholds=[0.1,0.9]"]))
        self.validation: Any = "own"
        self.wide: Any = "wide" if wide else []
        self.bar: Any = SimpleNamespace(advance=lambda *done, **shown: None)

    def try_out(self, model: str, rules: Any, prompts: Any) -> list[Measured]:
        assert all(isinstance(exits, Threshold) for exits in rules)
        return [Measured(exits, self.row(model, exits, prompts), [prompts], []) for exits in rules]

    def row(self, model: str, exits: Threshold, prompts: str) -> EvaluationRow:
        right, depth = RIGHT[prompts][exits.value], DEPTH[exits.value]
        return EvaluationRow(model, exits.label, 100, right, right / 100, 0.0, 1.0, depth, depth * 600, 20.0)


@pytest.mark.parametrize(("wide", "threshold"), [(False, 0.1), (True, 0.9)])
def test_wide_problems_choose_too_and_the_validation_splits_own_row_is_kept(wide: bool, threshold: float) -> None:
    part = Part()
    exits, row, answers, _ = choose(Planted(wide), part, "reinforced")
    assert isinstance(exits, Threshold)
    assert exits.value == threshold == part.meta["threshold_reinforced"] == part.logged["reinforced/threshold"]
    assert answers == ["own"] and row.correct == RIGHT["own"][threshold]
    assert [entry["accuracy"] for entry in part.more["pareto"]["reinforced"]] == [0.75, 0.76]


class Counting:
    """The pool, and what it was asked: (method, rules or answers)."""

    def __init__(self, pool: LocalPool):
        self.pool, self.asked = pool, list[tuple[str, Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def generate(self, request: GenerationRequest, *rest: Any) -> Any:
        self.asked.append(("generate", [rule.label for rule in request.rules]))
        return self.pool.generate(request, *rest)

    def score(self, rollouts: Sequence[Rollout], *rest: Any) -> Any:
        self.asked.append(("score", [rollout.prompt_id for rollout in rollouts]))
        return self.pool.score(rollouts, *rest)

    def inspect(self, rollouts: Sequence[Rollout], *rest: Any) -> Any:
        self.asked.append(("inspect", len(rollouts)))
        return self.pool.inspect(rollouts, *rest)


class Small(Measurer):
    """The stage's own measuring of a tiny model."""

    def __init__(self, pool: Any, verifier: Any, kept: Path, *settings: str):
        cfg = load(["experiment=smollm2", "evaluate.thresholds=[0.4,0.5,0.6]", "evaluate.answers=2", *settings])
        dims = HFDirectory(pool.tokenizer.name_or_path).dims
        decode = str
        self.context: Any = SimpleNamespace(cfg=cfg, spec=SPEC, source=SimpleNamespace(dims=dims), decode=decode)
        self.task, self.verifier, self.pool = TASK, verifier, pool
        self.cache, self.weights = AnswerCache(kept, {}), "w"
        self.sampling = SamplingParams(0.0, 12, ("\n",))
        self.test, self.validation = TASK.prompts("evaluation"), TASK.prompts("validation")
        self.wide, self.wide_test = self.validation[:2], self.test[:3]
        self.advanced = 0
        self.bar: Any = SimpleNamespace(detail=lambda *at: None, advance=self.advance)

    def advance(self, by: int, **shown: float) -> None:
        self.advanced += by

    def load(self, checkpoint: Path) -> None:
        """The pool holds it."""


def test_a_policy_is_measured_with_no_answer_made_or_read_twice(tmp_path: Path) -> None:
    pool = LocalPool(tiny_hf("llama", tmp_path / "model"), SPEC, rows=8, threads=1)
    pool.load(firing_policy(tmp_path / "model", SPEC))
    counting = Counting(pool)
    with VerifierPool(TASK, deadline_s=30) as verifier:
        work = Small(counting, verifier, tmp_path / "answers")
        part = policy_part(work, (), model="calibrated", checkpoint=tmp_path)
        again = Small(Counting(pool), verifier, tmp_path / "answers")
        second = policy_part(again, (), model="calibrated", checkpoint=tmp_path)
    tried = [f"hazard > {t}" for t in (0.4, 0.5, 0.6)]
    chosen = part.reference
    two = [prompt.id for prompt in work.test for _ in range(2)]
    assert counting.asked == [
        ("generate", tried), ("generate", tried), ("generate", ["full depth"]), ("generate", ["sampled"]),
        ("score", two), ("inspect", 2), ("inspect", 2), ("generate", [chosen.exits.label]), ("inspect", 6),
        ("generate", ["full depth"]), ("generate", [chosen.exits.label]), ("score", two[:6]),
    ]  # fmt: skip
    assert work.advanced == 6 + 3 + 2 == again.advanced
    # Those that answered together were not timed; every row of the results was.
    assert all(entry["tokens_per_s"] is None for entry in part.more["pareto"]["calibrated"])
    assert all(row.tokens_per_s for row in part.rows) and [row.exits for row in part.rows] == [
        "full depth", "sampled", chosen.exits.label,
    ]  # fmt: skip
    for row, exits in zip(part.rows, (Off(), Sample(), chosen.exits), strict=True):
        request = GenerationRequest(work.test, 1, work.sampling, exits, 0)
        scores = pool.score([answer for (answer,) in pool.generate(request)])
        assert row.kl == pytest.approx(np.concatenate([s.divergence for s in scores]).mean(), abs=2e-5)
    assert all("readings" in token for a in part.answers if a["id"] in two[:4] for token in a["tokens"])
    gates = part.more["gates"]["calibrated"]
    assert gates["asked"] > 0
    # A second stage finds all of it.
    assert {name for name, _ in again.pool.asked} == {"inspect"} and second.rows == part.rows
    assert second.answers == part.answers and second.more == part.more


def test_without_rl_drafts_are_measured_against_full_depth(tmp_path: Path) -> None:
    pool = LocalPool(tiny_hf("llama", tmp_path / "model"), SPEC, rows=8, threads=1)
    pool.load(firing_policy(tmp_path / "model", SPEC))
    with VerifierPool(TASK, deadline_s=30) as verifier:
        made = [
            policy_part(Small(pool, verifier, tmp_path / "answers", "rl.steps=0"), (), model="m", checkpoint=tmp_path)
            for _ in range(2)
        ]
    full, drafted = made[0].rows[0], made[0].rows[2]
    assert (full.exits, drafted.exits) == ("full depth", f"speculated from {SPEC.exit_depths[-1]}")
    assert (drafted.correct, drafted.length, drafted.mean_depth) == (full.correct, full.length, 1)
    request = GenerationRequest(TASK.prompts("evaluation"), 1, SamplingParams(0.0, 12, ("\n",)), Off(), 0)
    passes = sum(r.length - r.drafted for (r,) in pool.generate(request.by(Speculate(SPEC.exit_depths[-1]))))
    assert drafted.tokens_per_pass == full.n * full.length / passes > 1 and full.tokens_per_pass is None
    # The second time they come from the disk.
    assert made[1].rows == made[0].rows

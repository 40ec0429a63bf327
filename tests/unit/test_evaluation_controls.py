"""Controls: every one really has the mean depth it claims, and is matched to what it was asked to match."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ee_megatron.config.schema import TaskConfig
from ee_megatron.evaluation.controls import (
    TOLERANCE,
    compare,
    marginal_exits,
    match_accuracy,
    match_depth,
)
from ee_megatron.evaluation.evaluate import Answer, EvaluationRow, answer_sets, evaluate_model
from ee_megatron.exit_rules import CONTROLS, Confidence, DialRange, Entropy, ExitRule, Fixed, Random, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.report.tables import controls_table
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tasks import VerifierPool, make_task
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
OUTCOMES = (2, 4, 6)
# Greedy answers of an untrained model run in circles: one that changes its circle is a jump in the mean depth.
SAMPLING = SamplingParams(1.0, 30, ("\n",))
TASK = make_task(TaskConfig("arithmetic", train=3, validation=60, evaluation=3))


def weights(path: Path, seed: int, bias: float = 3.5) -> WeightSet:
    tensors = initial_policy(HFDirectory(path).dims, SPEC, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    return WeightSet(seed, {name: t + bias if name.endswith("fc2.bias") else t for name, t in tensors.items()})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(path: Path) -> LocalPool:
    pool = LocalPool(path, SPEC, rows=24, threads=1)
    pool.load(weights(path, 1))
    return pool


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(TASK, deadline_s=30) as started:
        yield started


def measured(pool: LocalPool, verifier: VerifierPool, exits: ExitRule) -> tuple[EvaluationRow, list[Answer]]:
    request = GenerationRequest(TASK.prompts("validation"), 1, SAMPLING, exits, 0)
    (answered,) = answer_sets(pool, request)
    return evaluate_model(answered, request, TASK, verifier, label="m", num_layers=6, decode=str)


def span(outcomes: tuple[int, ...] = OUTCOMES, marginal: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> DialRange:
    return DialRange(outcomes, 130, marginal)


@pytest.mark.parametrize("rule", [*CONTROLS, Threshold], ids=lambda rule: rule.kind)
def test_every_control_has_the_mean_depth_it_claims(pool, verifier, path, rule) -> None:
    """Matched to the reference's depth, generated once more, its layers counted from the tokens."""
    pool.load(weights(path, 1))
    row, answers = measured(pool, verifier, Threshold(0.5))
    assert 0.4 < row.mean_depth < 1
    if rule is Threshold:
        # Another policy's gates, as those of the calibrated model are for the reinforced one.
        pool.load(weights(path, 2))
    dial = rule.dial(span(marginal=marginal_exits(answers, OUTCOMES)))
    found = match_depth(lambda e: measured(pool, verifier, e)[0], dial, row.mean_depth)
    assert found.within and found.target == row.mean_depth
    again = pool.generate(GenerationRequest(TASK.prompts("validation"), 1, SAMPLING, found.policy, 0))
    depths = np.concatenate([a.exit_depths for (a,) in again])
    assert depths.mean() / 6 == pytest.approx(found.row.mean_depth, rel=1e-6)
    assert abs(depths.mean() / 6 / row.mean_depth - 1) <= TOLERANCE
    pool.load(weights(path, 1))


def test_a_depth_out_of_reach_is_reported_as_not_matched(pool, verifier) -> None:
    found = match_depth(lambda e: measured(pool, verifier, e)[0], Fixed.dial(span()), 0.2, trials=6)
    # Every token but the first at depth 2 of 6 is the least there is.
    assert not found.within and found.row.mean_depth > 0.33 and found.trials == 3
    with pytest.raises(ValueError, match=r"depth.*\b0\b|\b0\b.*depth"):
        match_depth(lambda e: measured(pool, verifier, e)[0], Fixed.dial(span()), 0)


def expected_depth(policy: ExitRule) -> float:
    return float(np.dot(policy.shares, OUTCOMES))


def test_dials_rise_and_know_their_ends() -> None:
    marginal = (0.5, 0.2, 0.3)
    for dial in (Fixed.dial(span()), Random.dial(span(marginal=marginal))):
        depths = [expected_depth(dial(p)) for p in np.linspace(0, 1, 21)]
        assert depths == sorted(depths)
        assert depths[0] == pytest.approx(2, abs=0.01) and depths[-1] == pytest.approx(6, abs=0.01)
    assert Random.dial(span(marginal=marginal))(0.5).shares == pytest.approx(marginal)
    assert Fixed.dial(span())(0.25).shares == pytest.approx((0.5, 0.5, 0.0))
    assert Fixed.dial(span())(1.0).shares == (0.0, 0.0, 1.0)
    assert sum(share > 0 for share in Fixed.dial(span())(0.8).shares) == 2, "neighbours only"
    assert Fixed.dial(span((6,)))(0.3).shares == (1.0,)
    assert tuple(Confidence.dial(span())(place).value for place in (0.0, 1.0)) == (0.0, 1.0)
    assert Entropy.dial(span())(0.0).value > math.log(130) and Entropy.dial(span())(1.0).value == 0.0
    with pytest.raises(ValueError, match="share"):
        Random.dial(span(marginal=(0.5, 0.5)))


def test_tilted_exits_are_the_nearest_with_their_mean() -> None:
    """No other distribution with the same mean has less KL divergence from the marginal."""
    marginal = np.array([0.5, 0.2, 0.3])
    p = np.array(Random.dial(span(marginal=marginal.tolist()))(0.8).shares)
    divergence = float((p * np.log(p / marginal)).sum())
    # (1, -2, 1) changes neither the sum nor the mean.
    for step in (-0.01, 0.01):
        q = p + step * np.array([1, -2, 1])
        assert float((q * np.log(q / marginal)).sum()) > divergence


def planted_row(depth: float, accuracy: float) -> EvaluationRow:
    return EvaluationRow("m", "x", 100, round(100 * accuracy), accuracy, 0.0, 1.0, depth, 100 * depth, 10.0)


def planted_measure(policy: ExitRule) -> EvaluationRow:
    """Depth as expected; right in 80 of 100 from depth 5 on, in 50 below."""
    depth = expected_depth(policy)
    return planted_row(depth / 6, 0.8 if depth >= 5 else 0.5)


def test_the_least_depth_of_equal_accuracy_is_found() -> None:
    dial = Fixed.dial(span())
    found = match_accuracy(planted_measure, dial, 0.8, trials=12)
    assert found.within and found.row.accuracy == 0.8
    assert 5 / 6 <= found.row.mean_depth < 5 / 6 + 0.01
    # What the search for the depth has tried is not measured again.
    depth = match_depth(planted_measure, dial, 0.5)
    resumed = match_accuracy(planted_measure, dial, 0.5, depth.tried, trials=4)
    assert resumed.within and resumed.row.mean_depth <= depth.row.mean_depth
    missed = match_accuracy(planted_measure, dial, 0.9)
    assert not missed.within and missed.row.accuracy == 0.8 and missed.trials == 1


def an_answer(name: str, correct: bool, depths: list[int]) -> Answer:
    tokens = [{"text": "x", "depth": d, "logprob": 0.0, "exit_logprob": 0.0, "entropy": None} for d in depths]
    return Answer(id=name, prompt="", reference="", model="m", exits="x", correct=correct, text="", tokens=tokens)  # type: ignore[typeddict-item]


def test_the_marginal_leaves_out_first_tokens_and_the_comparison_pairs_prompts() -> None:
    answers = [an_answer("a", True, [6, 2, 2, 4]), an_answer("b", True, [6, 6])]
    assert marginal_exits(answers, OUTCOMES) == [0.5, 0.25, 0.25]
    assert marginal_exits(answers, OUTCOMES, first_token=True) == pytest.approx([2 / 6, 1 / 6, 3 / 6])
    with pytest.raises(ValueError, match="token"):
        marginal_exits([an_answer("a", True, [6])], OUTCOMES)
    reference = [an_answer(str(i), i < 9, [6]) for i in range(10)]
    control = [an_answer(str(i), i < 4, [6]) for i in range(12)][::-1]
    found = compare(reference, control)
    assert found["n"] == 10 and found["difference"]["value"] == pytest.approx(0.5)  # type: ignore[index]
    assert (found["only_reference"], found["only_control"], found["p_value"]) == (5, 0, 2 / 32)
    # Problems of one group are right or wrong together: resampled as a whole, they always give the same difference.
    together = compare([answer | {"group": "2,3"} for answer in reference], control)["difference"]  # type: ignore[misc]
    assert together == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["difference"]["low"] < 0.3 and found["difference"]["high"] > 0.7  # type: ignore[index]
    entry = {
        "control": "fixed depth", "matched_by": "depth", "target": 0.5, "within": False,
        "row": planted_row(0.53, 0.7).to_json(), "comparison": found,
    }  # fmt: skip
    lines = controls_table([entry]).text().splitlines()
    assert "depth (!)" in lines[2] and "0.500" in lines[2] and "0.530" in lines[2] and "+50.0%" in lines[2]

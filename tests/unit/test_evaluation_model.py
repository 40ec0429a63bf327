"""A real tiny model, its decoder and real verifier processes: answers, their rows, and controls matched to them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.evaluation.controls import TOLERANCE, compare, marginal_exits, match_accuracy, match_depth
from ee_megatron.evaluation.evaluate import (
    AnswerRecord,
    EvaluationRow,
    add_readings,
    answer_sets,
    evaluate_model,
    score_sets,
)
from ee_megatron.exit_rules import (
    CONTROLS,
    Confidence,
    DialRange,
    Entropy,
    ExitRule,
    Fixed,
    Off,
    Random,
    Sample,
    Threshold,
)
from ee_megatron.policy import PolicySpec, WeightSet
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tasks import VerifierPool, make_task
from ee_megatron.types import Prompt
from tests.by_hand import a_row, an_answer
from tests.tiny import firing_policy, tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
OUTCOMES = (2, 4, 6)
SAMPLING = SamplingParams(0.0, 40, ("\n",))
# Greedy answers of an untrained model run in circles: one that changes its circle is a jump in the mean depth.
SAMPLED = SamplingParams(1.0, 30, ("\n",))
TASK = make_task(TaskConfig("arithmetic", train=3, validation=60, evaluation=24))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LocalPool:
    return LocalPool(tiny_hf("llama", tmp_path_factory.mktemp("model")), SPEC, rows=24, threads=1)


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(TASK, deadline_s=30) as started:
        yield started


def policy(pool: LocalPool, seed: int = 1) -> WeightSet:
    return firing_policy(Path(pool.tokenizer.name_or_path), SPEC, seed)


def known_prompts(pool: LocalPool, exits: ExitRule) -> tuple[list[Prompt], int]:
    """Prompts; the reference of every second one is the number that the model says, if any. And how many those are."""
    prompts, right = [], 0
    found = pool.generate(GenerationRequest(TASK.prompts("evaluation"), 1, SAMPLING, exits, 0))
    for i, (prompt, (answer,)) in enumerate(zip(TASK.prompts("evaluation"), found, strict=True)):
        numbers = re.findall(r"[0-9]+", answer.text)
        right += bool(numbers) and i % 2 == 0
        prompts.append(replace(prompt, answer=numbers[-1] if numbers and i % 2 == 0 else "1000000007"))
    return prompts, right


def test_the_row_agrees_with_the_answers_it_sums_up(pool: LocalPool, verifier: VerifierPool) -> None:
    pool.load(policy(pool))
    exits = Threshold(0.5)
    prompts, right = known_prompts(pool, exits)
    seen: list[tuple[int, int]] = []
    request = GenerationRequest(prompts, 1, SAMPLING, exits, 0)
    (answered,) = score_sets(pool, answer_sets(pool, request, lambda done, total: seen.append((done, total))))
    call: dict[str, Any] = {"label": "calibrated", "num_layers": 6, "decode": lambda t: pool.tokenizer.decode([t])}
    row, answers = evaluate_model(answered, request, TASK, verifier, **call)
    assert (row.model, row.exits, row.n, row.timed_out) == ("calibrated", "hazard > 0.5", 24, 0)
    assert 0 < row.correct == right == sum(a["correct"] for a in answers)
    depths = [t["depth"] for a in answers for t in a["tokens"]]
    assert set(depths) == {2, 4, 6} and all(a["tokens"][0]["depth"] == 6 for a in answers)
    assert row.mean_depth == pytest.approx(np.mean(depths) / 6)
    assert row.total_depth == pytest.approx(sum(depths) / 24) and row.length == len(depths) / 24
    assert row.kl is not None and row.kl > 0 and row.tokens_per_s is not None and row.tokens_per_s > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer["id"], answer["prompt"], answer["reference"]) == (prompt.id, prompt.text, prompt.answer)
        assert "".join(t["text"] for t in answer["tokens"]).startswith(answer["text"][:5])
        # The teacher's entropy over 130 tokens, in nats.
        assert all(t["entropy"] is not None and 0 < t["entropy"] <= np.log(130) + 1e-4 for t in answer["tokens"])
    assert seen[-1] == (24, 24)


def test_readings_say_what_each_exit_on_the_way_would_have_written(pool: LocalPool, verifier: VerifierPool) -> None:
    weights, prompts = policy(pool), TASK.prompts("evaluation")[:8]
    pool.load(weights)
    request = GenerationRequest(prompts, 1, SAMPLING, Threshold(0.5), 0)
    (answered,) = answer_sets(pool, request)
    call: dict[str, Any] = {"label": "calibrated", "num_layers": 6, "decode": lambda t: pool.tokenizer.decode([t])}
    _, answers = evaluate_model(answered, request, TASK, verifier, **call)
    add_readings(answers, pool.inspect(answered.rollouts), SPEC.exit_depths, call["decode"])
    left, seen = 0, set()
    for answer in answers:
        for t, token in enumerate(answer["tokens"]):
            *exits, teacher = token["readings"]
            assert [r["depth"] for r in exits] == ([d for d in (2, 4) if d <= token["depth"]] if t else [])
            assert teacher["depth"] is None and teacher["hazard"] is None and teacher["logprob"] <= 0
            seen |= {r["text"] for r in exits}
            for reading in exits:
                fired = reading["hazard"] is not None and reading["hazard"] > 0.5
                assert fired == (reading["depth"] == token["depth"])
            if exits and exits[-1]["depth"] == token["depth"]:
                left += 1
                assert exits[-1]["text"] == token["text"]
                assert exits[-1]["logprob"] == pytest.approx(token["logprob"], abs=1e-3)
    assert left > 10 and len(seen) > 1
    pool.load(None)
    (greedy,) = pool.generate(GenerationRequest(prompts[:1], 1, SAMPLING, Off(), 0))[0]
    (entry,) = pool.inspect([greedy])
    assert np.array_equal(entry.teacher_said, greedy.tokens) and (entry.said[1:] >= 0).all()
    np.testing.assert_allclose(entry.teacher_said_logprobs, greedy.token_logprobs, atol=1e-3)


def test_the_teacher_at_full_depth_diverges_from_itself_by_nothing(pool: LocalPool, verifier: VerifierPool) -> None:
    pool.load(None)
    arguments: dict[str, Any] = {"label": "teacher", "num_layers": 6, "decode": str}
    request = GenerationRequest(TASK.prompts("evaluation")[:6], 1, SAMPLING, Off(), 0)
    (answered,) = answer_sets(pool, request)
    row, _ = evaluate_model(score_sets(pool, [answered])[0], request, TASK, verifier, **arguments)
    assert row.mean_depth == 1.0 and row.exits == "full depth"
    assert row.kl == pytest.approx(0.0, abs=1e-5)
    bare, answers = evaluate_model(answered, request, TASK, verifier, **arguments)
    assert bare.kl is None and answers[0]["tokens"][0]["entropy"] is None


def test_sets_that_are_read_together_score_as_each_alone(pool: LocalPool) -> None:
    pool.load(policy(pool))
    prompts = TASK.prompts("evaluation")[:6]
    rules = (Off(), Sample(), Threshold(0.5))
    sets = [answer_sets(pool, GenerationRequest(prompts, 1, SAMPLING, rule, 0))[0] for rule in rules]
    alone = [score_sets(pool, [one])[0] for one in sets]
    together = score_sets(pool, sets)
    for found, expected in zip(together, alone, strict=True):
        assert found.rollouts is expected.rollouts and found.scores is not None and expected.scores is not None
        for a, b in zip(found.scores, expected.scores, strict=True):
            for field in fields(a):
                np.testing.assert_allclose(getattr(a, field.name), getattr(b, field.name), atol=2e-5)
    with pytest.raises(ValueError):
        score_sets(pool, [sets[0], replace(sets[1], rollouts=sets[1].rollouts[:5])])
    with pytest.raises(ValueError):
        answer_sets(pool, GenerationRequest([], 1, SAMPLING, Off(), 0))


def measured(pool: LocalPool, verifier: VerifierPool, exits: ExitRule) -> tuple[EvaluationRow, list[AnswerRecord]]:
    request = GenerationRequest(TASK.prompts("validation"), 1, SAMPLED, exits, 0)
    (answered,) = answer_sets(pool, request)
    return evaluate_model(answered, request, TASK, verifier, label="m", num_layers=6, decode=str)


def span(outcomes: tuple[int, ...] = OUTCOMES, marginal: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> DialRange:
    return DialRange(outcomes, 130, marginal)


@pytest.mark.parametrize("rule", [*CONTROLS, Threshold], ids=lambda rule: rule.kind)
def test_every_control_has_the_mean_depth_it_claims(pool, verifier, rule) -> None:
    """Matched to the reference's depth, generated once more, its layers counted from the tokens."""
    pool.load(policy(pool))
    row, answers = measured(pool, verifier, Threshold(0.5))
    assert 0.4 < row.mean_depth < 1
    if rule is Threshold:
        # Another policy's gates, as those of the calibrated model are for the reinforced one.
        pool.load(policy(pool, 2))
    dial = rule.sweep_curve(span(marginal=marginal_exits(answers, OUTCOMES)))
    found = match_depth(lambda e: measured(pool, verifier, e)[0], dial, row.mean_depth)
    assert found.within and found.target == row.mean_depth
    again = pool.generate(GenerationRequest(TASK.prompts("validation"), 1, SAMPLED, found.policy, 0))
    depths = np.concatenate([a.exit_depths for (a,) in again])
    assert depths.mean() / 6 == pytest.approx(found.row.mean_depth, rel=1e-6)
    assert abs(depths.mean() / 6 / row.mean_depth - 1) <= TOLERANCE
    pool.load(policy(pool))


def test_a_depth_out_of_reach_is_reported_as_not_matched(pool, verifier) -> None:
    found = match_depth(lambda e: measured(pool, verifier, e)[0], Fixed.sweep_curve(span()), 0.2, trials=6)
    # Every token but the first at depth 2 of 6 is the least there is.
    assert not found.within and found.row.mean_depth > 0.33 and found.trials == 3
    with pytest.raises(ValueError):
        match_depth(lambda e: measured(pool, verifier, e)[0], Fixed.sweep_curve(span()), 0)


def expected_depth(policy: ExitRule) -> float:
    return float(np.dot(policy.shares, OUTCOMES))


def test_dials_rise_and_know_their_ends() -> None:
    marginal = (0.5, 0.2, 0.3)
    for dial in (Fixed.sweep_curve(span()), Random.sweep_curve(span(marginal=marginal))):
        depths = [expected_depth(dial(p)) for p in np.linspace(0, 1, 21)]
        assert depths == sorted(depths)
        assert depths[0] == pytest.approx(2, abs=0.01) and depths[-1] == pytest.approx(6, abs=0.01)
    assert Random.sweep_curve(span(marginal=marginal))(0.5).shares == pytest.approx(marginal)
    assert Fixed.sweep_curve(span())(0.25).shares == pytest.approx((0.5, 0.5, 0.0))
    assert Fixed.sweep_curve(span())(1.0).shares == (0.0, 0.0, 1.0)
    assert sum(share > 0 for share in Fixed.sweep_curve(span())(0.8).shares) == 2, "neighbours only"
    assert tuple(Confidence.sweep_curve(span())(place).value for place in (0.0, 1.0)) == (0.0, 1.0)
    assert Entropy.sweep_curve(span())(0.0).value > math.log(130) and Entropy.sweep_curve(span())(1.0).value == 0.0


def planted_measure(policy: ExitRule) -> EvaluationRow:
    """Depth as expected; right in 80 of 100 from depth 5 on, in 50 below."""
    depth = expected_depth(policy)
    return a_row(0.8 if depth >= 5 else 0.5, depth / 6)


def test_the_least_depth_of_equal_accuracy_is_found() -> None:
    dial = Fixed.sweep_curve(span())
    found = match_accuracy(planted_measure, dial, 0.8, trials=12)
    assert found.within and found.row.accuracy == 0.8
    assert 5 / 6 <= found.row.mean_depth < 5 / 6 + 0.01
    # What the search for the depth has tried is not measured again.
    depth = match_depth(planted_measure, dial, 0.5)
    resumed = match_accuracy(planted_measure, dial, 0.5, depth.tried, trials=4)
    assert resumed.within and resumed.row.mean_depth <= depth.row.mean_depth
    missed = match_accuracy(planted_measure, dial, 0.9)
    assert not missed.within and missed.row.accuracy == 0.8 and missed.trials == 1


def test_the_marginal_leaves_out_first_tokens_and_the_comparison_pairs_prompts() -> None:
    answers = [an_answer("a", [6, 2, 2, 4]), an_answer("b", [6, 6])]
    assert marginal_exits(answers, OUTCOMES) == [0.5, 0.25, 0.25]
    assert marginal_exits(answers, OUTCOMES, first_token=True) == pytest.approx([2 / 6, 1 / 6, 3 / 6])
    with pytest.raises(ValueError, match="token"):
        marginal_exits([an_answer("a", [6])], OUTCOMES)
    reference = [an_answer(str(i), [6], i < 9) for i in range(10)]
    control = [an_answer(str(i), [6], i < 4) for i in range(12)][::-1]
    found = compare(reference, control)
    assert found["n"] == 10 and found["difference"]["value"] == pytest.approx(0.5)  # type: ignore[index]
    assert (found["only_reference"], found["only_control"], found["p_value"]) == (5, 0, 2 / 32)
    # Problems of one group are right or wrong together: resampled as a whole, they always give the same difference.
    together = compare([answer | {"group": "2,3"} for answer in reference], control)["difference"]  # type: ignore[misc]
    assert together == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["difference"]["low"] < 0.3 and found["difference"]["high"] > 0.7  # type: ignore[index]

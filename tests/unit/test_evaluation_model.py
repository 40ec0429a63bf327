"""A real tiny model, its decoder and real verifier processes, evaluated from end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ee_megatron.config.schema import TaskConfig
from ee_megatron.evaluation.evaluate import AnsweredSet, add_readings, answer_sets, evaluate_model, score_sets
from ee_megatron.evaluation.results import write_results
from ee_megatron.exit_rules import ExitRule, Fixed, Off, Sample, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout import Decoder, GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tasks import VerifierPool, make_task
from ee_megatron.tasks.arithmetic import ArithmeticTask
from ee_megatron.types import Prompt
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
SAMPLING = SamplingParams(0.0, 40, ("\n",))
TASK = make_task(TaskConfig("arithmetic", train=3, validation=3, evaluation=24))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LocalPool:
    return LocalPool(tiny_hf("llama", tmp_path_factory.mktemp("model")), SPEC, rows=8, threads=1)


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierPool]:
    with VerifierPool(TASK, deadline_s=30) as started:
        yield started


def policy(pool: LocalPool) -> WeightSet:
    """Adapters that change the model, and gates that fire on some positions."""
    tensors = initial_policy(HFDirectory(pool.tokenizer.name_or_path).dims, SPEC, seed=1)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    return WeightSet(1, {name: t + 3.5 if name.endswith("fc2.bias") else t for name, t in tensors.items()})


def known_prompts(pool: LocalPool, exits: ExitRule) -> tuple[list[Prompt], int]:
    """Prompts; the reference of every second one is the number that the model says, if any. And how many those are."""
    prompts, right = [], 0
    found = pool.generate(GenerationRequest(TASK.prompts("evaluation"), 1, SAMPLING, exits, 0))
    for i, (prompt, (answer,)) in enumerate(zip(TASK.prompts("evaluation"), found, strict=True)):
        numbers = re.findall(r"[0-9]+", answer.text)
        right += bool(numbers) and i % 2 == 0
        prompts.append(replace(prompt, answer=numbers[-1] if numbers and i % 2 == 0 else "1000000007"))
    return prompts, right


def test_the_row_agrees_with_the_answers_it_sums_up(pool: LocalPool, verifier: VerifierPool, tmp_path: Path) -> None:
    pool.load(policy(pool))
    exits = Threshold(0.5)
    prompts, right = known_prompts(pool, exits)
    seen: list[tuple[int, int]] = []
    request = GenerationRequest(prompts, 1, SAMPLING, exits, 0)
    (answered,) = score_sets(pool, answer_sets(pool, request, lambda done, total: seen.append((done, total))))
    row, answers = evaluate_model(
        answered,
        request,
        TASK,
        verifier,
        label="calibrated",
        num_layers=6,
        decode=lambda token: pool.tokenizer.decode([token]),
    )
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
    write_results(tmp_path / "results.json", [row], answers, {"num_layers": 6})
    data = json.loads((tmp_path / "results.json").read_text())
    assert sum(data["exit_histogram"]["calibrated, hazard > 0.5"].values()) == len(depths)
    assert -1 <= data["depth_by_entropy"]["calibrated, hazard > 0.5"]["spearman"] <= 1


def test_readings_say_what_each_exit_on_the_way_would_have_written(pool: LocalPool, verifier: VerifierPool) -> None:
    weights, prompts = policy(pool), TASK.prompts("evaluation")[:8]
    pool.load(weights)
    request = GenerationRequest(prompts, 1, SAMPLING, Threshold(0.5), 0)
    (answered,) = answer_sets(pool, request)
    _, answers = evaluate_model(
        answered,
        request,
        TASK,
        verifier,
        label="calibrated",
        num_layers=6,
        decode=lambda token: pool.tokenizer.decode([token]),
    )
    add_readings(
        answers, pool.inspect(answered.rollouts), SPEC.exit_depths, lambda token: pool.tokenizer.decode([token])
    )
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


def test_sets_that_are_read_together_score_as_each_alone_and_what_prompts_share_is_read_once(
    pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.load(policy(pool))
    prompts = TASK.prompts("evaluation")[:6]
    rules = (Off(), Sample(), Threshold(0.5))
    sets = [answer_sets(pool, GenerationRequest(prompts, 1, SAMPLING, rule, 0))[0] for rule in rules]
    read = positions_read(monkeypatch)
    alone = [score_sets(pool, [one])[0] for one in sets]
    apart = sum(read)
    read.clear()
    together = score_sets(pool, sets)
    # By policy and teacher, as far as the shortest prompt goes but for its last token, which predicts.
    shared = min(len(rollout.prompt_tokens) for rollout in sets[0].rollouts) - 1
    assert sum(read) == apart - 2 * (len(sets) - 1) * len(prompts) * shared
    for found, expected in zip(together, alone, strict=True):
        assert found.rollouts is expected.rollouts and found.scores is not None and expected.scores is not None
        for a, b in zip(found.scores, expected.scores, strict=True):
            for field in fields(a):
                np.testing.assert_allclose(getattr(a, field.name), getattr(b, field.name), atol=2e-5)
    with pytest.raises(ValueError, match="shorter"):
        score_sets(pool, [sets[0], replace(sets[1], rollouts=sets[1].rollouts[:5])])


def positions_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the positions of every parallel pass from now on."""
    parallel, read = Decoder._parallel, list[int]()

    def counted(decoder: Decoder, tokens: torch.Tensor, lengths: torch.Tensor, *rest: Any, **named: Any) -> Any:
        read.append(int(lengths.sum()))
        return parallel(decoder, tokens, lengths, *rest, **named)

    monkeypatch.setattr(Decoder, "_parallel", counted)
    return read


def test_mistaken_calls_are_refused(pool: LocalPool, verifier: VerifierPool) -> None:
    class Other(ArithmeticTask):
        name = "other"

    empty = GenerationRequest([], 1, SAMPLING, Off(), 0)
    call: dict[str, Any] = {"label": "teacher", "num_layers": 6, "decode": str}
    with pytest.raises(ValueError, match=r"'arithmetic'.*'other'"):
        evaluate_model(AnsweredSet([], None, 1.0), empty, Other(TaskConfig()), verifier, **call)
    with pytest.raises(ValueError, match="prompts"):
        answer_sets(pool, empty)


def test_exit_policies_have_names() -> None:
    named = {rule.label for rule in (Off(), Sample(), Threshold(0.55))}
    assert named == {"full depth", "sampled", "hazard > 0.55"}
    assert Fixed(15).label == "fixed 15"

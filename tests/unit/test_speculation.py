"""Speculation changes nothing but the time: the same tokens as full depth, greedy or sampled, whatever the drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ee_megatron.exit_rules import ExitRule, Off, Sample, Speculate, parse_option
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine import speculation
from ee_megatron.rollout.engine.layer_backends import TorchOps
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.types import Rollout
from tests.reference import random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8, 11, 12, 13], [21] * 19]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=40)
SAMPLED = SamplingParams(temperature=0.7, max_new_tokens=40)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf(request.param, tmp_path_factory.mktemp(request.param), tied=False)


@pytest.fixture(scope="module", params=["kernels", "torch"])
def decoder(path: Path, request: pytest.FixtureRequest) -> Decoder:
    made = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    made.load_policy(random_policy(made.dims, SPEC))
    made.eos_ids = frozenset({3})
    if request.param == "torch":
        made.use(TorchOps(made.dims))
    return made


def answers(
    decoder: Decoder, path: Path, rule: ExitRule, sampling: SamplingParams, rows: int = 3, **more
) -> tuple[Scheduler, list[Rollout]]:
    scheduler = Scheduler(decoder, AutoTokenizer.from_pretrained(path), in_flight=rows)
    ids = [
        scheduler.add(Request(prompt, sampling, rule, seed=seed, prompt_id=str(i), **more))
        for seed in range(6)
        for i, prompt in enumerate(PROMPTS)
    ]
    drafted = 0
    while scheduler.busy:
        drafted += sum(event.drafted for event in scheduler.advance())
    assert drafted == scheduler.speculation.accepted
    return scheduler, [scheduler.take(i, version=0) for i in ids]


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SAMPLED,
        SamplingParams(top_p=0.8, max_new_tokens=21, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(top_k=5, max_new_tokens=1),
    ],
    ids=["greedy", "sampled", "penalised", "one token"],
)
def test_the_answers_are_those_of_full_depth(
    decoder: Decoder, path: Path, depth: int, sampling: SamplingParams
) -> None:
    _, full = answers(decoder, path, Off(), sampling)
    scheduler, speculated = answers(decoder, path, Speculate(depth), sampling)
    for a, b in zip(full, speculated, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.finished == b.finished and a.text == b.text
        assert b.exit_depths.tolist() == [SPEC.num_layers] * len(b.tokens)
        torch.testing.assert_close(torch.from_numpy(b.full_logprobs), torch.from_numpy(a.full_logprobs))
    made = sum(len(answer.tokens) - 1 for answer in speculated)
    # A pass makes one token more than it accepts, but where a draft ended the answer.
    spec = scheduler.speculation
    assert 0 <= spec.passes + spec.accepted - made <= sum(answer.finished for answer in speculated)
    assert scheduler.cache.used == 0


def test_drafts_that_are_right_save_passes(decoder: Decoder, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layers behind the draft that change nothing all drafts stand, and their number grows."""
    scheduler, speculated = answers(decoder, path, Speculate(4), GREEDY)
    some = scheduler.speculation
    assert 0 < some.accepted <= some.drafted
    real = decoder.run_segment

    def shallow(segment: int, hidden, cache, at):
        return real(segment, hidden.clone(), cache, at) if segment == 0 else hidden

    monkeypatch.setattr(decoder, "run_segment", shallow)
    monkeypatch.setattr(speculation, "CERTAIN", -1.0)
    scheduler, speculated = answers(decoder, path, Speculate(4), GREEDY, rows=1)
    spec = scheduler.speculation
    assert spec.accepted == spec.drafted
    longest = max(speculated, key=lambda answer: len(answer.tokens))
    assert len(longest.tokens) / spec.passes * len(speculated) > 4


@pytest.mark.parametrize("certain", [-1.0, 2.0], ids=["all exits draft", "none does"])
def test_a_small_draft_vocabulary_and_other_gates_change_no_answer(
    decoder: Decoder, path: Path, monkeypatch: pytest.MonkeyPatch, certain: float
) -> None:
    monkeypatch.setattr(speculation, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(speculation, "CERTAIN", certain)
    scheduler, speculated = answers(decoder, path, Speculate(4), SAMPLED)
    _, full = answers(decoder, path, Off(), SAMPLED)
    assert [a.tokens.tolist() for a in full] == [b.tokens.tolist() for b in speculated]
    assert (scheduler.speculation.drafted > 0) == (certain < 0)


def test_a_prefill_and_other_rules_beside_it(decoder: Decoder, path: Path) -> None:
    """Rows that exit, that don't, and that draft by two depths run together, each as if alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    rules = [Sample(), Off(), Speculate(1), Speculate(4)]

    def run(rules: list[ExitRule], prefill: list[int]) -> list[list[int]]:
        scheduler = Scheduler(decoder, tokenizer, in_flight=4)
        ids = [scheduler.add(Request(PROMPTS[0], SAMPLED, rule, 1, "p", prefill=prefill)) for rule in rules]
        while scheduler.busy:
            scheduler.advance()
        return [scheduler.take(i, 0).tokens.tolist() for i in ids]

    for prefill in ([], [17, 18, 19]):
        together = run(rules, prefill)
        assert together == [run([rule], prefill)[0] for rule in rules]
        assert together[1] == together[2] == together[3]


def test_a_depth_without_an_exit_is_refused(decoder: Decoder, path: Path) -> None:
    with pytest.raises(ValueError, match=r"speculate 2 is not an exit depth; expected one of \[1, 3, 4\]"):
        answers(decoder, path, Speculate(2), GREEDY)
    with pytest.raises(ValueError, match="speculate"):
        parse_option("--exits", "speculate:many")

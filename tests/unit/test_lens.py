"""The logit lens: on the way to an exit it reads what the run read; behind it, what that token alone would come to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ee_megatron.config.schema import TaskConfig
from ee_megatron.evaluation.evaluate import AnswerRecord, Token
from ee_megatron.evaluation.results import ANSWER_TOKENS, LENS_PROBLEMS, PROMPT_POSITIONS, TOP_K, Records
from ee_megatron.exit_rules import Off, Threshold
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tasks import make_task
from ee_megatron.types import Rollout
from tests.tiny import firing_policy, tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
TASK = make_task(TaskConfig("arithmetic", train=3, validation=3, evaluation=6))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LocalPool:
    made = LocalPool(tiny_hf("llama", tmp_path_factory.mktemp("model")), SPEC, rows=8, threads=1)
    made.load(firing_policy(Path(made.tokenizer.name_or_path), SPEC))
    return made


@pytest.fixture(scope="module")
def rollouts(pool: LocalPool) -> list[Rollout]:
    request = GenerationRequest(TASK.prompts("evaluation"), 1, SamplingParams(0.0, 24, ("\n",)), Threshold(0.5), 0)
    made = [answer for (answer,) in pool.generate(request)]
    assert {int(d) for r in made for d in r.exit_depths} == {2, 4, 6}
    return made


def test_on_the_way_to_an_exit_it_reads_what_the_run_read(pool: LocalPool, rollouts: list[Rollout]) -> None:
    for rollout, entry, seen in zip(rollouts, pool.lens(rollouts, 3, 5, 24), pool.inspect(rollouts), strict=True):
        assert entry.given == 5 and entry.ids.shape == (5 + rollout.length, 3, 3)
        assert np.array_equal(entry.following, np.append(rollout.prompt_tokens[-5:], rollout.tokens))
        assert np.array_equal(entry.taken, np.append([6] * 5, rollout.exit_depths))
        answer_ids, answer_logprobs = entry.ids[5:], entry.logprobs[5:]
        asked = seen.said >= 0
        assert np.array_equal(answer_ids[:, :2, 0][asked], seen.said[asked])
        np.testing.assert_allclose(answer_logprobs[:, :2, 0][asked], seen.said_logprobs[asked], atol=1e-4)
        # What was written is the first choice of the exit that was taken.
        at = np.searchsorted([2, 4, 6], rollout.exit_depths)
        assert np.array_equal(answer_ids[np.arange(rollout.length), at, 0], rollout.tokens)
        assert np.array_equal(entry.teacher_ids[5:, 0], seen.teacher_said)
        assert (np.diff(entry.logprobs, axis=-1) <= 0).all()


def test_behind_the_exit_that_token_alone_goes_on(pool: LocalPool, rollouts: list[Rollout]) -> None:
    rollout = max(rollouts, key=lambda r: int((r.exit_depths == 2).sum()))
    (entry,) = pool.lens([rollout], 1, 0, 24)
    whole, start = np.concatenate([rollout.prompt_tokens, rollout.tokens]), len(rollout.prompt_tokens) - 1
    early = np.flatnonzero(rollout.exit_depths == 2)
    assert len(early) > 1 and entry.given == 0
    everybody = torch.full((1, len(whole)), 6)
    frozen = 0
    for t in early:
        depths = everybody.clone()
        depths[0, start : start + t] = torch.as_tensor(rollout.exit_depths[:t])
        tokens = torch.as_tensor(whole)[None, : start + t + 1]
        final, exits = pool.decoder.forward_with_residuals(
            tokens, torch.tensor([start + t + 1]), depths[:, : start + t + 1]
        )
        for place, stream in ((1, exits[1]), (2, final)):
            best = pool.decoder.readout(stream[0, -1]).log_softmax(-1).max(-1)
            assert int(best.indices) == entry.ids[t, place, 0]
            assert float(best.values) == pytest.approx(float(entry.logprobs[t, place, 0]), abs=1e-4)
        frozen += abs(float(entry.logprobs[t, 0, 0]) - float(entry.logprobs[t, 2, 0])) < 1e-6
    assert frozen == 0, "behind the exit the stream goes on"


def test_the_teachers_lens_ends_in_what_it_wrote_and_a_prompt_of_one_token_has_no_rows(pool: LocalPool) -> None:
    weights = pool._weights
    pool.load(None)
    try:
        (answer,) = pool.generate(
            GenerationRequest(TASK.prompts("evaluation")[:1], 1, SamplingParams(0.0, 8), Off(), 0)
        )[0]
        short = Rollout("x", answer.prompt_tokens[:1], answer.tokens, answer.exit_depths, answer.token_logprobs,
                        answer.exit_logprobs, "", True, 0)  # fmt: skip
        entry, one = pool.lens([answer, short], 2, 3, 4)
        assert np.array_equal(entry.ids[3:, -1, 0], answer.tokens[:4]) and len(entry.following) == 7
        assert np.array_equal(entry.ids[:, -1], entry.teacher_ids)
        assert one.given == 0 and len(one.following) == 4
    finally:
        pool.load(weights)
    with pytest.raises(ValueError, match="token"):
        pool.lens([Rollout("x", answer.prompt_tokens, *[np.zeros(0)] * 4, "", True, 0)], 1, 1, 1)


def test_records_hold_every_answer_and_the_lens_of_a_few(
    pool: LocalPool, rollouts: list[Rollout], tmp_path: Path
) -> None:
    decode = lambda token: str(pool.tokenizer.decode([token]))  # noqa: E731
    records = Records(SPEC.exit_depths, 12, decode)
    prompts = TASK.prompts("evaluation")
    answers = [
        AnswerRecord(
            id=p.id, prompt=p.text, reference=p.answer, model="calibrated", exits="hazard > 0.5", correct=i == 0,
            text=r.text, task="arithmetic",
            tokens=[Token(text=decode(t), depth=int(d), logprob=0.0, exit_logprob=0.0, entropy=None)
                    for t, d in zip(r.tokens, r.exit_depths, strict=True)],
        )
        for i, (p, r) in enumerate(zip(prompts, rollouts, strict=True))
    ]  # fmt: skip
    records.add(pool, answers, rollouts)
    records.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [p.id for p in prompts]
    for line, rollout in zip(lines, rollouts, strict=True):
        kept = line["answers"]["calibrated, hazard > 0.5"]
        assert kept["depths"] == rollout.exit_depths.tolist() and "".join(kept["pieces"]).startswith(rollout.text)
    lens = json.loads((tmp_path / "lens.json").read_text())
    assert lens["exit_depths"] == [2, 4] and len(lens["answers"]) == LENS_PROBLEMS
    for found, rollout in zip(lens["answers"], rollouts, strict=False):
        assert len(found["rows"]) == found["given"] + min(rollout.length, ANSWER_TOKENS)
        assert found["given"] == min(len(rollout.prompt_tokens) - 1, PROMPT_POSITIONS)
        for row in found["rows"]:
            assert [len(readout) for readout in (*row["readouts"], row["teacher"])] == [TOP_K] * 4
            if found["rows"].index(row) > found["given"]:
                assert row["readouts"][[2, 4, 6].index(row["taken"])][0][0] == row["text"]

"""The invariant of docs/method.md: for any tokens and any exit pattern, decoding step by step with skipped work, one
parallel forward pass with frozen positions, and the Megatron model cut into pipeline stages give the same logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.exit_rules import Sample, Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout import GenerationRequest, SamplingParams, generate
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.scoring import read_exits, score
from ee_megatron.training.advantages import collate
from ee_megatron.types import Group, Prompt
from tests.reference import Reference, random_policy
from tests.stepping import step
from tests.tiny import ONE_EACH, tiny_hf

LAYERS, ROWS, WIDTH = 6, 3, 12
SPEC = PolicySpec(LAYERS, (1, 3, 4), rank=4, alpha=8.0)
OUTCOMES = (1, 3, 4, 6)


@st.composite
def patterns(draw):
    """Tokens [ROWS, WIDTH], how many of each are read together (the prompt, or all but its last token where this may
    exit), and exit depths: these at full depth, then anything."""
    tokens = draw(st.lists(st.integers(0, 127), min_size=ROWS * WIDTH, max_size=ROWS * WIDTH))
    depths = draw(st.lists(st.sampled_from(OUTCOMES), min_size=ROWS * WIDTH, max_size=ROWS * WIDTH))
    prompts = draw(st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS))
    depths = torch.tensor(depths, dtype=torch.int32).view(ROWS, WIDTH)
    for row, length in enumerate(prompts):
        depths[row, :length] = LAYERS
    return torch.tensor(tokens).view(ROWS, WIDTH), prompts, depths


def decode_step_by_step(decoder: Decoder, tokens, prompts, depths):
    """Log-probabilities [ROWS, WIDTH, V] from the last position on that is read; what is before stays 0."""
    found = torch.zeros(ROWS, WIDTH, decoder.dims.vocab)
    for row, length in enumerate(prompts):
        cache = KVCache(decoder.dims, 1, torch.float32, torch.device("cpu"))
        if length:
            (read,) = decoder.prefill(tokens[row : row + 1, :length], torch.tensor([length]))
            cache.hold([0], [length])
            cache.fill(0, 0, read.keys, read.values)
            found[row, length - 1] = decoder.readout(read.hidden).log_softmax(-1)
        for position in range(length, WIDTH):
            which = slice(position, position + 1)
            hidden = step(decoder, cache, tokens[row, which], torch.tensor([position]), depths[row, which])
            found[row, position] = decoder.readout(hidden[0]).log_softmax(-1)
    return found


@pytest.mark.parametrize(("family", "tied"), ONE_EACH)
def test_decoder_parallel_and_pipeline_agree_for_any_exit_pattern(family, tied, tmp_path):
    path = tiny_hf(family, tmp_path / "model", tied=tied, layers=LAYERS)
    policy = random_policy(HFDirectory(path).dims, SPEC)
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    decoder.load_policy(policy)
    reference = Reference(path, SPEC, policy)
    with Ranks(2, tmp_path / "ranks") as ranks:
        ranks.call(
            "parallel_cases:make_learner", path=path, spec=SPEC, policy=policy, degrees=(1, 2, 1), stages=(3, 3),
            options={},
        )  # fmt: skip

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(patterns())
        def agree(case):
            tokens, prompts, depths = case
            expected = reference.logits(tokens, depths).log_softmax(-1)
            pipeline = ranks.call("parallel_cases:log_probs", tokens=tokens, depths=depths)[-1]
            parallel = decoder.readout(decoder.forward_parallel(tokens, torch.full((ROWS,), WIDTH), depths))
            steps = decode_step_by_step(decoder, tokens, prompts, depths)
            torch.testing.assert_close(pipeline, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parallel.log_softmax(-1), expected, rtol=1e-4, atol=1e-5)
            for row, length in enumerate(prompts):
                known = slice(max(0, length - 1), None)
                torch.testing.assert_close(steps[row, known], expected[row, known], rtol=1e-4, atol=1e-5)

        agree()


@pytest.mark.parametrize("first_token", [False, True], ids=["prompts never exit", "first token exits"])
def test_the_learner_scores_what_the_engine_sampled(first_token, tmp_path):
    """Tokens, exits and divergences of groups whose prompts the engine reads once and the learner packs once, from a
    cache that is short of pages, under pipeline and tensor parallelism."""
    spec = replace(SPEC, first_token=first_token)
    path = tiny_hf("qwen3", tmp_path / "model", tied=False, layers=LAYERS)
    policy = random_policy(HFDirectory(path).dims, spec)
    decoder, tokenizer = Decoder.from_hf(path, spec, torch.float32, "cpu"), AutoTokenizer.from_pretrained(path)
    decoder.load_policy(policy)
    prompts = [Prompt(str(n), ("word problem " * 4)[:n], "", "") for n in (1, 5, 17, 33, 34)]
    verdicts = [np.zeros(4)] * 3
    groups = [
        Group(prompt, rollouts, *verdicts)
        for rule in (Sample(), Threshold(0.5))
        for prompt, rollouts in zip(
            prompts,
            generate(
                decoder, tokenizer, GenerationRequest(prompts, 4, SamplingParams(1.0, 9), rule, 0), 0, positions=160
            ),
            strict=True,
        )
    ]
    answers = [rollout for group in groups for rollout in group.rollouts]
    first = {int(rollout.exit_depths[0]) for rollout in answers}
    assert first == ({1, 3, 4, LAYERS} if first_token else {LAYERS})
    if first_token:
        assert any(len({int(r.exit_depths[0]) for r in group.rollouts}) > 1 for group in groups)
    batch = collate(groups, LAYERS, first_token)
    read = score(decoder, policy, answers)
    outcomes = np.array(spec.layout.outcomes)
    exits = read_exits(decoder, policy, answers)
    diverged = [
        np.take_along_axis(e.divergences, (r.exit_depths[:, None] == outcomes).argmax(1)[:, None], axis=1)[:, 0]
        for r, e in zip(answers, exits, strict=True)
    ]
    with Ranks(2, tmp_path / "ranks") as ranks:
        for degrees, stages in (((1, 2, 1), (3, 3)), ((2, 1, 1), (6,))):
            ranks.call(
                "parallel_cases:make_learner", path=path, spec=spec, policy=policy, degrees=degrees, stages=stages,
                options={"tokens_per_micro_batch": 128},
            )  # fmt: skip
            found = ranks.call("parallel_cases:score", batch=batch, teacher=Teacher.REFERENCE, hazards=True)[0]
            for row, (rollout, ours, kl, said) in enumerate(zip(answers, read, diverged, exits, strict=True)):
                at = batch.loss_mask[row]
                asked = batch.gate_mask[row][at]
                np.testing.assert_allclose(found.kl[row][at][asked], kl[asked], atol=1e-4)
                np.testing.assert_allclose(found.hazards[row][at], np.nan_to_num(said.hazards), atol=1e-4)
                assert np.isnan(kl[~asked]).all()
                for learner, engine, scored in (
                    (found.token_logprobs, rollout.token_logprobs, ours.policy_logprobs),
                    (found.exit_logprobs, rollout.exit_logprobs, ours.exit_logprobs),
                ):
                    np.testing.assert_allclose(learner[row][at], engine, atol=1e-4)
                    np.testing.assert_allclose(scored, engine, atol=1e-4)


def test_gates_that_never_fire_leave_the_hugging_face_model(tmp_path):
    """Fresh adapters (B = 0) and no exits: decoder and pipeline equal transformers' own forward pass."""
    path = tiny_hf("llama", tmp_path / "model", layers=LAYERS)
    policy = initial_policy(HFDirectory(path).dims, SPEC, seed=0)
    tokens = torch.randint(0, 128, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))
    depths = torch.full((ROWS, WIDTH), LAYERS, dtype=torch.int32)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits.log_softmax(-1)
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    decoder.load_policy(policy)
    steps = decode_step_by_step(decoder, tokens, [1] * ROWS, depths)
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=1e-5)
    with Ranks(2, tmp_path / "ranks") as ranks:
        ranks.call(
            "parallel_cases:make_learner", path=path, spec=SPEC, policy=policy, degrees=(1, 2, 1), stages=(3, 3),
            options={},
        )  # fmt: skip
        pipeline = ranks.call("parallel_cases:log_probs", tokens=tokens, depths=depths)[-1]
    torch.testing.assert_close(pipeline, expected, rtol=1e-4, atol=1e-5)

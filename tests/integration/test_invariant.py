"""The invariant of docs/method.md: for any tokens and any exit pattern, decoding step by step with skipped work, one
parallel forward pass with frozen positions, and the Megatron model cut into pipeline stages give the same logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import Ranks
from transformers import AutoModelForCausalLM

from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.decoder import Decoder
from tests.reference import Reference, random_policy
from tests.stepping import step
from tests.tiny import tiny_hf

LAYERS, ROWS, WIDTH = 6, 3, 12
SPEC = PolicySpec(LAYERS, (1, 3, 4), rank=4, alpha=8.0)
OUTCOMES = (1, 3, 4, 6)


@st.composite
def patterns(draw):
    """Tokens [ROWS, WIDTH], prompt lengths and exit depths: prompts at full depth, then anything."""
    tokens = draw(st.lists(st.integers(0, 127), min_size=ROWS * WIDTH, max_size=ROWS * WIDTH))
    depths = draw(st.lists(st.sampled_from(OUTCOMES), min_size=ROWS * WIDTH, max_size=ROWS * WIDTH))
    prompts = draw(st.lists(st.integers(1, WIDTH), min_size=ROWS, max_size=ROWS))
    depths = torch.tensor(depths, dtype=torch.int32).view(ROWS, WIDTH)
    for row, length in enumerate(prompts):
        depths[row, :length] = LAYERS
    return torch.tensor(tokens).view(ROWS, WIDTH), prompts, depths


def decode_step_by_step(decoder: Decoder, tokens, prompts, depths):
    """Log-probabilities [ROWS, WIDTH, V] from the prompt's last position on; what is before stays 0."""
    found = torch.zeros(ROWS, WIDTH, decoder.dims.vocab)
    for row, length in enumerate(prompts):
        cache = KVCache(decoder.dims, 1, torch.float32, torch.device("cpu"))
        (read,) = decoder.prefill(tokens[row : row + 1, :length], torch.tensor([length]))
        cache.hold([0], [length])
        cache.fill(0, 0, read.keys, read.values)
        found[row, length - 1] = decoder.readout(read.hidden).log_softmax(-1)
        for position in range(length, WIDTH):
            which = slice(position, position + 1)
            hidden = step(decoder, cache, tokens[row, which], torch.tensor([position]), depths[row, which])
            found[row, position] = decoder.readout(hidden[0]).log_softmax(-1)
    return found


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
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
                torch.testing.assert_close(steps[row, length - 1 :], expected[row, length - 1 :], rtol=1e-4, atol=1e-5)

        agree()


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

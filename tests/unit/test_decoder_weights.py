"""Whole fine-tuned models as policies, at once and in chunks, and the way back to the teacher."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.exit_rules import Sample
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, GenerationRequest, SamplingParams, generate
from ee_megatron.rollout.engine.scoring import score
from ee_megatron.types import Prompt
from tests.tiny import MODELS, tiny_hf

FULL = PolicySpec(6, (1, 3, 4), rank=0, full=True)
LORA = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
PROMPTS = [Prompt(f"p{i}", text, "", "") for i, text in enumerate(("abc", "1 + 1 =", "xyzzy"))]


@pytest.fixture(params=MODELS, ids=str)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_hf(request.param[0], tmp_path, tied=request.param[1])


def tuned(decoder: Decoder, seed: int = 0) -> dict[str, torch.Tensor]:
    """Another model: every tensor of the base and every gate random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = FULL.tensor_shapes(decoder.dims)
    return {
        name: 0.1 * torch.randn(shape, generator=generator) + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, shape in shapes.items()
    }


def logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return decoder.readout(decoder.forward_parallel(tokens, torch.full((len(tokens),), tokens.shape[1])))


@torch.no_grad()
def expected(path: Path, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base = {name: t for name, t in tensors.items() if not name.startswith("gates.")}
    missing = model.load_state_dict(base, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    return model(tokens).logits


def test_a_fine_tuned_base_is_the_model_of_its_tensors_and_the_teacher_comes_back(path):
    decoder, tokens = Decoder.from_hf(path, FULL, torch.float32, "cpu"), torch.randint(0, 128, (2, 9))
    teacher = logits(decoder, tokens)
    for seed in (1, 2):
        tensors = tuned(decoder, seed)
        decoder.load_policy(tensors)
        torch.testing.assert_close(logits(decoder, tokens), expected(path, tensors, tokens), rtol=1e-4, atol=1e-4)
        assert torch.equal(decoder.gates[1].fc2, tensors["gates.3.fc2.weight"])
    decoder.load_policy(None)
    assert torch.equal(logits(decoder, tokens), teacher) and decoder.gates is None


def test_chunks_give_what_the_whole_gives_and_half_a_model_answers_nothing(path):
    decoder, tokens = Decoder.from_hf(path, FULL, torch.float32, "cpu"), torch.randint(0, 128, (2, 9))
    teacher, tensors = logits(decoder, tokens), tuned(decoder)
    decoder.load_policy(tensors)
    whole = logits(decoder, tokens)
    decoder.load_policy(None)
    names = sorted(tensors)
    for start in range(0, len(names) - 7, 7):
        decoder.load_chunk({name: tensors[name] for name in names[start : start + 7]})
    with pytest.raises(ValueError, match="load"):
        logits(decoder, tokens)
    done = (len(names) - 7 + 6) // 7 * 7
    with pytest.raises(ValueError, match=re.escape(names[done])):
        decoder.finish_load()
    with pytest.raises(ValueError, match=re.escape(names[0])):
        decoder.load_chunk({names[0]: tensors[names[0]]})
    decoder.load_chunk({name: tensors[name] for name in names[done:]})
    decoder.finish_load()
    assert torch.equal(logits(decoder, tokens), whole)
    decoder.load_chunk({names[-1]: tensors[names[-1]]})
    decoder.load_policy(None)
    assert torch.equal(logits(decoder, tokens), teacher)


def test_a_fine_tuned_policy_decodes_with_exits_and_is_scored_against_the_original(path):
    decoder, tokenizer = Decoder.from_hf(path, FULL, torch.float32, "cpu"), AutoTokenizer.from_pretrained(path)
    teacher = Decoder.from_hf(path, FULL, torch.float32, "cpu")
    tensors = tuned(decoder)
    decoder.load_policy(tensors)
    answers = generate(
        decoder, tokenizer, GenerationRequest(PROMPTS, 2, SamplingParams(1.0, 12), Sample(), 1), version=0
    )
    answers = [rollout for group in answers for rollout in group]
    for rollout, found in zip(answers, score(decoder, tensors, answers), strict=True):
        np.testing.assert_allclose(rollout.token_logprobs, found.policy_logprobs, atol=2e-4)
        np.testing.assert_allclose(rollout.exit_logprobs, found.exit_logprobs, atol=2e-4)
        sequence = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        at = slice(len(rollout.prompt_tokens) - 1, sequence.shape[1] - 1)
        theirs = logits(teacher, sequence)[0, at].log_softmax(-1)
        np.testing.assert_allclose(
            found.teacher_logprobs, theirs.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0], atol=1e-4
        )
    assert decoder.gates is not None and any((r.exit_depths < 6).any() for r in answers)


def test_tensors_that_are_not_the_specs_are_refused_before_anything_changes(tmp_path):
    path = tiny_hf("llama", tmp_path)
    decoder, tokens = Decoder.from_hf(path, FULL, torch.float32, "cpu"), torch.randint(0, 128, (2, 9))
    before, tensors = logits(decoder, tokens), tuned(decoder)
    with pytest.raises(ValueError, match="lm_head"):
        decoder.load_policy({**tensors, "lm_head.weight": torch.zeros(130, 64)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\[3\]"):
        decoder.load_policy({**tensors, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"gates\.3\.fc2\.bias"):
        decoder.load_policy({name: tensor for name, tensor in tensors.items() if name != "gates.3.fc2.bias"})
    assert torch.equal(logits(decoder, tokens), before)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.nothing"):
        decoder.load_chunk({"model.layers.0.nothing.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="tensors"):
        Decoder.from_hf(path, FULL, torch.float32, "cpu").finish_load()
    with pytest.raises(ValueError, match="PolicySpec"):
        Decoder.from_hf(path, None, torch.float32, "cpu").load_chunk(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_after_adapters_and_back_leave_the_base_bit_for_bit(tmp_path, dtype):
    decoder = Decoder.from_hf(tiny_hf("qwen2", tmp_path), LORA, dtype, "cpu")
    tokens, generator = torch.randint(0, 128, (2, 9)), torch.Generator().manual_seed(3)
    teacher = logits(decoder, tokens)
    shapes = LORA.tensor_shapes(decoder.dims)
    policies = [{n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2)]
    found = []
    for tensors in (*policies, policies[0]):
        decoder.load_policy(tensors)
        found.append(logits(decoder, tokens))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    decoder.load_policy(None)
    assert torch.equal(logits(decoder, tokens), teacher) and not torch.equal(found[0], teacher)

"""Compiled products, layers and gates against float64 and the PyTorch forms; rows don't depend on their company."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ee_megatron.exit_rules import Sample
from ee_megatron.families import FAMILIES
from ee_megatron.kernels import Panels
from ee_megatron.kernels import compiled as kernels
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, GenerationRequest, SamplingParams, generate
from ee_megatron.rollout.engine import sampling
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.layer_backends import KernelOps, TorchOps
from ee_megatron.rollout.engine.linear import Linear, WideLinear
from ee_megatron.types import Prompt
from tests.reference import random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
DTYPES = [torch.float32, torch.bfloat16]


def has_products(dtype: torch.dtype) -> bool:
    library = kernels.library(dtype)
    return library is not None and library.columns > 0


needs_products = pytest.mark.skipif(
    not any(map(shutil.which, ("gcc", "clang", "cc"))) or not has_products(torch.float32),
    reason="products are compiled for processors with 512-bit registers",
)


@needs_products
@given(
    seed=st.integers(0, 2**16),
    rows=st.one_of(st.integers(1, 50), st.sampled_from([239, 241, 490])),
    # Multiples of 32 inputs go through tiles where the processor has them.
    width=st.one_of(st.integers(1, 70), st.sampled_from([32, 64, 576, 2048, 2050, 4100])),
    out=st.integers(1, 100),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
)
def test_products_are_those_of_float64_and_rows_do_not_depend_on_their_company(
    seed, rows, width, out, bias, dtype, wide
):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, out))
    added = torch.randn(out, generator=generator) if bias else None
    if added is not None and not wide:
        added = added.to(dtype)
    linear = WideLinear(weight, added) if wide else Linear(weight, added)
    if has_products(dtype) and width % 2 == 0:
        assert isinstance(linear.matrix, Panels)
    found = linear(x)
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    step = 2.0**-8 if dtype == torch.bfloat16 and not wide else 0.0
    # A sum's rounding, by the sum of what is summed; a result's, by itself.
    scale = F.linear(x.double().abs(), weight.double().abs()) + 1
    assert bool(((found - exact).abs() <= step * exact.abs() + 2e-6 * scale).all())
    assert torch.equal(linear.plain(), weight)
    if isinstance(linear.matrix, Panels):
        some = torch.randperm(rows, generator=generator)[: 1 + seed % rows]
        assert torch.equal(linear(x[some]), found[some])


@needs_products
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_and_gates_without_python_between_them_equal_the_pytorch_form(tmp_path, family, dtype):
    decoder = Decoder.from_hf(tiny_hf(family, tmp_path), SPEC, dtype, "cpu")
    decoder.load_policy(random_policy(decoder.dims, SPEC))
    if not has_products(dtype):
        pytest.skip("no products of bfloat16 on this processor")
    # Layers with norms behind attention and MLP return to Python between their kernels.
    assert isinstance(decoder.ops, KernelOps) and (decoder.ops._layers is None) == decoder.dims.norm_after
    compiled, plain = decoder.ops, TorchOps(decoder.dims)
    generator, rows = torch.Generator().manual_seed(1), 9
    start = torch.randn(rows, decoder.dims.hidden, generator=generator).to(dtype)
    found = []
    for ops in (compiled, plain):
        decoder.use(ops)
        cache = KVCache(decoder.dims, rows, dtype, decoder.device)
        cache.hold(range(rows), [40] * rows)
        hidden, logits = start.clone(), []
        for position in (0, 1, 2):
            at = decoder.rows(cache, range(rows), [position] * rows)
            for segment in range(4):
                hidden = decoder.run_segment(segment, hidden, cache, at)
                if segment < 3:
                    logits.append(decoder.gate_logit(segment, hidden))
        found.append([hidden, torch.stack(logits), torch.stack(cache.layers)])
    for a, b in zip(*found, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        else:
            # A dozen roundings of a 256th each, in another order of summation.
            assert (a - b).float().abs().mean() <= 0.02 * b.float().abs().mean()


@needs_products
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "texts", [("abc", "1 + 1 =", "xyzzy, and more of it"), ("one two 3", "one two 4 and 5", "one two")]
)
def test_answers_have_the_same_bits_however_many_rows_are_in_flight(tmp_path, dtype, texts):
    if not has_products(dtype):
        pytest.skip("no products of bfloat16 on this processor")
    path = tiny_hf("qwen3", tmp_path)
    decoder, tokenizer = Decoder.from_hf(path, SPEC, dtype, "cpu"), AutoTokenizer.from_pretrained(path)
    decoder.load_policy(random_policy(decoder.dims, SPEC))
    prompts = [Prompt(f"p{i}", text, "", "") for i, text in enumerate(texts)]
    request = GenerationRequest(prompts, 4, SamplingParams(1.0, 20), Sample(), 1)

    def bits(rows: int) -> list[bytes]:
        answers = generate(decoder, tokenizer, request, version=0, rows=rows)
        return [
            np.concatenate([a.tokens, a.exit_depths, a.token_logprobs, a.exit_logprobs]).astype(np.float64).tobytes()
            for group in answers
            for a in group
        ]

    assert bits(1) == bits(3) == bits(12)


@needs_products
def test_a_processor_without_products_of_bfloat16_decodes_with_gates(tmp_path, monkeypatch):
    """As with AVX-512 but without its bfloat16."""
    monkeypatch.setattr(kernels.library(torch.bfloat16), "columns", 0)
    monkeypatch.delattr(kernels.library(torch.bfloat16), "gate", raising=False)
    decoder = Decoder.from_hf(tiny_hf("llama", tmp_path), SPEC, torch.bfloat16, "cpu")
    decoder.load_policy(random_policy(decoder.dims, SPEC))
    hidden = torch.randn(5, decoder.dims.hidden).to(torch.bfloat16)
    found = decoder.gate_logit(1, hidden)
    decoder.use(TorchOps(decoder.dims))
    torch.testing.assert_close(found, decoder.gate_logit(1, hidden), rtol=1e-5, atol=1e-5)


@needs_products
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 512, 1500])
def test_greedy_choice_is_the_first_of_the_greatest(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator).mul(3).round()
    tokens, logprobs = sampling.greedy(logits)
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(tokens, first)
    expected = logits.double().log_softmax(-1).gather(1, first[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=2e-6)

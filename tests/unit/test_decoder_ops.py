"""The compiled kernels against their PyTorch forms, and decoding in bfloat16 against transformers."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.exit_rules import Off
from ee_megatron.families import FAMILIES, ModelDims
from ee_megatron.kernels import compiled as kernels
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, SamplingParams
from ee_megatron.rollout.engine import layer_backends, sampling
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.layer_backends import KernelOps, Rows, TorchOps, choose_ops
from ee_megatron.rollout.engine.linear import Linear
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.engine.scoring import compare
from ee_megatron.rollout.engine.weights import LayerWeights, SkippedKV
from tests.tiny import tiny_hf

DIMS = ModelDims("qwen3", 3, 48, 40, 6, 2, 16, 130, 512, 1e-6, 1e4)
CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("gcc", "clang", "cc"))), reason="the kernels need a C compiler"
)


def both(dims: ModelDims, dtype: torch.dtype) -> tuple[KernelOps, TorchOps]:
    library = kernels.library(dtype)
    assert library is not None, "a compiler is there, so the kernels must compile"
    return KernelOps(dims, library), TorchOps(dims)


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = 2e-5 if a.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@needs_compiler
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 9),
    span=st.integers(1, 70),
    size=st.sampled_from([16, 48, 64, 128]),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 4)]),
    gains=st.booleans(),
    rotates=st.lists(st.booleans(), min_size=2, max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_and_cache_writes_equal_the_pytorch_form(seed, rows, span, size, heads, gains, rotates, dtype):
    dims = dataclasses.replace(DIMS, heads=heads[0], kv_heads=heads[1], head_dim=size)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    caches = [KVCache(dims, 11, dtype, CPU) for _ in range(2)]
    order = torch.randperm(11, generator=generator).tolist()
    for cache in caches:
        # Rows that took their pages in turns hold none that are neighbours.
        for positions in (20, 40, 70):
            for row in order:
                cache.hold([row], [positions])
    for pools in zip(*(cache.layers for cache in caches), strict=True):
        content = random(*pools[0].shape)
        for pool in pools:
            pool.copy_(content)
    angles = torch.arange(70)[:, None] * torch.rand(size // 2, generator=generator)
    slots = torch.randperm(11, generator=generator)[:rows].tolist()
    positions = torch.randint(0, span, (rows,), generator=generator).tolist()
    at = Rows(caches[0].where(slots, positions), max(positions) + 1, angles.cos(), angles.sin())
    fused = random(rows, (heads[0] + 2 * heads[1]) * size)
    gain = (random(size), random(size)) if gains else (None, None)
    layer = LayerWeights({}, {}, {}, random(1), random(1), *gain, rotates[0])
    product = random(rows, 2 * 2 * heads[1] * size)
    still = None if all(rotates) else ~torch.tensor(rotates)
    skipped = [SkippedKV(first, 2, Linear(random(1, 1)), random(2, size) if gains else None, still) for first in (1, 0)]
    found, turned = [], []
    for ops, cache in zip(both(dims, dtype), caches, strict=True):
        turned.append(torch.cat(ops.split_and_rotate(fused.clone(), at, layer), 1))
        found.append(ops.attend(fused, cache, 1, at, layer))
        ops.write_kv(product, cache, at, skipped[0])
        ops.write_kv(product[: rows // 2], cache, at, skipped[1])
    near(turned[0], turned[1])
    near(found[0], found[1])
    near(torch.stack(caches[0].layers), torch.stack(caches[1].layers))


@needs_compiler
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    past=st.sampled_from([0, 1, 31, 50]),
    size=st.sampled_from([16, 48, 64, 128]),
    heads=st.sampled_from([(1, 1), (6, 2), (4, 4)]),
    short=st.sampled_from([0, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_whole_sequences_attend_as_in_float64(seed, lengths, past, size, heads, short, dtype):
    """Padded, after a prefix, by the kernel and, for what is long, by PyTorch; padding is left as it was."""
    dims = dataclasses.replace(DIMS, heads=heads[0], kv_heads=heads[1], head_dim=size)
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    fused = torch.randn(len(lengths), width, heads[0] + 2 * heads[1], size, generator=generator).to(dtype)
    q, k, v = fused.split([heads[0], heads[1], heads[1]], dim=2)
    mask = None
    if past:
        before = torch.randn(2, len(lengths), past, heads[1], size, generator=generator).to(dtype)
        k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
        mask = torch.ones(width, past + width, dtype=torch.bool).tril(past)
    ops, _ = both(dims, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_backends, "SHORT", short)
        found = ops.attend_parallel(q, k, v, mask, lengths)
    for b, n in enumerate(lengths):
        queries, keys, values = (x[b].double().transpose(0, 1) for x in (q[:, :n], k[:, : past + n], v[:, : past + n]))
        keys, values = (x.repeat_interleave(heads[0] // heads[1], 0) for x in (keys, values))
        logits = queries @ keys.transpose(1, 2) / size**0.5
        seen = torch.ones(n, past + n, dtype=torch.bool).tril(past)
        exact = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        near(found[b, :n].transpose(0, 1), exact.to(dtype))
        assert not found[b, n:].any()


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    vocab=st.integers(1, 1500),
    apart=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    cut=st.booleans(),
    kernel=st.booleans(),
)
def test_distributions_are_compared_as_in_float64(seed, rows, vocab, apart, cut, kernel):
    generator = torch.Generator().manual_seed(seed)
    logits, of = 5 * torch.randn(rows, vocab, generator=generator), torch.randint(3, (rows,), generator=generator)
    others = 5 * torch.randn(3, vocab, generator=generator)
    if apart < 30:
        logits = others[of] + apart * torch.randn(rows, vocab, generator=generator)
    if cut and vocab > 1:
        logits[:, torch.randint(vocab, (1,), generator=generator)] = float("-inf")
    with pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.setattr(kernels, "library", lambda dtype: None)
        found = compare(logits, others[of])
    p, q = logits.double().log_softmax(-1), others[of].double().log_softmax(-1)
    weighted = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
    entropy = -torch.where(p > -torch.inf, p.exp() * p, 0.0).sum(-1)
    expected = weighted, logits.double().logsumexp(-1), others[of].double().logsumexp(-1), entropy
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert float(found.divergence.min()) >= 0


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 576])
def test_norms_sums_and_activations_equal_the_pytorch_form(dtype, width):
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 50):
        hidden, delta, gain = (
            torch.randn(s, generator=generator).to(dtype) for s in ((rows, width),) * 2 + ((width,),)
        )
        for d, g in ((None, None), (delta, None), (None, gain), (delta, gain)):
            streams = [hidden.clone(), hidden.clone()]
            results = [ops.add_norm(h, d, g) for ops, h in zip(both(DIMS, dtype), streams, strict=True)]
            near(results[0], results[1])
            near(streams[0], streams[1])
        gate_up = 20 * torch.randn(rows, 2 * width, generator=generator).to(dtype)
        near(*(ops.silu_mul(gate_up) for ops in both(DIMS, dtype)))


@needs_compiler
@given(seed=st.integers(0, 2**16), vocab=st.integers(1, 1500), u=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_sampling_by_kernel_picks_the_token_at_the_quantile(seed, vocab, u, cut):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(1, vocab, generator=generator)
    if cut and vocab > 1:
        logits[0, torch.randperm(vocab, generator=generator)[: vocab - 1]] = float("-inf")
    (token,), (logprob,) = sampling.inverse_cdf(logits, torch.tensor([u], dtype=torch.float64))
    p = logits[0].double().softmax(-1)
    assert p[token] > 0 and abs(p[token].log() - logprob) < 1e-5
    assert p[:token].sum() <= u + 1e-6 and u <= p[: token + 1].sum() + 1e-6


@given(
    seed=st.integers(0, 2**16),
    top_k=st.sampled_from([0, 1, 7, 50]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    candidates=st.integers(1, 60),
)
def test_truncation_keeps_what_a_whole_sort_keeps(seed, top_k, top_p, candidates):
    generator = torch.Generator().manual_seed(seed)
    # Rows from nearly certain to flat: some nuclei are within the candidates and some are not.
    logits = torch.randn(5, 50, generator=generator) * torch.tensor([[0.1], [1.0], [3.0], [10.0], [0.5]])
    found = sampling.truncate(logits, top_k, top_p, candidates)
    for row, cut in zip(logits, found, strict=True):
        order = row.argsort(descending=True)[: top_k or 50]
        p = row[order].double().softmax(-1)
        kept = order[p.cumsum(0) - p < top_p - 1e-9] if top_p < 1 else order
        assert torch.isfinite(cut).nonzero().squeeze(-1).tolist() == sorted(kept.tolist())
        assert torch.equal(cut[kept], row[kept])


@needs_compiler
def test_heads_that_the_kernels_cannot_read_go_to_pytorch():
    for size, kind in ((16, KernelOps), (20, TorchOps), (8, TorchOps)):
        assert type(choose_ops(dataclasses.replace(DIMS, head_dim=size), torch.float32, CPU)) is kind


def test_without_kernels_pytorch_does_the_work(monkeypatch):
    kernels.library.cache_clear()
    monkeypatch.setenv("EE_MEGATRON_KERNELS", "0")
    try:
        assert type(choose_ops(DIMS, torch.float32, CPU)) is TorchOps
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(1, 9, generator=generator).expand(400, -1)
        tokens, _ = sampling.inverse_cdf(logits, torch.linspace(0, 0.999, 400, dtype=torch.float64))
        np.testing.assert_allclose(np.bincount(tokens, minlength=9) / 400, logits[0].softmax(-1), atol=0.01)
    finally:
        kernels.library.cache_clear()


def test_tokens_of_little_weight_are_sampled_also_where_a_scan_adds_in_its_own_dtype(monkeypatch):
    """As on a GPU: after a sum of 1, a float32 scan adds nothing below 6e-8. The tail here has .44 % of the mass."""

    def scan(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.from_numpy(np.add.accumulate(self.to(dtype or self.dtype).numpy(), axis=dim))

    monkeypatch.setattr(sampling, "_library", lambda logits: None)
    monkeypatch.setattr(torch.Tensor, "cumsum", scan)
    logits = torch.full((2, 150_000), -17.3)
    logits[:, 0] = 0
    tokens, _ = sampling.inverse_cdf(logits, torch.tensor([0.9, 0.998], dtype=torch.float64))
    tail = 149_999 * np.exp(-17.3)
    assert tokens.tolist()[0] == 0
    assert tokens.tolist()[1] == pytest.approx((0.998 * (1 + tail) - 1) / np.exp(-17.3), abs=2)


@needs_compiler
def test_a_compiler_that_fails_is_reported_and_pytorch_takes_over(monkeypatch, tmp_path, caplog):
    kernels.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-no-such-flag"))
    try:
        assert kernels.library(torch.float32) is None
        assert "no-such-flag" in caplog.text and not list(tmp_path.rglob("*.so"))
    finally:
        kernels.library.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_follows_transformers_within_its_rounding(tmp_path, family):
    path = tiny_hf(family, tmp_path)
    decoder = Decoder.from_hf(path, PolicySpec(6, (1, 3, 4), rank=0), torch.bfloat16, "cpu")
    decoder.eos_ids = frozenset({10**6})
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    scheduler = Scheduler(decoder, AutoTokenizer.from_pretrained(path), in_flight=4)
    ids = [scheduler.add(Request("abc", SamplingParams(1.0, 20), Off(), k, "p")) for k in range(6)]
    while scheduler.busy:
        scheduler.advance()
    for i in ids:
        rollout = scheduler.take(i, 0)
        tokens = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        with torch.no_grad():
            logp = model(tokens).logits[0, len(rollout.prompt_tokens) - 1 : -1].float().log_softmax(-1)
        expected = logp.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.token_logprobs, expected, atol=0.12)

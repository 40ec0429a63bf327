"""A model in bfloat16 reads out and asks its gates by sums that are not rounded to it: learner, decoder and export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout.engine.decoder import Decoder
from tests.reference import random_policy
from tests.tiny import tiny_hf

BF16, POSITIONS, HIDDEN, VOCAB = torch.bfloat16, 40, 64, 130
# Half of bfloat16's spacing.
STEP = 2.0**-8


@pytest.fixture(scope="module", params=["normalised", "raw"])
def bodies(request, tmp_path_factory):
    """Ranks with a learner, a decoder and an exported model of one policy, and that policy."""
    folder = tmp_path_factory.mktemp("bfloat16")
    path = tiny_hf("llama", folder / "model", hidden=HIDDEN, vocab=VOCAB, scale=0.5)
    spec = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0, gate_width=0.5, gate_input=request.param)
    policy = random_policy(HFDirectory(path).dims, spec)
    decoder = Decoder.from_hf(path, spec, BF16, "cpu")
    decoder.load_policy(policy)
    out = export_hf(path, (spec, policy), folder / "export", dtype="bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with Ranks(1, folder / "ranks") as ranks:
        ranks.call(
            "parallel_cases:make_learner", path=path, spec=spec, policy=policy, degrees=(1, 1, 1), stages=(6,),
            options={"dtype": BF16},
        )  # fmt: skip
        yield ranks, decoder, exported, spec, policy


def streams(scale: float, rows: int = POSITIONS) -> torch.Tensor:
    return (torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(0)) * scale).to(BF16)


@torch.no_grad()
def test_logits_keep_what_bfloat16_would_round(bodies):
    ranks, decoder, exported, _, _ = bodies
    hidden, every = streams(4.0), torch.arange(VOCAB).expand(POSITIONS, -1)
    weight = HFDirectory(decoder.weights.path).tensor("model.embed_tokens.weight").to(BF16).double()
    exact = hidden.double() @ weight.t()
    assert float((exact.to(BF16).double() - exact).abs().max()) > 0.05
    close = {"rtol": 1e-5, "atol": 1e-4}
    for logits in (decoder.weights.head(hidden), decoder.weights.copy_head()(hidden), exported.lm_head(hidden)):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, **close)
    learned = ranks.call("parallel_cases:read_out", hidden=hidden, ids=every, slope=torch.zeros(POSITIONS, VOCAB))[0][0]
    torch.testing.assert_close(learned.double(), exact.log_softmax(-1), **close)


def test_gradients_of_the_readout_are_those_of_float64_up_to_bfloat16(bodies):
    ranks, decoder = bodies[:2]
    generator = torch.Generator().manual_seed(1)
    hidden, slope = streams(1.0), torch.randn(POSITIONS, VOCAB, generator=generator)
    every = torch.arange(VOCAB).expand(POSITIONS, -1)
    _, d_hidden, d_weight = ranks.call("parallel_cases:read_out", hidden=hidden, ids=every, slope=slope)[0]
    weight = HFDirectory(decoder.weights.path).tensor("model.embed_tokens.weight").to(BF16).double().requires_grad_()
    leaf = hidden.double().requires_grad_()
    logits = leaf @ weight.t()
    logits.retain_grad()
    (slope * logits.log_softmax(-1)).sum().backward()
    d_logits = logits.grad.abs()
    # The logits' gradient is rounded, and the sum of its products.
    for found, exact, bound in (
        (d_hidden, leaf.grad, d_logits @ weight.detach().abs()),
        (d_weight, weight.grad, d_logits.t() @ leaf.detach().abs()),
    ):
        assert found.dtype == BF16
        assert bool(((found.double() - exact).abs() <= STEP * (1.01 * bound + exact.abs()) + 1e-4).all())


@torch.no_grad()
def test_gates_say_the_same_in_learner_decoder_and_export(bodies):
    ranks, decoder, exported, spec, policy = bodies
    hidden = streams(3.0)
    (learned,) = ranks.call("parallel_cases:ask_gates", hidden=hidden)
    unrounded = 0.0
    for i, depth in enumerate(spec.exit_depths):
        w1, b1, w2, b2 = (
            policy[f"gates.{depth}.{part}"] for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        )
        x = hidden.float()
        if spec.gate_input == "normalised":
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + decoder.dims.rms_eps)

        def gate(x, w1, b1=b1, w2=w2, b2=b2):
            inner = F.relu(F.linear(x.double(), w1.double(), b1.double()))
            return F.linear(inner, w2.double(), b2.double()).squeeze(-1)

        exact = gate(x.to(BF16), w1.to(BF16))
        unrounded = max(unrounded, float((gate(x, w1) - exact).abs().max()))
        for found in (learned[i], decoder.gate_logit(i, hidden), exported.gates[str(depth)](hidden)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    # What the operands' rounding changes is far more than the tolerance: a side that left it out would be seen.
    assert unrounded > 1e-3

"""The decoder against transformers' own models: plain, with exits, with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ee_megatron.families.base import ModelDims
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.engine.decoder import Decoder
from tests.stepping import step
from tests.tiny import MODELS, tiny_hf

SPEC = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, tied = request.param
    return tiny_hf(family, tmp_path_factory.mktemp(family), tied=tied)


def reference(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def random_policy(dims: ModelDims, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor random: the initial B and fc2 are zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = initial_policy(dims, SPEC, seed)
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def frozen_reference(model, tokens: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence [T]: transformers' layers in a loop; after e layers a position keeps its stream."""
    body, T = model.model, len(tokens)
    hidden = body.embed_tokens(tokens)[None]
    places = torch.arange(T)[None]
    rotary = body.rotary_emb(hidden, places)
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    for number, layer in enumerate(body.layers):
        new = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        new = new[0] if isinstance(new, tuple) else new
        hidden = torch.where((depths > number)[None, :, None], new, hidden)
    return model.lm_head(body.norm(hidden))[0]


def decode(decoder: Decoder, tokens: torch.Tensor, prompts: list[int], depths: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by prefill, then cached steps with the given exits; rows of equal length, unequal prompts."""
    B, T = tokens.shape
    cache = KVCache(decoder.dims, B, decoder.dtype, decoder.device)
    logits = torch.zeros(B, T, decoder.dims.vocab)
    for b, prompt in enumerate(prompts):
        ready = decoder.prefill(tokens[b : b + 1, :prompt], torch.tensor([prompt]))[0]
        cache.hold([b], [prompt])
        cache.fill(b, 0, ready.keys, ready.values)
        logits[b, prompt - 1] = decoder.readout(ready.hidden)
    done = torch.tensor(prompts)
    while int(done.min()) < T:
        # Rows at different positions in one step; a row that is through repeats its last position.
        at = done.clamp(max=T - 1)
        rows = torch.arange(B)
        hidden = step(decoder, cache, tokens[rows, at], at, depths[rows, at])
        logits[rows, at] = decoder.readout(hidden)
        done += 1
    return logits


def test_without_exits_the_parallel_forward_equals_transformers(model_path):
    model, decoder = reference(model_path), Decoder.from_hf(model_path, SPEC, torch.float32, "cpu")
    torch.manual_seed(1)
    tokens, lengths = torch.randint(0, 128, (3, 20)), torch.tensor([20, 7, 13])
    logits = decoder.readout(decoder.forward_parallel(tokens, lengths))
    for b, n in enumerate(lengths.tolist()):
        with torch.no_grad():
            close(logits[b, :n], model(tokens[b : b + 1, :n]).logits[0])


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}])
def test_rope_scaling_and_biases_equal_transformers(tmp_path, scaling):
    path = tiny_hf("llama", tmp_path, rope_parameters=scaling, attention_bias=True, mlp_bias=True)
    decoder, tokens = Decoder.from_hf(path, None, torch.float32, "cpu"), torch.randint(0, 128, (1, 200))
    with torch.no_grad():
        close(decoder.readout(decoder.forward_parallel(tokens, torch.tensor([200]))), reference(path)(tokens).logits)


def test_parallel_forward_with_exits_equals_frozen_layers_of_transformers(model_path):
    model, decoder = reference(model_path), Decoder.from_hf(model_path, SPEC, torch.float32, "cpu")
    torch.manual_seed(2)
    tokens = torch.randint(0, 128, (4, 18))
    depths = torch.tensor(decoder.layout.outcomes)[torch.randint(0, 4, (4, 18))]
    hidden, residuals = decoder.forward_with_residuals(tokens, torch.full((4,), 18), depths)
    logits = decoder.readout(hidden)
    for b in range(4):
        close(logits[b], frozen_reference(model, tokens[b], depths[b]))
        for i, depth in enumerate(SPEC.exit_depths):
            cut = depths[b].clamp(max=depth)
            close(decoder.readout(residuals[i])[b], frozen_reference(model, tokens[b], cut))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), rows=st.integers(1, 7))
def test_cached_steps_with_exits_equal_frozen_layers_of_transformers(model_path, seed, rows):
    model, decoder = reference(model_path), Decoder.from_hf(model_path, SPEC, torch.float32, "cpu")
    torch.manual_seed(seed)
    T = 14
    tokens = torch.randint(0, 128, (rows, T))
    prompts = torch.randint(1, T - 2, (rows,)).tolist()
    depths = torch.tensor(decoder.layout.outcomes)[torch.randint(0, 4, (rows, T))]
    for b, prompt in enumerate(prompts):
        depths[b, :prompt] = 6
    logits = decode(decoder, tokens, prompts, depths)
    for b, prompt in enumerate(prompts):
        close(logits[b, prompt - 1 :], frozen_reference(model, tokens[b], depths[b])[prompt - 1 :])


def test_prefill_after_a_prefix_equals_prefill_of_the_whole(model_path):
    decoder = Decoder.from_hf(model_path, None, torch.float32, "cpu")
    tokens = torch.randint(0, 128, (2, 15))
    tokens[1, :9] = tokens[0, :9]
    whole = decoder.prefill(tokens, torch.tensor([15, 12]))
    prefix = decoder.prefill(tokens[:1, :9], torch.tensor([9]))[0]
    rest = decoder.prefill(tokens[:, 9:], torch.tensor([6, 3]), prefix)
    for a, b in zip(whole, rest, strict=True):
        close(b.hidden, a.hidden)
        close(torch.cat([prefix.keys, b.keys], 1), a.keys)
        close(torch.cat([prefix.values, b.values], 1), a.values)


def test_sequences_of_one_token_are_read_together_as_each_alone(model_path):
    decoder = Decoder.from_hf(model_path, None, torch.float32, "cpu")
    tokens = torch.tensor([[50], [49], [7]])
    (prefix,) = decoder.prefill(torch.tensor([[3, 5]]), torch.tensor([2]))
    for before in (None, prefix):
        together = decoder.forward_parallel(tokens, torch.ones(3, dtype=torch.int64), prefix=before)
        for row, token in zip(together, tokens, strict=True):
            alone = decoder.forward_parallel(token[None], torch.tensor([1]), prefix=before)[0]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-5)


def test_merged_adapters_equal_explicit_ones_and_reloading_does_not_drift(model_path):
    model, decoder = reference(model_path), Decoder.from_hf(model_path, SPEC, torch.float32, "cpu")
    tokens, lengths = torch.randint(0, 128, (2, 16)), torch.tensor([16, 16])
    before = decoder.forward_parallel(tokens, lengths)
    first, second = random_policy(decoder.dims, 1), random_policy(decoder.dims, 2)
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in second:
            down, up = second[f"{name}.lora_A.weight"], second[f"{name}.lora_B.weight"]
            module.register_forward_hook(lambda m, x, y, a=down, b=up: y + SPEC.scale * (x[0] @ a.T) @ b.T)
    for tensors in (first, second, first, second):
        decoder.load_policy(tensors)
    depths = torch.tensor(decoder.layout.outcomes)[torch.randint(0, 4, (2, 16))]
    depths[:, :4] = 6
    expected = torch.stack([frozen_reference(model, tokens[b], depths[b]) for b in range(2)])
    close(decoder.readout(decoder.forward_parallel(tokens, lengths, depths)), expected)
    close(decode(decoder, tokens, [4, 4], depths)[:, 3:], expected[:, 3:])
    decoder.load_policy(None)
    assert torch.equal(decoder.forward_parallel(tokens, lengths), before)


@pytest.mark.parametrize("gate_input", ["normalised", "raw"])
def test_gates_follow_their_formula(tmp_path, gate_input):
    spec = PolicySpec(6, (1, 3, 4), rank=4, alpha=8.0, gate_input=gate_input)
    decoder = Decoder.from_hf(tiny_hf("llama", tmp_path), spec, torch.float32, "cpu")
    tensors = random_policy(decoder.dims)
    decoder.load_policy(tensors)
    hidden = 3 * torch.randn(5, 64)
    x = hidden / (hidden.pow(2).mean(-1, keepdim=True) + decoder.dims.rms_eps).sqrt()
    x = hidden if gate_input == "raw" else x
    inner = (x @ tensors["gates.3.fc1.weight"].T + tensors["gates.3.fc1.bias"]).relu()
    expected = inner @ tensors["gates.3.fc2.weight"][0] + tensors["gates.3.fc2.bias"]
    close(decoder.gate_logit(1, hidden), expected)


def test_reading_in_parallel_runs_no_mlp_for_positions_that_left_nor_for_padding(tmp_path, monkeypatch):
    decoder = Decoder.from_hf(tiny_hf("llama", tmp_path), SPEC, torch.float32, "cpu")
    ran: list[int] = []
    real = decoder.ops.mlp
    monkeypatch.setattr(decoder.ops, "mlp", lambda normed, linears: ran.append(len(normed)) or real(normed, linears))
    tokens, lengths = torch.randint(0, 128, (2, 5)), torch.tensor([5, 3])
    decoder.forward_parallel(tokens, lengths)
    decoder.forward_parallel(tokens, lengths, torch.tensor([[6, 1, 3, 6, 4], [1, 1, 3, 6, 6]]))
    decoder.forward_parallel(tokens, lengths, torch.full((2, 5), 4))
    assert ran == [8] * 6 + [8, 5, 5, 3, 2, 2] + [8] * 4


def test_what_does_not_fit_is_refused(tmp_path):
    path = tiny_hf("llama", tmp_path)
    decoder = Decoder.from_hf(path, SPEC, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"1\.\.6"):
        decoder.forward_parallel(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]), torch.tensor([[6, 0]]))
    with pytest.raises(ValueError, match="7"):
        Decoder.from_hf(path, PolicySpec(7, (1,)), torch.float32, "cpu")

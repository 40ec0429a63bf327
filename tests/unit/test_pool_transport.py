"""Weights on their way: every tensor once, unchanged, in chunks."""

from __future__ import annotations

import pytest
import torch

from ee_megatron.policy import WeightSet
from ee_megatron.rollout.pool.transport import narrowed, pack, travels_in, unpack
from ee_megatron.tensors import HeldStream


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (7, 5), "a.bias": (3,), "c.scalar": (), "d.large": (100, 11), "e.row": (1, 4)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "f.half": torch.randn(9, generator=generator).bfloat16(), "g.strided": torch.arange(12.0)[::2]}


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 20])
def test_every_tensor_arrives_once_and_unchanged_in_chunks_no_larger_than_asked(chunk_bytes: int):
    sent = tensors()
    chunks = list(pack(HeldStream(sent), lambda name: sent[name].dtype, chunk_bytes))
    received: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        assert sum(len(data) for _, _, data in chunk.values()) <= chunk_bytes or len(chunk) == 1
        part = unpack(chunk)
        assert not part.keys() & received.keys()
        received |= part
    assert received.keys() == sent.keys()
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype and torch.equal(received[name], tensor)
    assert (len(chunks) == 1) == (chunk_bytes == 1 << 20)
    assert WeightSet(1, received).digest == WeightSet(1, sent).digest


@pytest.mark.parametrize("decoder", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [300, 1 << 20])
def test_what_passes_in_blocks_is_what_is_narrowed_in_memory(decoder, chunk_bytes, monkeypatch):
    monkeypatch.setattr("ee_megatron.tensors.BLOCK_BYTES", 100)
    sent = {name: tensor.float() for name, tensor in tensors().items()} | {"gates.2.fc1.weight": torch.randn(9, 8)}
    assert len(list(HeldStream(sent))) > len(sent)
    received: dict[str, torch.Tensor] = {}
    for chunk in pack(HeldStream(sent), lambda name: travels_in(name, torch.bfloat16, decoder), chunk_bytes):
        received |= unpack(chunk)
    assert WeightSet(1, received).digest == narrowed(WeightSet(1, sent), torch.bfloat16, decoder).digest
    assert received["gates.2.fc1.weight"].dtype == decoder


@pytest.mark.parametrize("decoder", [torch.float32, torch.bfloat16])
def test_narrowing_keeps_what_decoders_use_of_gates_and_gives_a_digest_of_its_own(decoder: torch.dtype):
    parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    gates = {f"gates.2.{part}": torch.full((2, 2), 0.1) for part in parts}
    weights = WeightSet(4, {**gates, "model.x.lora_A.weight": torch.full((2, 2), 0.1)})
    narrow = narrowed(weights, torch.bfloat16, decoder)
    assert narrow.version == 4 and narrow.digest != weights.digest
    assert {name: tensor.dtype for name, tensor in narrow.tensors.items()} == {
        "gates.2.fc1.weight": decoder,
        **{f"gates.2.{part}": torch.float32 for part in parts[1:]},
        "model.x.lora_A.weight": torch.bfloat16,
    }
    assert narrowed(weights, None, decoder) is weights and narrowed(narrow, torch.bfloat16, decoder) is narrow

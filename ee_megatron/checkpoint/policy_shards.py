"""Which shards of the policy's whole tensors (policy.py) a rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..model.gpt import EarlyExitGPT
from .mapping import Entry, along, stage_entries, stage_parameters


@dataclass(frozen=True)
class Piece:
    """A parameter of this rank and the whole tensors that it holds a share of. `copy`: another stage owns the tensors,
    as the first one does for the last one's copy of tied embeddings."""

    entry: Entry
    parameter: nn.Parameter
    copy: bool = False


def policy_pieces(chunks: Iterable[EarlyExitGPT]) -> list[Piece]:
    """Everything that the policy trains on this rank: the base (full fine-tuning) or adapters, and gates."""
    pieces: list[Piece] = []
    for model in chunks:
        assert model.config.spec is not None and model.config.dims is not None
        if model.config.spec.full:
            parameters = stage_parameters(model)
            for entry in stage_entries(model):
                copy = entry.parameter == "output_layer.weight" and model.config.dims.tied
                pieces.append(Piece(entry, parameters[entry.parameter], copy))
        for name, parameter in _added(model):
            pieces.append(Piece(Entry(name, (name,), *along(getattr(parameter, "partition_dim", -1))), parameter))
    return pieces


def _added(model: EarlyExitGPT) -> Iterator[tuple[str, nn.Parameter]]:
    """Adapters and gates by their layout-free names."""
    for layer in model.early_exit_layers():
        for prefix, module in (
            ("self_attn", layer.self_attention.linear_qkv),
            ("self_attn", layer.self_attention.linear_proj),
            ("mlp", layer.mlp.linear_fc1),
            ("mlp", layer.mlp.linear_fc2),
        ):
            for part, pair in module.adapters.items():
                name = f"model.layers.{layer.layer_number - 1}.{prefix}.{part}"
                yield f"{name}.lora_A.weight", pair.lora_A
                yield f"{name}.lora_B.weight", pair.lora_B
        if layer.gate is not None:
            for name, parameter in layer.gate.named_parameters():
                yield f"gates.{layer.depth}.{name}", parameter


@torch.no_grad()
def check_copies(pieces: Iterable[Piece]) -> None:
    """Compare to the bit what every tensor-parallel rank holds whole: gates, norms, the replicated adapter factors.

    They start alike and take the same updates; a rank that rounds otherwise would sample under gates that the others
    don't know. Raises RuntimeError, on every rank of the group, naming the first tensor that differs.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    held = [piece for piece in pieces if not piece.entry.split and piece.parameter.numel()]
    if dist.get_world_size(group) == 1 or not held:
        return
    sums = torch.stack([_checksum(piece.parameter) for piece in held])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    differ = [piece for piece, same in zip(held, (lowest == highest).tolist(), strict=True) if not same]
    if differ:
        raise RuntimeError(
            f"{len(differ)} tensors, {differ[0].entry.names[0]} the first, are no longer the same on all "
            f"{dist.get_world_size(group)} tensor-parallel ranks; go on from the last checkpoint, and if it comes "
            "again look for a rank with other hardware or libraries"
        )


def _checksum(parameter: Tensor) -> Tensor:
    """An int64 of the tensor's bits; a change of one element always changes it."""
    bits = parameter.detach().contiguous().view(torch.int32 if parameter.element_size() == 4 else torch.int16).flatten()
    # Odd factors keep a change in one place from vanishing modulo 2^64, and tell places apart.
    return (bits.long() * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()

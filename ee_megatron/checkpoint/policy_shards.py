"""The policy's whole tensors (policy.py) and the shards of them that each rank holds, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..model.gpt import EarlyExitGPT
from .mapping import Entry, along, stage_entries, stage_parameters

# Tensors cross stage boundaries in buckets of about this many elements.
BUCKET = 2**24


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
def load_policy_tensors(pieces: list[Piece], tensors: dict[str, Tensor]) -> None:
    """Fill this rank's shards from whole tensors. Raises ValueError for a missing or misshapen one."""
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for piece in pieces:
        missing = [name for name in piece.entry.names if name not in tensors]
        if missing:
            raise ValueError(f"policy tensors lack {missing[0]}; the checkpoint was made with other adapters or exits")
        local = piece.entry.shard([tensors[name] for name in piece.entry.names], ranks, rank)
        if local.shape != piece.parameter.shape:
            raise ValueError(
                f"{piece.entry.names[0]}: shape {tuple(local.shape)} in the checkpoint, "
                f"{tuple(piece.parameter.shape)} in the run"
            )
        piece.parameter.copy_(local)


@torch.no_grad()
def gather_policy_tensors(
    pieces: list[Piece], value: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter
) -> dict[str, Tensor]:
    """Whole tensors on every rank, fp32 on the CPU: shards joined over tensor ranks, stages over pipeline ranks.

    `value` picks what is gathered for a parameter: itself, or its gradient.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    stages, mine = dist.get_world_size(group), dist.get_rank(group)
    owned = [piece for piece in pieces if not piece.copy]
    found: dict[str, Tensor] = {}
    if stages == 1:
        for piece in owned:
            start = value(piece.parameter).untyped_storage().data_ptr()
            for name, joined in _join(piece, value):
                tensor = joined.float().cpu()
                # Joining mostly copies; what it passes through would change under the caller's hands.
                found[name] = tensor.clone() if tensor.untyped_storage().data_ptr() == start else tensor
        return found
    device = pieces[0].parameter.device if pieces else torch.device("cpu")
    listing: list = [None] * stages
    # ZeRO-3 leaves an empty tensor in the place of a sharded parameter.
    sizes = [getattr(piece.parameter, "ds_numel", piece.parameter.numel()) for piece in owned]
    dist.all_gather_object(listing, _buckets(sizes), group=group)
    for stage, buckets in enumerate(listing):
        for first, last in buckets:
            table: list = [None]
            if stage == mine:
                whole = [pair for piece in owned[first:last] for pair in _join(piece, value)]
                table = [[(name, tuple(tensor.shape)) for name, tensor in whole]]
                flat = torch.cat([tensor.flatten().float() for _, tensor in whole])
            source = dist.get_global_rank(group, stage)
            dist.broadcast_object_list(table, source, group=group)
            lengths = [torch.Size(shape).numel() for _, shape in table[0]]
            if stage != mine:
                flat = torch.empty(sum(lengths), device=device)
            dist.broadcast(flat, source, group=group)
            for (name, shape), part in zip(table[0], flat.cpu().split(lengths), strict=True):
                found[name] = part.view(shape).clone()
    return found


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


def _buckets(sizes: list[int]) -> list[tuple[int, int]]:
    """Consecutive ranges [first, last) of about BUCKET elements."""
    ranges, first, total = [], 0, 0
    for index, size in enumerate(sizes):
        total += size
        if total >= BUCKET or index == len(sizes) - 1:
            ranges.append((first, index + 1))
            first, total = index + 1, 0
    return ranges


def _join(piece: Piece, value: Callable[[nn.Parameter], Tensor]) -> list[tuple[str, Tensor]]:
    group = parallel_state.get_tensor_model_parallel_group()
    local = value(piece.parameter).detach().contiguous()
    parts = [local]
    if piece.entry.split and dist.get_world_size(group) > 1:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
    return list(zip(piece.entry.names, piece.entry.join(parts), strict=True))

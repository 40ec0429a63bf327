"""AdamW's state as whole tensors by name, whatever ZeRO stage and layout hold it.

exp_avg, exp_avg_sq    the moments of every policy tensor, fp32
master                 the fp32 values behind parameters of a narrower dtype; absent for fp32 parameters
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..checkpoint.policy_shards import Piece, gather_policy_tensors
from .engine import Updater

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimizerState:
    """updates: how many steps the moments have seen; tensors: kind -> name -> whole tensor, fp32 on the CPU."""

    updates: int
    tensors: dict[str, dict[str, Tensor]]


def read_state(updater: Updater, updates: int) -> OptimizerState:
    """Collect the state on every rank."""
    kinds = [*MOMENTS, *(["master"] if _narrow(updater) else [])]
    found = {}
    for kind in kinds:
        local = _local_tensors(updater, kind)
        found[kind] = gather_policy_tensors(updater.pieces, lambda p, at=local: at[id(p)])  # type: ignore[misc]
    return OptimizerState(updates, found)


@torch.no_grad()
def write_state(updater: Updater, state: OptimizerState) -> None:
    """The inverse of `read_state`, under any layout and stage. Raises ValueError for a missing or misshapen one."""
    for kind, tensors in state.tensors.items():
        if kind == "master" and not _narrow(updater):
            continue
        local = {id(piece.parameter): _shard(piece, tensors, kind) for piece in updater.pieces}
        _store(updater, kind, local, state.updates)


def read_values(updater: Updater) -> dict[str, Tensor]:
    """The policy's values on every rank under ZeRO-3, where no rank holds a whole parameter."""
    whole = _local_tensors(updater, "master")
    return gather_policy_tensors(updater.pieces, lambda p: whole[id(p)].to(p.dtype))


def _narrow(updater: Updater) -> bool:
    return any(piece.parameter.dtype != torch.float32 for piece in updater.pieces)


def _shard(piece: Piece, tensors: dict[str, Tensor], kind: str) -> Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    missing = [name for name in piece.entry.names if name not in tensors]
    if missing:
        raise ValueError(f"optimizer state {kind} lacks {missing[0]}; the checkpoint was made with another policy")
    local = piece.entry.shard([tensors[n] for n in piece.entry.names], dist.get_world_size(group), dist.get_rank(group))
    shape = getattr(piece.parameter, "ds_shape", piece.parameter.shape)
    if local.shape != shape:
        raise ValueError(f"optimizer state {kind} of {piece.entry.names[0]}: {tuple(local.shape)}, not {tuple(shape)}")
    return local


# ---- what each ZeRO stage holds ----


def _local_tensors(updater: Updater, kind: str) -> dict[int, Tensor]:
    """This rank's tensors, whole over data-parallel ranks, by parameter identity."""
    stage, optimizer = updater.settings.zero_stage, updater.engine.optimizer
    if stage == 0:
        state = optimizer.state
        return {
            id(p): state[p][kind] if kind in state[p] else torch.zeros_like(p, dtype=torch.float32)
            for p in (piece.parameter for piece in updater.pieces)
        }
    if stage == 3:
        return {
            id(piece.parameter): optimizer.get_full_hp_param(piece.parameter, None if kind == "master" else kind)
            for piece in updater.pieces
        }
    found: dict[int, Tensor] = {}
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        part = flat if kind == "master" else optimizer.optimizer.state[flat].get(kind, torch.zeros_like(flat))
        whole = _gather(part.detach(), optimizer.real_dp_process_group[index])
        for parameter, offset in _places(optimizer, index):
            found[id(parameter)] = whole.narrow(0, offset, parameter.numel()).view_as(parameter)
    return found


def _store(updater: Updater, kind: str, local: dict[int, Tensor], updates: int) -> None:
    stage, optimizer = updater.settings.zero_stage, updater.engine.optimizer
    if stage == 0:
        for piece in updater.pieces:
            _state_of(optimizer.state, piece.parameter, updates)[kind].copy_(local[id(piece.parameter)])
        return
    if stage == 3:
        _store_sharded(updater, kind, local, updates)
        return
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        group = optimizer.real_dp_process_group[index]
        whole = torch.zeros(flat.numel() * dist.get_world_size(group), device=flat.device)
        for parameter, offset in _places(optimizer, index):
            if id(parameter) in local:
                whole.narrow(0, offset, parameter.numel()).copy_(local[id(parameter)].flatten())
        mine = whole.narrow(0, dist.get_rank(group) * flat.numel(), flat.numel())
        target = flat.data if kind == "master" else _state_of(optimizer.optimizer.state, flat, updates)[kind]
        target.copy_(mine)


def _store_sharded(updater: Updater, kind: str, local: dict[int, Tensor], updates: int) -> None:
    """Under ZeRO-3 each rank writes its partition of every parameter's state."""
    optimizer = updater.engine.optimizer
    for flat in optimizer.fp32_partitioned_groups_flat:
        _state_of(optimizer.optimizer.state, flat, updates)
    for piece in updater.pieces:
        # Its own setter has no room for the padding of a last partition.
        target, _ = optimizer._get_fp32_opt_state_partition(
            piece.parameter, release_swap_buffers=False, optim_state_key=None if kind == "master" else kind
        )
        count, rank = target.numel(), dist.get_rank(piece.parameter.ds_process_group)  # type: ignore[attr-defined]
        value = local[id(piece.parameter)].flatten().to(target.device)
        value = torch.nn.functional.pad(value, (0, max(0, count * (rank + 1) - value.numel())))
        target.data.copy_(value.narrow(0, count * rank, count))


def _state_of(state: Any, parameter: Tensor, updates: int) -> dict[str, Tensor]:
    """AdamW's state of one tensor, made if it isn't there, at `updates` steps."""
    entry = state[parameter]
    for kind in MOMENTS:
        if kind not in entry:
            entry[kind] = torch.zeros_like(parameter, dtype=torch.float32)
    # torch's fused AdamW, which every optimizer on a GPU is, asks for it there.
    entry["step"] = torch.tensor(float(updates), device=parameter.device)
    return entry


def _gather(part: Tensor, group: Any) -> Tensor:
    if dist.get_world_size(group) == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _places(optimizer: Any, index: int) -> list[tuple[nn.Parameter, int]]:
    """A ZeRO-1/2 group's parameters and where each begins in the flattened group."""
    return list(zip(optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True))

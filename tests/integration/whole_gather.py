"""Whole tensors on every rank, all at once, by plain collectives: what the learner's streams are compared with."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ee_megatron.learner.engine import MOMENTS, OptimizerState
from ee_megatron.learner.learner import Learner


@torch.no_grad()
def gather(pieces, value=lambda parameter: parameter):
    """name -> fp32: shards joined over tensor ranks, stages over pipeline ranks; `value` of a parameter is gathered."""
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for piece in pieces:
        if piece.copy:
            continue
        local = value(piece.parameter).detach().contiguous()
        parts = [local]
        if piece.entry.split and dist.get_world_size(tensor_group) > 1:
            parts = [torch.empty_like(local) for _ in range(dist.get_world_size(tensor_group))]
            dist.all_gather(parts, local, group=tensor_group)
        shares = [[part[rows] for rows in piece.entry.places(len(part), len(parts))] for part in parts]
        joined = [torch.cat(same, max(0, piece.entry.dim))[: piece.entry.vocab] for same in zip(*shares, strict=True)]
        found |= {name: t.float().clone() for name, t in zip(piece.entry.names, joined, strict=True)}
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, found, group=group)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def policy_of(learner: Learner):
    if learner.updater.settings.zero_stage != 3:
        return gather(learner.pieces)
    masters = local_tensors(learner, "master")
    return gather(learner.pieces, lambda p: masters[id(p)].to(p.dtype))


def state_of(learner: Learner) -> OptimizerState:
    narrow = any(piece.parameter.dtype != torch.float32 for piece in learner.pieces)
    found = {}
    for kind in (*MOMENTS, *(["master"] if narrow else [])):
        local = local_tensors(learner, kind)
        found[kind] = gather(learner.pieces, lambda p, at=local: at[id(p)])
    return OptimizerState(learner.updates, found)


def local_tensors(learner: Learner, kind: str):
    """This rank's tensors, whole over data-parallel ranks, by parameter identity."""
    optimizer, stage = learner.updater.engine.optimizer, learner.updater.settings.zero_stage
    parameters = [piece.parameter for piece in learner.pieces]
    if stage == 0:
        zeros = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters}
        return {id(p): optimizer.state[p].get(kind, zeros[id(p)]) for p in parameters}
    if stage == 3:
        return {id(p): optimizer.get_full_hp_param(p, None if kind == "master" else kind) for p in parameters}
    found = {}
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        part = flat if kind == "master" else optimizer.optimizer.state[flat].get(kind, torch.zeros_like(flat))
        group = optimizer.real_dp_process_group[index]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.detach().contiguous(), group=group)
        whole = torch.cat(parts)
        places = zip(optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True)
        for parameter, offset in places:
            found[id(parameter)] = whole.narrow(0, offset, parameter.numel()).view_as(parameter)
    return found

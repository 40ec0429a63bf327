"""The DeepSpeed engine: ZeRO, clipping and AdamW over the policy's parameters, in learning-rate groups."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from ..checkpoint.policy_shards import Piece
from ..parallel.groups import MegatronUnits

# Learning-rate groups: adapters or the whole base, and the gates.
GROUPS = ("body", "gates")


class Trainable(nn.Module):
    """The parameters that DeepSpeed owns. The Megatron model holds the same objects and runs outside the engine, so the
    frozen base may be bfloat16 while these stay fp32, and ZeRO never sees the base."""

    def __init__(self, groups: dict[str, list[nn.Parameter]]):
        super().__init__()
        self.groups = groups
        for name, parameters in groups.items():
            self.register_module(name, nn.ParameterList(parameters))


def split_groups(pieces: Iterable[Piece]) -> dict[str, list[nn.Parameter]]:
    """Policy parameters -> learning-rate groups. Every rank must have every group, or the norm's collectives would not
    match; a stage without gates (or a policy without adapters) gets one idle element."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    device = torch.device("cpu")
    for piece in pieces:
        parameter, device = piece.parameter, piece.parameter.device
        # DeepSpeed counts in the gradient norm: replicated parameters once, sharded ones on every rank, copies never.
        parameter.tensor_model_parallel = piece.entry.split  # type: ignore[attr-defined]
        parameter.ds_pipe_replicated = piece.copy  # type: ignore[attr-defined]
        groups["gates" if piece.entry.parameter.startswith("gates.") else "body"].append(parameter)
    for group in groups.values():
        if not group:
            group.append(nn.Parameter(torch.zeros(1, device=device)))
    return groups


def make_engine(trainable: Trainable, *, zero_stage: int, gradient_clipping: float, on_cpu: bool):
    """deepspeed.initialize for ZeRO stage 1 or 2 round `trainable`; learning rates are set before every step."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if on_cpu:
        # gloo serves these ranks; compiling the shared-memory collectives would cost the first run over a minute.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": 0.0, "name": name} for name, group in trainable.groups.items()],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clipping,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    engine, *_ = deepspeed.initialize(
        model=trainable, optimizer=optimizer, config=config, mpu=MegatronUnits, dist_init_required=False
    )
    return engine


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros where the pass left no gradient: on a rank whose share of the batch was padding only, or in a layer that no
    position of it reached. DeepSpeed reduces what has a gradient, and the ranks must agree on what that is."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def sum_replicated_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum over tensor-parallel ranks what each of them has only a part of: parameters that see a part of the sequence
    (`sequence_parallel`) or of the heads (`sum_over_tensor_ranks`). One collective for all."""
    group = parallel_state.get_tensor_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return
    partial = [
        p
        for p in parameters
        if p.requires_grad and (getattr(p, "sequence_parallel", False) or getattr(p, "sum_over_tensor_ranks", False))
    ]
    if not partial:
        return
    flat = torch.cat([p.grad.flatten() for p in partial])  # type: ignore[union-attr]
    dist.all_reduce(flat, group=group)
    for parameter, piece in zip(partial, flat.split([p.numel() for p in partial]), strict=True):
        parameter.grad.copy_(piece.view_as(parameter))  # type: ignore[union-attr]


def sum_tied_gradients(pieces: Iterable[Piece]) -> None:
    """Sum over the first and the last stage: each holds the gradient of its own copy of tied embeddings."""
    group = parallel_state.get_embedding_group(check_initialized=False)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1 or group is None:
        return
    for piece in pieces:
        if getattr(piece.parameter, "shared_embedding", False):
            dist.all_reduce(piece.parameter.grad, group=group)

"""AdamW's state by tensor name, whatever ZeRO stage and layout hold it.

exp_avg, exp_avg_sq    the moments of every policy tensor, fp32
master                 the fp32 values behind parameters of a narrower dtype; absent for fp32 parameters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint.policy_stream import Holder
from .engine import Updater

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimizerState:
    """updates: how many steps the moments have seen; tensors: kind -> name -> whole tensor, fp32 on the CPU."""

    updates: int
    tensors: Mapping[str, Mapping[str, Tensor]]


def kinds(updater: Updater) -> list[str]:
    """What there is to keep. ZeRO-0 has no masters."""
    narrow = any(piece.parameter.dtype != torch.float32 for piece in updater.pieces)
    return [*MOMENTS, *(["master"] if narrow and updater.settings.zero_stage else [])]


def holder_of(updater: Updater, kind: str) -> Holder:
    """This rank's part of a kind of state; of the values under ZeRO-3, where no rank holds a whole parameter, for kind
    "value"."""
    stage = updater.settings.zero_stage
    if stage == 0:
        return WholeState(updater.engine.optimizer, kind)
    return (ShardedState if stage == 3 else FlatState)(updater.engine.optimizer, kind)


class WholeState(Holder):
    """ZeRO-0: every data-parallel rank has the state of whole parameters."""

    def __init__(self, optimizer: Any, kind: str):
        self._optimizer, self._kind = optimizer, kind

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        found = self._optimizer.state[parameter].get(self._kind)
        return torch.zeros(end - begin) if found is None else found.reshape(-1)[begin:end].float()

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        target = state_of(self._optimizer.state, parameter)[self._kind]
        target.view(-1)[begin : begin + len(values)].copy_(values)


class FlatState(Holder):
    """ZeRO-1 and 2: a learning-rate group's parameters lie one behind the other, and each data-parallel rank has the
    state of an equal part of that."""

    replicated = False

    def __init__(self, optimizer: Any, kind: str):
        self._optimizer, self._kind = optimizer, kind
        self._places: dict[int, tuple[int, int]] = {}
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[group], strict=True):
                self._places[id(parameter)] = group, offset

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """The group's part that is here, and which of its elements the parameter's first one would be."""
        group, offset = self._places[id(parameter)]
        flat = self._optimizer.single_partition_of_fp32_groups[group]
        return flat, offset - flat.numel() * dist.get_rank(self._optimizer.real_dp_process_group[group])

    def span(self, parameter: nn.Parameter) -> tuple[int, int]:
        flat, at = self._place(parameter)
        begin = max(0, -at)
        return begin, max(begin, min(parameter.numel(), flat.numel() - at))

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        flat, at = self._place(parameter)
        found = flat if self._kind == "master" else self._optimizer.optimizer.state[flat].get(self._kind)
        return torch.zeros(end - begin) if found is None else found.detach()[at + begin : at + end]

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        flat, at = self._place(parameter)
        master = self._kind == "master"
        target = flat.data if master else state_of(self._optimizer.optimizer.state, flat)[self._kind]
        target[at + begin : at + begin + len(values)].copy_(values)


class ShardedState(Holder):
    """ZeRO-3: each data-parallel rank has an equal part of every parameter's state; the last one's is padded. The kind
    "value" is the master as the parameter's dtype has it."""

    replicated = False

    def __init__(self, optimizer: Any, kind: str):
        self._optimizer, self._kind = optimizer, kind

    def _part(self, parameter: nn.Parameter) -> Tensor:
        kind = None if self._kind in ("master", "value") else self._kind
        return self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=kind
        )[0].detach()

    def _first(self, parameter: Any) -> tuple[int, int]:
        """The first element that is here, and how many are."""
        count = parameter.partition_numel()
        return count * dist.get_rank(parameter.ds_process_group), count

    def span(self, parameter: Any) -> tuple[int, int]:
        first, count = self._first(parameter)
        begin = min(first, parameter.ds_numel)
        return begin, min(first + count, parameter.ds_numel)

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        first, _ = self._first(parameter)
        found = self._part(parameter)[begin - first : end - first]
        return found.to(parameter.dtype) if self._kind == "value" else found

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        begin -= self._first(parameter)[0]
        self._part(parameter)[begin : begin + len(values)].copy_(values)


def prepare(updater: Updater, updates: int) -> None:
    """AdamW's state, made where it isn't there, at `updates` steps."""
    stage, optimizer = updater.settings.zero_stage, updater.engine.optimizer
    if stage == 0:
        for piece in updater.pieces:
            state_of(optimizer.state, piece.parameter, updates)
        return
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for flat in flats:
        state_of(optimizer.optimizer.state, flat, updates)


def state_of(state: Any, parameter: Tensor, updates: int | None = None) -> dict[str, Tensor]:
    """AdamW's state of one tensor, made if it isn't there; at `updates` steps, if they are given."""
    entry = state[parameter]
    for kind in MOMENTS:
        if kind not in entry:
            entry[kind] = torch.zeros_like(parameter, dtype=torch.float32)
    if updates is not None:
        # torch's fused AdamW, which every optimizer on a GPU is, asks for it there.
        entry["step"] = torch.tensor(float(updates), device=parameter.device)
    return entry

"""Tensor-parallel linears with LoRA, named by their Hugging Face parts.

y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685). Megatron fuses q, k, v into one matrix and gate, up into another;
each part keeps an adapter of its own, so that adapters are the same under every layout and in every body of the model.

A column-parallel linear has A replicated and B split along its rows: only the r-wide product A x crosses ranks. A
row-parallel linear has A split along its columns and B replicated. Replicated factors see a part of the sequence under
sequence parallelism; their `sequence_parallel` attribute asks for the sum over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from .config import EarlyExitConfig


class LoRAPair(nn.Module):
    """lora_A [r, in], lora_B [out, r], fp32 (they are trained); local sizes. `enabled` is switched by the model."""

    def __init__(self, config: EarlyExitConfig, in_size: int, out_size: int):
        super().__init__()
        assert config.spec is not None
        rank = config.spec.rank
        self.scale = config.spec.scale
        self.dropout = config.adapter_dropout
        self.enabled = True
        self.lora_A = nn.Parameter(torch.zeros(rank, in_size))
        self.lora_B = nn.Parameter(torch.zeros(out_size, rank))

    def down(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(x, self.lora_A.to(x.dtype))

    def up(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lora_B.to(x.dtype)) * self.scale


def _targets(config: EarlyExitConfig, prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    spec = config.spec
    return tuple(p for p in parts if spec is not None and spec.rank and f"{prefix}.{p}" in spec.targets)


class _ColumnWithLoRA(ColumnParallelLinear):
    PREFIX = ""
    PARTS: tuple[str, ...] = ()

    def __init__(self, input_size: int, output_size: int, *, config: EarlyExitConfig, **kwargs: object):
        kwargs["bias"] = self.has_bias(config)
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.part_sizes = self.sizes(config)
        self.adapters: Any = nn.ModuleDict()
        for part in _targets(config, self.PREFIX, self.PARTS):
            pair = LoRAPair(config, input_size, self.part_sizes[self.PARTS.index(part)])
            pair.lora_A.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            pair.lora_B.partition_dim = 0  # type: ignore[attr-defined]
            self.adapters[part] = pair

    def has_bias(self, config: EarlyExitConfig) -> bool:
        assert config.dims is not None
        return config.dims.has_bias(f"{self.PREFIX}.{self.PARTS[0]}")

    def part_rows(self, tensor: Tensor, parts: tuple[str, ...]) -> Tensor:
        """The rows of some parts, one part after the other, out of a fused weight [out, in] or bias [out]."""
        raise NotImplementedError

    def project(self, input_: Tensor, parts: tuple[str, ...]) -> list[Tensor]:
        """Only some parts of the product: input [..., in] -> [..., local size] each. Not under sequence parallelism.

        Exited positions need k and v, the others q as well; what nobody needs is not computed.
        """
        assert not self.sequence_parallel
        weight = self.part_rows(self.weight, parts)
        bias = None if self.bias is None else self.part_rows(self.bias, parts)
        sizes = [self.part_sizes[self.PARTS.index(part)] for part in parts]
        shared = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        outputs = list(F.linear(shared, weight, bias).split(sizes, dim=-1))
        for i, part in enumerate(parts):
            if part in self.adapters and self.adapters[part].enabled:
                low = copy_to_tensor_model_parallel_region(self.adapters[part].down(input_), group=self.tp_group)
                outputs[i] = outputs[i] + self.adapters[part].up(low)
        return outputs

    def sizes(self, config: EarlyExitConfig) -> tuple[int, ...]:
        """Local output sizes of the parts."""
        raise NotImplementedError

    def join(self, parts: list[Tensor]) -> Tensor:
        """Local outputs of the parts [s, b, size] -> the fused output's order."""
        raise NotImplementedError

    def forward(self, input_: Tensor, *args: object, **kwargs: object):
        output, bias = super().forward(input_, *args, **kwargs)
        active = {name: pair for name, pair in self.adapters.items() if pair.enabled}
        if active:
            deltas = []
            for part, size in zip(self.PARTS, self.part_sizes, strict=True):
                if part in active:
                    low = active[part].down(input_)
                    low = (
                        gather_from_sequence_parallel_region(low, group=self.tp_group)
                        if self.sequence_parallel
                        else copy_to_tensor_model_parallel_region(low, group=self.tp_group)
                    )
                    deltas.append(active[part].up(low))
                else:
                    deltas.append(output.new_zeros(*output.shape[:-1], size))
            output = output + self.join(deltas)
        return output, bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The base tensors only: adapters are saved by name, without regard to the layout (policy.py)."""
        kept, self.adapters = self.adapters, nn.ModuleDict()
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.adapters = kept


class QKVLinear(_ColumnWithLoRA):
    """q, k, v fused, interleaved by key-value group: [q of the group's heads, k, v] for each group."""

    PREFIX = "self_attn"
    PARTS = ("q_proj", "k_proj", "v_proj")

    def sizes(self, config: EarlyExitConfig) -> tuple[int, ...]:
        tp = config.tensor_model_parallel_size
        self.groups = config.num_query_groups // tp
        return (
            config.num_attention_heads * config.kv_channels // tp,
            config.num_query_groups * config.kv_channels // tp,
            config.num_query_groups * config.kv_channels // tp,
        )

    def join(self, parts: list[Tensor]) -> Tensor:
        grouped = [p.unflatten(-1, (self.groups, -1)) for p in parts]
        return torch.cat(grouped, dim=-1).flatten(-2)

    def part_rows(self, tensor: Tensor, parts: tuple[str, ...]) -> Tensor:
        grouped = tensor.unflatten(0, (self.groups, -1)).split([size // self.groups for size in self.part_sizes], dim=1)
        return torch.cat([grouped[self.PARTS.index(part)].flatten(0, 1) for part in parts])


class GateUpLinear(_ColumnWithLoRA):
    """The SwiGLU's gate and up projections, each sharded before they are joined: [gate shard, up shard]."""

    PREFIX = "mlp"
    PARTS = ("gate_proj", "up_proj")

    def sizes(self, config: EarlyExitConfig) -> tuple[int, ...]:
        return (config.ffn_hidden_size // config.tensor_model_parallel_size,) * 2

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)


class _RowWithLoRA(RowParallelLinear):
    PREFIX = ""
    PART = ""

    def __init__(self, input_size: int, output_size: int, *, config: EarlyExitConfig, **kwargs: object):
        assert config.dims is not None
        kwargs["bias"] = config.dims.has_bias(f"{self.PREFIX}.{self.PART}")
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.adapters: Any = nn.ModuleDict()
        for part in _targets(config, self.PREFIX, (self.PART,)):
            pair = LoRAPair(config, self.input_size_per_partition, output_size)
            pair.lora_A.partition_dim = 1  # type: ignore[attr-defined]
            pair.lora_B.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            self.adapters[part] = pair

    def forward(self, input_: Tensor):
        output, bias = super().forward(input_)
        for pair in self.adapters.values():
            if pair.enabled:
                low = pair.down(input_)
                low = (
                    reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
                    if self.sequence_parallel
                    else reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
                )
                output = output + pair.up(low)
        return output, bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The base tensors only, as in the column-parallel case."""
        kept, self.adapters = self.adapters, nn.ModuleDict()
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.adapters = kept


class OutLinear(_RowWithLoRA):
    """The attention's output projection; with `active` (flat indices [N]) set, of these positions only: [N, 1, D]."""

    PREFIX, PART = "self_attn", "o_proj"
    active: Tensor | None = None

    def forward(self, input_: Tensor):
        if self.active is not None:
            input_ = input_.flatten(0, 1)[self.active].unsqueeze(1)
        return super().forward(input_)


class DownLinear(_RowWithLoRA):
    PREFIX, PART = "mlp", "down_proj"

"""Tensor-parallel linears with LoRA, named by their Hugging Face parts, for all positions or for the active ones.

y = W x + s B A x (Hu et al. 2021, arXiv 2106.09685). Megatron fuses q, k, v into one matrix and gate, up into another;
each part keeps an adapter of its own, so that adapters are the same under every layout and in every body of the model.

Where adapters are on, a linear is three steps: `enter` brings its input to every tensor-parallel rank, `local` is the
rank's own product, `leave` sums the ranks' products. A column-parallel linear has A replicated and B split along its
rows, a row-parallel one A split along its columns and B replicated; both add s B A x to the local product, so adapters
cost no communication of their own. The gradient of a replicated factor is partial on each rank, and the learner sums it
(`sum_over_tensor_ranks`). Without adapters the forward pass is megatron-core's own.
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

from .config import EarlyExitTransformerConfig
from .layer import RMSNorm
from .packed import Active


class LoRAPair(nn.Module):
    """lora_A [r, in], lora_B [out, r], fp32 (they are trained); local sizes. `enabled` is switched by the model."""

    def __init__(self, config: EarlyExitTransformerConfig, in_size: int, out_size: int):
        super().__init__()
        assert config.spec is not None
        rank = config.spec.rank
        self.enabled = True
        self.lora_A = nn.Parameter(torch.zeros(rank, in_size))
        self.lora_B = nn.Parameter(torch.zeros(out_size, rank))


class _Adapted:
    """What column- and row-parallel linears share."""

    PREFIX = ""
    PARTS: tuple[str, ...] = ()
    config: EarlyExitTransformerConfig
    training: bool

    def _add_adapters(self, in_size: int, out_sizes: tuple[int, ...], replicated: str) -> None:
        """`replicated`: the factor that every tensor-parallel rank holds whole."""
        spec = self.config.spec
        self.adapters: Any = nn.ModuleDict()
        for part, size in zip(self.PARTS, out_sizes, strict=True):
            if spec is not None and spec.rank and f"{self.PREFIX}.{part}" in spec.targets:
                pair = LoRAPair(self.config, in_size, size)
                split = "lora_B" if replicated == "lora_A" else "lora_A"
                getattr(pair, replicated).sum_over_tensor_ranks = self.config.tensor_model_parallel_size > 1
                getattr(pair, split).partition_dim = 0 if split == "lora_B" else 1
                self.adapters[part] = pair

    def _enabled(self, parts: tuple[str, ...]) -> dict[str, LoRAPair]:
        return {part: self.adapters[part] for part in parts if part in self.adapters and self.adapters[part].enabled}

    def _down(self, x: Tensor, pairs: list[LoRAPair]) -> Tensor:
        """x [N, in] -> [N, r * pairs], one product for all."""
        if self.config.adapter_dropout and self.training:
            x = F.dropout(x, self.config.adapter_dropout)
        return F.linear(x, torch.cat([pair.lora_A for pair in pairs]).to(x.dtype))

    def _scale(self) -> float:
        assert self.config.spec is not None
        return self.config.spec.scale

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The base tensors only: adapters are saved by name, without regard to the layout (policy.py)."""
        adapters, self.adapters = self.adapters, nn.ModuleDict()
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        finally:
            self.adapters = adapters


class _Column(_Adapted, ColumnParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: EarlyExitTransformerConfig, **kwargs: object):
        assert config.dims is not None
        kwargs["bias"] = config.dims.has_bias(f"{self.PREFIX}.{self.PARTS[0]}")
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.part_sizes = self.sizes(config)
        self._add_adapters(input_size, self.part_sizes, replicated="lora_A")

    def sizes(self, config: EarlyExitTransformerConfig) -> tuple[int, ...]:
        """Local output sizes of the parts."""
        raise NotImplementedError

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        """Rows of all parts [size, ...] -> the order of the fused weight [out, ...]: one part after the other."""
        return torch.cat(parts)

    def part_rows(self, tensor: Tensor, parts: tuple[str, ...]) -> Tensor:
        """The rows of some parts, one part after the other, out of a fused weight [out, in] or bias [out]."""
        raise NotImplementedError

    def enter(self, x: Tensor, active: Active | None = None) -> Tensor:
        """This rank's slots [w, 1, in] (or its active ones [n, in]) -> all of them [W, 1, in] ([N, in])."""
        if not self.sequence_parallel:
            return copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        if active is not None:
            x = active.spread(x)
        whole = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
        return whole if active is None else active.pick(whole.flatten(0, 1))

    def local(self, x: Tensor, parts: tuple[str, ...] | None = None) -> Tensor:
        """x [..., in] that has entered -> [..., local out]: all parts in the fused order, or some of them one after the
        other. Exited positions need k and v, the others q as well; what nobody needs is not computed. Without the bias
        where the caller adds it."""
        weight, bias = self.weight, None if self.skip_bias_add else self.bias
        if parts is not None:
            weight, bias = self.part_rows(weight, parts), None if bias is None else self.part_rows(bias, parts)
        chosen = self.PARTS if parts is None else parts
        pairs = self._enabled(chosen)
        flat = x.flatten(0, -2)
        output = F.linear(flat, weight, bias)
        if pairs:
            rank, ranks = next(iter(pairs.values())).lora_A.size(0), len(pairs)
            rows, before = [], 0
            for part in chosen:
                size = self.part_sizes[self.PARTS.index(part)]
                if part in pairs:
                    rows.append(F.pad(pairs[part].lora_B, (before, rank * ranks - rank - before)))
                    before += rank
                else:
                    rows.append(weight.new_zeros(size, rank * ranks, dtype=torch.float32))
            up = (self.join_rows(rows) if parts is None else torch.cat(rows)).to(x.dtype)
            output = torch.addmm(output, self._down(flat, list(pairs.values())), up.t(), alpha=self._scale())
        return output.unflatten(0, x.shape[:-1])

    def forward(self, input_: Tensor, *args: object, **kwargs: object):
        if not self._enabled(self.PARTS):
            return super().forward(input_, *args, **kwargs)
        return self.local(self.enter(input_)), self.bias if self.skip_bias_add else None


class QKVLinear(_Column):
    """q, k, v fused, interleaved by key-value group: [q of the group's heads, k, v] for each group."""

    PREFIX = "self_attn"
    PARTS = ("q_proj", "k_proj", "v_proj")

    def sizes(self, config: EarlyExitTransformerConfig) -> tuple[int, ...]:
        tp = config.tensor_model_parallel_size
        self.groups = config.num_query_groups // tp
        return (
            config.num_attention_heads * config.kv_channels // tp,
            config.num_query_groups * config.kv_channels // tp,
            config.num_query_groups * config.kv_channels // tp,
        )

    def join_rows(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def part_rows(self, tensor: Tensor, parts: tuple[str, ...]) -> Tensor:
        grouped = tensor.unflatten(0, (self.groups, -1)).split([size // self.groups for size in self.part_sizes], dim=1)
        return torch.cat([grouped[self.PARTS.index(part)].flatten(0, 1) for part in parts])


class GateUpLinear(_Column):
    """The SwiGLU's gate and up projections, each sharded before they are joined: [gate shard, up shard]."""

    PREFIX = "mlp"
    PARTS = ("gate_proj", "up_proj")

    def sizes(self, config: EarlyExitTransformerConfig) -> tuple[int, ...]:
        return (config.ffn_hidden_size // config.tensor_model_parallel_size,) * 2


class _Row(_Adapted, RowParallelLinear):
    def __init__(self, input_size: int, output_size: int, *, config: EarlyExitTransformerConfig, **kwargs: object):
        assert config.dims is not None
        kwargs["bias"] = config.dims.has_bias(f"{self.PREFIX}.{self.PARTS[0]}")
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon) if config.dims.norm_after else None
        self._add_adapters(self.input_size_per_partition, (output_size,), replicated="lora_B")

    def local(self, x: Tensor) -> Tensor:
        """x [..., local in] -> this rank's share of the product [..., out], without the bias."""
        flat = x.flatten(0, -2)
        output = F.linear(flat, self.weight)
        for pair in self._enabled(self.PARTS).values():
            output = torch.addmm(output, self._down(flat, [pair]), pair.lora_B.to(x.dtype).t(), alpha=self._scale())
        return output.unflatten(0, x.shape[:-1])

    def leave(self, x: Tensor, active: Active | None = None) -> Tensor:
        """Shares [W, 1, out] (or [N, out] of the active slots) -> their sum at this rank's slots [w, 1, out]
        ([n, out])."""
        if not self.sequence_parallel:
            return reduce_from_tensor_model_parallel_region(x, group=self.tp_group)
        if active is not None:
            x = active.place(x)
        mine = reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return mine if active is None else active.pick_mine(mine.flatten(0, 1))

    def finish(self, x: Tensor) -> Tensor:
        """Sums of shares [..., out], with the bias and, where what is added to the stream is normed, the norm."""
        x = x if self.bias is None else x + self.bias
        return x if self.post_layernorm is None else self.post_layernorm(x)

    def forward(self, input_: Tensor):
        if self.post_layernorm is not None:
            return self.finish(self.leave(self.local(input_))), None
        if not self._enabled(self.PARTS):
            return super().forward(input_)
        output = self.leave(self.local(input_))
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class OutLinear(_Row):
    """Attention's output projection, row-parallel, with its adapter."""

    PREFIX, PARTS = "self_attn", ("o_proj",)


class DownLinear(_Row):
    """The MLP's way down, row-parallel, with its adapter."""

    PREFIX, PARTS = "mlp", ("down_proj",)

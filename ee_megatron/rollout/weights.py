"""The decoder's weights: read from a Hugging Face directory, fused for speed, LoRA merged from a kept base copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import ModelDims
from ..families.hf_directory import HFDirectory
from ..policy import PolicySpec

# Fused matrix -> the linears whose rows it holds, in this order.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass
class Block:
    """One layer. qkv [q+2kv, D], out [D, q], gate_up [2I, D], down [D, I]; biases by the same names, or None."""

    matrices: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass
class DeepKV:
    """Key/value weights of layers first..L-1, norm gains folded in, stacked for one product over all of them.

    weight [(L-first)·2·kv, D], bias [(L-first)·2·kv] or None, k_norm [L-first, 1, hd] or None. The rows of a layer are
    contiguous, so the layers from any depth e >= first on are a suffix.
    """

    first: int
    weight: Tensor
    bias: Tensor | None
    k_norm: Tensor | None


class DecoderWeights:
    """All tensors of a decoder in one dtype on one device; `merge` switches between base and adapted matrices."""

    def __init__(self, source: HFDirectory, dtype: torch.dtype, device: torch.device):
        self.dims: ModelDims = source.dims
        self.dtype, self.device = dtype, device
        self.embedding = self._read(source, "model.embed_tokens.weight")
        self.blocks = [self._block(source, layer) for layer in range(self.dims.num_layers)]
        self.final_norm = self._read(source, "model.norm.weight")
        self.head = self.embedding if self.dims.tied else self._read(source, "lm_head.weight")
        self._base: dict[tuple[int, str], Tensor] = {}

    def merge(self, tensors: dict[str, Tensor] | None, spec: PolicySpec | None) -> None:
        """W = base + scale · B A for every adapted matrix, computed in float32; None restores the base exactly."""
        for (layer, name), base in self._base.items():
            self.blocks[layer].matrices[name].copy_(base)
        if tensors is None or spec is None or spec.rank == 0:
            return
        linears = self.dims.linear_shapes()
        for layer, block in enumerate(self.blocks):
            for name, parts in FUSED.items():
                if not any(part in spec.targets for part in parts):
                    continue
                base = self._base.setdefault((layer, name), block.matrices[name].clone())
                row = 0
                for part in parts:
                    rows = linears[part][0]
                    if part in spec.targets:
                        prefix = f"model.layers.{layer}.{part}"
                        down = tensors[f"{prefix}.lora_A.weight"].to(self.device, torch.float32)
                        up = tensors[f"{prefix}.lora_B.weight"].to(self.device, torch.float32)
                        merged = torch.addmm(base[row : row + rows].float(), up, down, alpha=spec.scale)
                        block.matrices[name][row : row + rows].copy_(merged)
                    row += rows

    def deep_kv(self, first: int) -> DeepKV:
        """Stack the key/value weights of layers first..L-1 as they are now (call again after `merge`)."""
        q, deep = self.dims.q_size, self.blocks[first:]
        weight = torch.cat([(b.matrices["qkv"][q:].float() * b.attention_norm.float()).to(self.dtype) for b in deep])
        biases = [b.biases["qkv"] for b in deep]
        bias = torch.cat([b[q:] for b in biases if b is not None]) if self.dims.qkv_bias else None
        norms = [b.k_norm for b in deep if b.k_norm is not None]
        return DeepKV(first, weight, bias, torch.stack(norms)[:, None] if norms else None)

    def _read(self, source: HFDirectory, name: str) -> Tensor:
        return source.tensor(name).to(self.device, self.dtype)

    def _block(self, source: HFDirectory, layer: int) -> Block:
        def read(name: str) -> Tensor:
            return self._read(source, f"model.layers.{layer}.{name}")

        matrices: dict[str, Tensor] = {}
        biases: dict[str, Tensor | None] = {}
        for name, parts in FUSED.items():
            matrices[name] = torch.cat([read(f"{part}.weight") for part in parts])
            has_bias = self.dims.has_bias(parts[0])
            biases[name] = torch.cat([read(f"{part}.bias") for part in parts]) if has_bias else None
        norms = [read(f"self_attn.{n}_norm.weight") if self.dims.qk_norm else None for n in "qk"]
        return Block(
            matrices,
            biases,
            read("input_layernorm.weight"),
            read("post_attention_layernorm.weight"),
            norms[0],
            norms[1],
        )

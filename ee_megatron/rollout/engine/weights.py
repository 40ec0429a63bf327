"""The decoder's weights: read from a model directory, fused and packed for speed, LoRA merged with the base unchanged.

Memory: the base once, in the decoder's dtype, and what is multiplied with once more: on a CPU every matrix in a packed
form (linear.py; the readout's and gates' may be float32 there), elsewhere those that adapters change.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...families import ModelDims
from ...families.hf_directory import HFDirectory
from ...policy import PolicySpec
from ...tensors import BLOCK_BYTES, ModelSource, to_device
from .linear import Linear, WideLinear

# Fused matrix -> the linears whose rows it holds, in this order.
FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass
class LayerWeights:
    """Weights of one layer. Linears qkv [q+2kv, D], out [D, q], gate_up [2I, D], down [D, I] as they are now, and the
    same as base matrices; biases by the same names, or None. Norms of queries and keys: of each head, [hd] both, or
    of all heads together, [H hd + KVH hd]."""

    linears: dict[str, Linear]
    base: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    whole_norm: Tensor | None = None
    rotates: bool = True


@dataclass
class SkippedKV:
    """Weights for keys and values of the `layers` layers from `first` on, of rows that left at or before depth `first`.

    One stacked product of the normed stream, gain folded in (with `norm_after` of the stream itself), to [A,
    layers·2·KVH·hd]; k_norm [layers, hd] or, of all heads together, whole_norm [layers, KVH hd].
    no_rope: bool [layers], those whose keys aren't rotated; None: all rotate.
    """

    first: int
    layers: int
    linear: Linear
    k_norm: Tensor | None
    no_rope: Tensor | None = None
    whole_norm: Tensor | None = None


class DecoderWeights:
    """All tensors of a decoder in one dtype on one device. `tensors`: those of the base by their Hugging Face names, of
    fused matrices the rows."""

    def __init__(self, source: HFDirectory | ModelSource, dtype: torch.dtype, device: torch.device):
        self.dims: ModelDims = source.dims
        self.dtype, self.device, self.path = dtype, device, Path(source.path)
        self._open: Callable[[Path], HFDirectory | ModelSource] = type(source)
        self.tensors: dict[str, Tensor] = {}
        self.embedding = self._read(source, "model.embed_tokens.weight")
        self.blocks = [self._block(source, layer) for layer in range(self.dims.num_layers)]
        self.final_norm = self._read(source, "model.norm.weight")
        self._head = self.embedding if self.dims.tied else self._read(source, "lm_head.weight")
        self._packed_head: WideLinear | None = None
        self.original = True

    @property
    def head(self) -> WideLinear:
        """The unembedding matrix [V, D]; after `write_base` there is none before `merge`."""
        assert self._packed_head is not None, "merge comes before use"
        return self._packed_head

    def head_of(self, tokens: Tensor) -> WideLinear:
        """Unembedding of some tokens int64 [n] alone."""
        return WideLinear(self._head[tokens])

    def copy_head(self) -> WideLinear:
        """A copy of the readout's current matrix, which `write_base` does not change."""
        return WideLinear(self._head.clone())

    @torch.inference_mode()
    def write_base(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor of the base, by its Hugging Face name, in place. Call `merge` after the last."""
        self.original, self._packed_head = False, None
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            self.blocks[int(layer[1])].linears.clear()
        rows = max(1, BLOCK_BYTES // (4 * math.prod(tensor.shape[1:])))
        for into, block in zip(self.tensors[name].split(rows), tensor.split(rows), strict=True):
            into.copy_(to_device(block, self.device))

    @torch.inference_mode()
    def restore_base(self) -> None:
        """Read the directory's tensors from disk again, so that no second copy of the model stays in memory."""
        if self.original:
            return
        source = self._open(self.path)
        for name in self.dims.tensor_shapes():
            self.write_base(name, source.tensor(name))
        self.original = True

    @torch.inference_mode()
    def merge(
        self, tensors: dict[str, Tensor] | None, spec: PolicySpec | None, depths: tuple[int, ...]
    ) -> list[SkippedKV]:
        """Merge adapters: W = base + scale · B A, computed in float32; without adapters the base exactly.

        Returns the stacked key/value weights of the layers between each exit depth and the next (the last: L).
        """
        adapted = spec.targets if tensors is not None and spec is not None and spec.rank else ()
        folded: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            for name, parts in FUSED.items():
                weight, changed = block.base[name], any(part in adapted for part in parts)
                if changed:
                    assert tensors is not None and spec is not None
                    weight = self._merged(layer, name, tensors, spec)
                if changed or name not in block.linears or block.linears[name].adapted:
                    block.linears[name] = Linear(weight, block.biases[name], adapted=changed)
                if name == "qkv" and depths and layer >= depths[0]:
                    rows = weight[self.dims.q_size :]
                    if not self.dims.norm_after:
                        rows = (rows.float() * block.attention_norm.float()).to(self.dtype)
                    folded.append(rows)
        self._packed_head = self._packed_head or WideLinear(self._head)
        return self._skipped(folded, depths)

    def _merged(self, layer: int, name: str, tensors: dict[str, Tensor], spec: PolicySpec) -> Tensor:
        base = self.blocks[layer].base[name]
        merged, rows = torch.empty_like(base), [self.dims.linear_shapes()[part][0] for part in FUSED[name]]
        for part, source, target in zip(FUSED[name], base.split(rows), merged.split(rows), strict=True):
            if part in spec.targets:
                prefix = f"model.layers.{layer}.{part}"
                down = tensors[f"{prefix}.lora_A.weight"].to(self.device, torch.float32)
                up = tensors[f"{prefix}.lora_B.weight"].to(self.device, torch.float32)
                target.copy_(torch.addmm(source.float(), up, down, alpha=spec.scale))
            else:
                target.copy_(source)
        return merged

    def _skipped(self, folded: list[Tensor], depths: tuple[int, ...]) -> list[SkippedKV]:
        q, groups = self.dims.q_size, []
        for first, stop in itertools.pairwise((*depths, self.dims.num_layers)):
            weight = torch.cat(folded[first - depths[0] : stop - depths[0]])
            biases = [b[q:] for b in (block.biases["qkv"] for block in self.blocks[first:stop]) if b is not None]
            gains = [block.k_norm for block in self.blocks[first:stop] if block.k_norm is not None]
            whole = [block.whole_norm[q:] for block in self.blocks[first:stop] if block.whole_norm is not None]
            linear = Linear(weight, torch.cat(biases) if biases else None)
            still = [not block.rotates for block in self.blocks[first:stop]]
            no_rope = torch.tensor(still, device=self.device) if any(still) else None
            k_norm, whole_norm = (torch.stack(norms) if norms else None for norms in (gains, whole))
            groups.append(SkippedKV(first, stop - first, linear, k_norm, no_rope, whole_norm))
        return groups

    def _read(self, source: HFDirectory | ModelSource, *names: str) -> Tensor:
        """One tensor, or several as the rows of one."""
        parts = [source.tensor(name).to(self.device, self.dtype) for name in names]
        whole = torch.cat(parts)
        self.tensors.update(zip(names, whole.split([len(part) for part in parts]), strict=True))
        return whole

    def _block(self, source: HFDirectory | ModelSource, layer: int) -> LayerWeights:
        def read(kind: str, *parts: str) -> Tensor:
            return self._read(source, *(f"model.layers.{layer}.{part}.{kind}" for part in parts))

        base = {name: read("weight", *parts) for name, parts in FUSED.items()}
        biases = {name: read("bias", *parts) if self.dims.has_bias(parts[0]) else None for name, parts in FUSED.items()}
        attention_norm, mlp_norm = (read("weight", name) for name in self.dims.block_norms)
        made = LayerWeights({}, base, biases, attention_norm, mlp_norm, rotates=layer not in self.dims.no_rope)
        if self.dims.qk_norm_whole:
            made.whole_norm = read("weight", "self_attn.q_norm", "self_attn.k_norm")
        elif self.dims.qk_norm:
            made.q_norm, made.k_norm = (read("weight", f"self_attn.{q}_norm") for q in "qk")
        return made


@dataclass
class GateWeights:
    """A gate: fc1 [w, D] in the model's dtype; its bias [w], fc2 [1, w] and its bias [1] always in float32."""

    fc1: WideLinear
    fc2: Tensor
    fc2_bias: Tensor


class PartialLoad:
    """Policy tensors received so far. Base tensors go straight into the decoder's; adapters and gates are held."""

    def __init__(self, spec: PolicySpec, dims: ModelDims):
        self.expected = spec.tensor_shapes(dims)
        self.of_base = dims.tensor_shapes() if spec.full else {}
        self.retained: dict[str, Tensor] = {}
        self.seen: set[str] = set()

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a name that is unknown or has come before, and for another shape."""
        for name, tensor in tensors.items():
            if name not in self.expected or name in self.seen:
                what = "came twice" if name in self.seen else "is unknown"
                raise ValueError(f"policy tensor {name} {what}; send every tensor of the policy's spec exactly once")
            shape = self.expected[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"policy tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")

    def check_whole(self, coming: Iterable[str] = ()) -> None:
        """Raises ValueError if tensors are missing that have neither come nor are `coming`."""
        missing = sorted(self.expected.keys() - self.seen - set(coming))
        if missing:
            raise ValueError(
                f"policy tensors lack {missing[0]} ({len(missing)} of {len(self.expected)}); load weights made with "
                "the same policy settings, and all of them"
            )

    def take(self, tensors: Mapping[str, Tensor], weights: DecoderWeights) -> None:
        """Store a chunk. Raises ValueError as `check` does, before anything of the chunk is written."""
        self.check(tensors)
        held = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in self.of_base}
        self.retained.update(zip(held, to_device(list(held.values()), weights.device), strict=True))
        for name in filter(self.of_base.__contains__, tensors):
            weights.write_base(name, tensors[name])
        self.seen.update(tensors)


def gates_from(
    tensors: dict[str, Tensor], depths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[GateWeights]:
    """Copies of the gates at `depths`, in this order, for a model of `dtype`."""

    def read(depth: int, part: str) -> Tensor:
        return tensors[f"gates.{depth}.{part}"].to(device, torch.float32).clone()

    return [
        GateWeights(
            WideLinear(read(d, "fc1.weight").to(dtype), read(d, "fc1.bias")),
            read(d, "fc2.weight"),
            read(d, "fc2.bias"),
        )
        for d in depths
    ]

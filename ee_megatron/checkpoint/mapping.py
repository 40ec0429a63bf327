"""Which Hugging Face tensors make up which Megatron parameter, and each tensor-parallel rank's share of it.

linear_qkv   q, k, v interleaved by key-value group: [q of the group's heads, k, v]; ranks own whole groups
linear_fc1   gate and up, each cut along its rows first, then joined
linear_proj, linear_fc2   cut along columns;   embedding, head   cut along rows, vocabulary padded with zeros
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..families import ModelDims
from ..families.hf_directory import HFDirectory
from ..model.config import padded_vocab
from ..model.gpt import STORED_NORMS, EarlyExitGPT

Shard = Callable[[list[Tensor], int, int], Tensor]
Parts = Callable[[Tensor, int], list[Tensor]]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of a stage: its name there, the HF tensors it holds, and the two directions.

    dim: along which the tensor-parallel ranks cut the HF tensors; below 0: each of them holds them whole.
    shard(hf_tensors, ranks, rank) -> the rank's local tensor; parts(local tensor, ranks) -> its share of each tensor.
    As that only moves rows, a vector of the local tensor's row numbers may take its place.
    rows: of the whole tensor, where shares are padded beyond it.
    """

    parameter: str
    names: tuple[str, ...]
    dim: int
    shard: Shard
    parts: Parts
    rows: int | None = None

    @property
    def stored(self) -> str:
        """The parameter's name in a checkpoint, if its stage is the whole model."""
        return stored_name(self.parameter)

    @property
    def split(self) -> bool:
        """Whether tensor-parallel ranks hold different parts."""
        return self.dim >= 0

    def join(self, locals_: list[Tensor]) -> list[Tensor]:
        """The HF tensors from the local tensors of all ranks."""
        if self.dim < 0:
            return self.parts(locals_[0], 1)
        shares = [self.parts(local, len(locals_)) for local in locals_]
        return [torch.cat(same, self.dim)[: self.rows] for same in zip(*shares, strict=True)]


def stored_name(parameter: str) -> str:
    """A parameter's name in megatron-core's checkpoints."""
    for module, stored in STORED_NORMS.items():
        parameter = parameter.replace(f".{module}", f".{stored}")
    return parameter


def name_before(stored: str) -> str:
    """The name under which earlier versions stored what is `stored` now."""
    for module, now in STORED_NORMS.items():
        stored = stored.replace(f".{now}", f".{module}")
    return stored


def _whole(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
    return tensors[0]


def _itself(local: Tensor, ranks: int) -> list[Tensor]:
    return [local]


def along(dim: int) -> tuple[int, Shard, Parts]:
    """How one tensor is held that the ranks cut along `dim`; below 0: that each of them holds whole."""
    if dim < 0:
        return dim, _whole, _itself
    return dim, lambda tensors, ranks, rank: tensors[0].chunk(ranks, dim)[rank], _itself


def _qkv(dims: ModelDims) -> tuple[int, Shard, Parts]:
    per_group = dims.heads // dims.kv_heads * dims.head_dim

    def shard(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
        parts = [t.unflatten(0, (dims.kv_heads, -1)).chunk(ranks, 0)[rank] for t in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def parts(local: Tensor, ranks: int) -> list[Tensor]:
        groups = local.unflatten(0, (dims.kv_heads // ranks, -1))
        return [part.flatten(0, 1) for part in groups.split([per_group, dims.head_dim, dims.head_dim], dim=1)]

    return 0, shard, parts


def _gate_up_shard(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
    return torch.cat([t.chunk(ranks, 0)[rank] for t in tensors])


def _gate_up_parts(local: Tensor, ranks: int) -> list[Tensor]:
    return list(local.chunk(2, 0))


def _vocabulary(dims: ModelDims) -> tuple[int, Shard, Parts, int]:
    def shard(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
        extra = padded_vocab(dims.vocab, ranks) - dims.vocab
        padded = torch.cat([tensors[0], tensors[0].new_zeros(extra, dims.hidden)]) if extra else tensors[0]
        return padded.chunk(ranks, 0)[rank]

    return 0, shard, _itself, dims.vocab


def entries(dims: ModelDims, first_layer: int, layers: int, *, embedding: bool, head: bool) -> Iterator[Entry]:
    """Every parameter of a stage with layers first_layer .. first_layer + layers - 1 (0-based).

    `embedding`: it holds the word embeddings; `head`: it holds the final norm and, unless the embedding on the same
    stage serves as head, the output layer.
    """
    vocabulary, whole, columns = _vocabulary(dims), along(-1), along(1)
    qkv, gate_up = _qkv(dims), (0, _gate_up_shard, _gate_up_parts)
    if embedding:
        yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), *vocabulary)
    for local in range(layers):
        hf, mc = f"model.layers.{first_layer + local}", f"decoder.layers.{local}"
        yield Entry(f"{mc}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), *whole)
        yield Entry(f"{mc}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), *whole)
        for kind in ("weight", "bias"):
            fused = [
                ("self_attention.linear_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv),
                ("self_attention.linear_proj", ("self_attn.o_proj",), columns if kind == "weight" else whole),
                ("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), gate_up),
                ("mlp.linear_fc2", ("mlp.down_proj",), columns if kind == "weight" else whole),
            ]
            for parameter, names, both in fused:
                if kind == "weight" or dims.has_bias(names[0]):
                    yield Entry(f"{mc}.{parameter}.{kind}", tuple(f"{hf}.{n}.{kind}" for n in names), *both)
        if dims.qk_norm:
            for q in ("q", "k"):
                yield Entry(f"{mc}.self_attention.{q}_layernorm.weight", (f"{hf}.self_attn.{q}_norm.weight",), *whole)
    if head:
        yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), *whole)
        if not dims.tied:
            yield Entry("output_layer.weight", ("lm_head.weight",), *vocabulary)
        elif not embedding:
            yield Entry("output_layer.weight", ("model.embed_tokens.weight",), *vocabulary)


def stage_entries(model: EarlyExitGPT) -> Iterator[Entry]:
    """`entries` for the stage that `model` is."""
    dims = model.config.dims
    assert dims is not None
    first = model.early_exit_layers()[0].layer_number - 1
    yield from entries(
        dims, first, len(model.early_exit_layers()), embedding=model.pre_process, head=model.post_process
    )


def stage_parameters(model: EarlyExitGPT) -> dict[str, nn.Parameter]:
    """The stage's base parameters by their megatron-core names."""
    return {n: p for n, p in model.named_parameters() if ".adapters." not in n and ".gate." not in n}


@torch.no_grad()
def load_base(model: EarlyExitGPT, source: HFDirectory) -> None:
    """Fill a stage's base parameters from a Hugging Face directory, one tensor at a time.

    Every base parameter of the stage must be filled exactly once (assertion: a gap would be a bug of the mapping).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    parameters = stage_parameters(model)
    for entry in stage_entries(model):
        local = entry.shard([source.tensor(name) for name in entry.names], ranks, rank)
        target = parameters.pop(entry.parameter)
        assert target.shape == local.shape, (entry.parameter, target.shape, local.shape)
        target.copy_(local)
    assert not parameters, f"parameters that no Hugging Face tensor fills: {sorted(parameters)}"

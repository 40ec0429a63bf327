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
from ..model.gpt import EarlyExitGPT

Shard = Callable[[list[Tensor], int, int], Tensor]
Join = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of a stage: its name there, the HF tensors it holds, and the two directions.

    shard(hf_tensors, ranks, rank) -> the rank's local tensor; join(local tensors of all ranks) -> hf_tensors.
    """

    parameter: str
    names: tuple[str, ...]
    shard: Shard
    join: Join


def _columns(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
    return tensors[0].chunk(ranks, 1)[rank]


def _whole(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
    return tensors[0]


def _first(locals_: list[Tensor]) -> list[Tensor]:
    return [locals_[0]]


def _qkv(dims: ModelDims) -> tuple[Shard, Join]:
    per_group = dims.heads // dims.kv_heads * dims.head_dim

    def shard(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
        parts = [t.unflatten(0, (dims.kv_heads, -1)).chunk(ranks, 0)[rank] for t in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def join(locals_: list[Tensor]) -> list[Tensor]:
        groups = torch.cat([t.unflatten(0, (dims.kv_heads // len(locals_), -1)) for t in locals_])
        parts = groups.split([per_group, dims.head_dim, dims.head_dim], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    return shard, join


def _gate_up_shard(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
    return torch.cat([t.chunk(ranks, 0)[rank] for t in tensors])


def _gate_up_join(locals_: list[Tensor]) -> list[Tensor]:
    halves = [t.chunk(2, 0) for t in locals_]
    return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


def _vocabulary(dims: ModelDims) -> tuple[Shard, Join]:
    def shard(tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
        extra = padded_vocab(dims.vocab, ranks) - dims.vocab
        padded = torch.cat([tensors[0], tensors[0].new_zeros(extra, dims.hidden)]) if extra else tensors[0]
        return padded.chunk(ranks, 0)[rank]

    return shard, lambda locals_: [torch.cat(locals_)[: dims.vocab]]


def entries(dims: ModelDims, first_layer: int, layers: int, *, embedding: bool, head: bool) -> Iterator[Entry]:
    """Every parameter of a stage with layers first_layer .. first_layer + layers - 1 (0-based).

    `embedding`: it holds the word embeddings; `head`: it holds the final norm and, unless the embedding on the same
    stage serves as head, the output layer.
    """
    vocabulary, whole = _vocabulary(dims), (_whole, _first)
    columns: tuple[Shard, Join] = (_columns, lambda locals_: [torch.cat(locals_, dim=1)])
    qkv, gate_up = _qkv(dims), (_gate_up_shard, _gate_up_join)
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


@torch.no_grad()
def load_base(model: EarlyExitGPT, source: HFDirectory) -> None:
    """Fill this rank's base parameters from a Hugging Face directory, one tensor at a time.

    Every base parameter of the stage must be filled exactly once (assertion: a gap would be a bug of the mapping).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    parameters = {n: p for n, p in model.named_parameters() if ".adapters." not in n and ".gate." not in n}
    for entry in stage_entries(model):
        local = entry.shard([source.tensor(name) for name in entry.names], ranks, rank)
        target = parameters.pop(entry.parameter)
        assert target.shape == local.shape, (entry.parameter, target.shape, local.shape)
        target.copy_(local)
    assert not parameters, f"parameters that no Hugging Face tensor fills: {sorted(parameters)}"


def policy_parameters(model: EarlyExitGPT) -> dict[str, nn.Parameter]:
    """This rank's adapter and gate parameters by their layout-free names (policy.py); local shards."""
    found: dict[str, nn.Parameter] = {}
    for layer in model.early_exit_layers():
        index = layer.layer_number - 1
        for prefix, module in (
            ("self_attn", layer.self_attention.linear_qkv),
            ("self_attn", layer.self_attention.linear_proj),
            ("mlp", layer.mlp.linear_fc1),
            ("mlp", layer.mlp.linear_fc2),
        ):
            for part, pair in module.adapters.items():
                found[f"model.layers.{index}.{prefix}.{part}.lora_A.weight"] = pair.lora_A
                found[f"model.layers.{index}.{prefix}.{part}.lora_B.weight"] = pair.lora_B
        if layer.gate is not None:
            for name, parameter in layer.gate.named_parameters():
                found[f"gates.{layer.depth}.{name}"] = parameter
    return found


@torch.no_grad()
def load_policy_tensors(model: EarlyExitGPT, tensors: dict[str, Tensor]) -> None:
    """Fill this rank's adapters and gates from whole tensors. Raises ValueError for a missing or misshapen one."""
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, parameter in policy_parameters(model).items():
        if name not in tensors:
            raise ValueError(f"policy tensors lack {name}; the checkpoint was made with other adapters or exits")
        dim = getattr(parameter, "partition_dim", -1)
        local = tensors[name] if dim < 0 else tensors[name].chunk(ranks, dim)[rank]
        if local.shape != parameter.shape:
            raise ValueError(
                f"{name}: shape {tuple(local.shape)} in the checkpoint, {tuple(parameter.shape)} in the run"
            )
        parameter.copy_(local)


@torch.no_grad()
def gather_policy_tensors(model: EarlyExitGPT) -> dict[str, Tensor]:
    """The whole policy on every rank, fp32 on the CPU: shards joined over tensor ranks, stages over pipeline ranks."""
    tp_group, pp_group = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    mine: dict[str, Tensor] = {}
    for name, parameter in policy_parameters(model).items():
        dim, value = getattr(parameter, "partition_dim", -1), parameter.detach()
        if dim >= 0 and dist.get_world_size(tp_group) > 1:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(tp_group))]
            dist.all_gather(parts, value.contiguous(), group=tp_group)
            value = torch.cat(parts, dim=dim)
        mine[name] = value
    stages = dist.get_world_size(pp_group)
    if stages == 1:
        return {name: value.cpu().clone() for name, value in mine.items()}
    listing: list = [None] * stages
    dist.all_gather_object(listing, [(name, tuple(value.shape)) for name, value in mine.items()], group=pp_group)
    whole: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    for stage, table in enumerate(listing):
        sizes = [int(torch.Size(shape).numel()) for _, shape in table]
        flat = torch.empty(sum(sizes), device=device)
        if stage == dist.get_rank(pp_group):
            flat = torch.cat([value.flatten().float() for value in mine.values()])
        dist.broadcast(flat, dist.get_global_rank(pp_group, stage), group=pp_group)
        for (name, shape), piece in zip(table, flat.cpu().split(sizes), strict=True):
            whole[name] = piece.view(shape).clone()
    return whole

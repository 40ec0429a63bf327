"""Maps Hugging Face tensors to Megatron parameters, and to the part of them that each rank holds.

linear_qkv   q, k, v interleaved by key-value group: [q of the group's heads, k, v]; ranks own whole groups
linear_fc1   gate and up, each cut along its rows first, then joined
linear_proj, linear_fc2   cut along columns;   embedding, head   cut along rows, vocabulary padded with zeros
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..families import ModelDims
from ..families.hf_directory import HFDirectory
from ..model.config import padded_vocab
from ..model.gpt import STORED_NORMS, EarlyExitGPT

Run = tuple[int, int, int]
"""Consecutive rows: the first of a tensor, the first of a parameter, how many."""


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter of a stage: its name, the Hugging Face tensors in it, and their arrangement.

    dim: along which tensor-parallel ranks cut the tensors; below 0: each of them holds them whole.
    groups, sizes: the whole parameter is so many groups of rows, in each of which the tensors follow one another with
    rows in these proportions.
    vocab: rows of the tensor, where ranks pad it to equal shares.
    """

    parameter: str
    names: tuple[str, ...]
    dim: int = -1
    groups: int = 1
    sizes: tuple[int, ...] = (1,)
    vocab: int | None = None

    @property
    def stored(self) -> str:
        """The parameter's name in a checkpoint, if its stage is the whole model."""
        return stored_name(self.parameter)

    @property
    def split(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return self.dim >= 0

    def places(self, rows: int, ranks: int) -> list[Tensor]:
        """Rows of a rank's local parameter, of `rows` rows, that hold its share of each tensor, in order; int64 [n]."""
        by_group = torch.arange(rows).view(max(1, self.groups // ranks), -1)
        unit = by_group.size(1) // sum(self.sizes)
        return [part.flatten() for part in by_group.split([unit * size for size in self.sizes], dim=1)]

    def runs(self, rows: int) -> dict[str, tuple[Run, ...]]:
        """Ranges of rows of each tensor in the whole parameter, which has `rows`."""
        return {name: runs_of(places) for name, places in zip(self.names, self.places(rows, 1), strict=True)}

    def shard(self, tensors: list[Tensor], ranks: int, rank: int) -> Tensor:
        """A rank's local parameter, cut from whole tensors."""
        if self.vocab is not None and (extra := padded_vocab(self.vocab, ranks) - self.vocab):
            tensors = [torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])]) for tensor in tensors]
        shares = [tensor.chunk(ranks, self.dim)[rank] if self.split else tensor for tensor in tensors]
        if len(shares) == 1:
            return shares[0]
        joined = torch.cat(shares)
        return joined if self.groups == 1 else joined[torch.cat(self.places(len(joined), ranks)).argsort()]

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the whole parameter, from its tensors' shapes."""
        return sum(shape[0] for shape in shapes), *shapes[0][1:]


def runs_of(places: Tensor) -> tuple[Run, ...]:
    """Group row numbers into ranges of consecutive ones."""
    starts = [0, *((places.diff() != 1).nonzero().flatten() + 1).tolist(), len(places)]
    return tuple((a, int(places[a]), b - a) for a, b in itertools.pairwise(starts) if b > a)


def stored_name(parameter: str) -> str:
    """Name of a parameter in megatron-core's checkpoints. Earlier versions of this package stored norms under their
    names in the model."""
    for module, stored in STORED_NORMS.items():
        parameter = parameter.replace(f".{module}", f".{stored}")
    return parameter


def entries(dims: ModelDims, first_layer: int, layers: int, *, embedding: bool, head: bool) -> Iterator[Entry]:
    """Name map of a stage with layers first_layer .. first_layer + layers - 1 (0-based).

    `embedding`: it holds the word embeddings; `head`: it holds the final norm and, unless the embedding on the same
    stage serves as head, the output layer.
    """
    embeddings = "model.embed_tokens.weight"
    if embedding:
        yield Entry("embedding.word_embeddings.weight", (embeddings,), 0, vocab=dims.vocab)
    for local in range(layers):
        hf, mc = f"model.layers.{first_layer + local}", f"decoder.layers.{local}"
        norms = ("input_layernorm", "pre_mlp_layernorm")
        if dims.norm_after:
            norms = ("self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm")
        for parameter, name in zip(norms, dims.block_norms, strict=True):
            yield Entry(f"{mc}.{parameter}.weight", (f"{hf}.{name}.weight",))
        for kind in ("weight", "bias"):
            columns = 1 if kind == "weight" else -1
            heads = (dims.heads // dims.kv_heads, 1, 1)
            linears = [
                ("self_attention.linear_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0, heads),
                ("self_attention.linear_proj", ("self_attn.o_proj",), columns, (1,)),
                ("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), 0, (1, 1)),
                ("mlp.linear_fc2", ("mlp.down_proj",), columns, (1,)),
            ]
            for parameter, names, dim, sizes in linears:
                if kind == "weight" or dims.has_bias(names[0]):
                    held = tuple(f"{hf}.{name}.{kind}" for name in names)
                    groups = dims.kv_heads if len(names) == 3 else 1
                    yield Entry(f"{mc}.{parameter}.{kind}", held, dim, groups, sizes)
        if dims.qk_norm:
            for q in ("q", "k"):
                name = f"{hf}.self_attn.{q}_norm.weight"
                yield Entry(f"{mc}.self_attention.{q}_layernorm.weight", (name,), 0 if dims.qk_norm_whole else -1)
    if head:
        yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",))
        if not dims.tied or not embedding:
            name = embeddings if dims.tied else "lm_head.weight"
            yield Entry("output_layer.weight", (name,), 0, vocab=dims.vocab)


def whole_entries(dims: ModelDims) -> list[Entry]:
    """Name map of a model that is one stage."""
    return list(entries(dims, 0, dims.num_layers, embedding=True, head=True))


def stage_entries(model: EarlyExitGPT) -> Iterator[Entry]:
    """`entries` for the stage of `model`."""
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


@dataclass(frozen=True)
class Piece:
    """A parameter of this rank and the whole policy tensors that it holds a share of. `copy`: another stage owns the
    tensors, as the first one does for the last one's copy of tied embeddings."""

    entry: Entry
    parameter: nn.Parameter
    copy: bool = False


def policy_pieces(model: EarlyExitGPT) -> list[Piece]:
    """Everything that the policy trains on this rank: the base (full fine-tuning) or adapters, and gates."""
    pieces: list[Piece] = []
    assert model.config.spec is not None and model.config.dims is not None
    if model.config.spec.full:
        parameters = stage_parameters(model)
        for entry in stage_entries(model):
            copy = entry.parameter == "output_layer.weight" and model.config.dims.tied
            pieces.append(Piece(entry, parameters[entry.parameter], copy))
    for name, parameter in _added(model):
        pieces.append(Piece(Entry(name, (name,), getattr(parameter, "partition_dim", -1)), parameter))
    return pieces


def _added(model: EarlyExitGPT) -> Iterator[tuple[str, nn.Parameter]]:
    """Adapters and gates by their layout-free names."""
    for layer in model.early_exit_layers():
        for prefix, module in (
            ("self_attn", layer.self_attention.linear_qkv),
            ("self_attn", layer.self_attention.linear_proj),
            ("mlp", layer.mlp.linear_fc1),
            ("mlp", layer.mlp.linear_fc2),
        ):
            for part, pair in module.adapters.items():
                name = f"model.layers.{layer.layer_number - 1}.{prefix}.{part}"
                yield f"{name}.lora_A.weight", pair.lora_A
                yield f"{name}.lora_B.weight", pair.lora_B
        if layer.gate is not None:
            for name, parameter in layer.gate.named_parameters():
                yield f"gates.{layer.depth}.{name}", parameter


@torch.no_grad()
def check_copies(pieces: Iterable[Piece]) -> None:
    """Compare bit for bit the parameters that every tensor-parallel rank holds whole: gates, norms, replicated adapter
    factors.

    They start alike and take the same updates; a rank that rounds otherwise would sample under gates that the others
    don't have. Raises RuntimeError, on every rank of the group, naming the first tensor that differs.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    held = [piece for piece in pieces if not piece.entry.split and piece.parameter.numel()]
    if dist.get_world_size(group) == 1 or not held:
        return
    sums = torch.stack([_checksum(piece.parameter) for piece in held])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    differ = [piece for piece, same in zip(held, (lowest == highest).tolist(), strict=True) if not same]
    if differ:
        raise RuntimeError(
            f"{len(differ)} tensors, {differ[0].entry.names[0]} the first, are no longer the same on all "
            f"{dist.get_world_size(group)} tensor-parallel ranks; resume from the last checkpoint, and if it comes "
            "again look for a rank with other hardware or libraries"
        )


def _checksum(parameter: Tensor) -> Tensor:
    """An int64 of the tensor's bits; a change of one element always changes it."""
    bits = parameter.detach().contiguous().view(torch.int32 if parameter.element_size() == 4 else torch.int16).flatten()
    # Odd factors keep a change in one place from vanishing modulo 2^64, and distinguish places.
    return (bits.long() * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()

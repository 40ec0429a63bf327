"""Exits that save: of the layers below an exit, positions that have left there run keys and values alone. How many run
is known only when a gate has been asked, so there is no graph of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.v1.attention.backend import CommonAttentionMetadata

if TYPE_CHECKING:
    from .model import GatedLayers


class KeysValues:
    """One layer's keys and values of streams that have left, from its norm's gain to vLLM's cache. `weight` [3 parts,
    D]: of queries, keys and values, unpacked."""

    def __init__(self, layer: Any, weight: Tensor):
        attention = self.attention = layer.self_attn
        self.gain, self.normalise_keys = layer.input_layernorm.weight, getattr(attention, "k_norm", None)
        bias = attention.qkv_proj.bias
        self.product = SimpleNamespace(
            weight=weight[attention.q_size :].detach(), bias=None if bias is None else bias[attention.q_size :].detach()
        )
        self.on_cpu = weight.device.type == "cpu"
        if self.on_cpu:
            # A copy: out of what vLLM has packed no rows can be taken.
            dispatch_cpu_unquantized_gemm(self.product, remove_weight=True)

    def write(self, units: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Normalised streams [R, D], positions and places in the cache int64 [R]."""
        attention, product = self.attention, self.product
        linear = product.cpu_linear if self.on_cpu else F.linear
        both = linear(units * self.gain, product.weight, product.bias)
        keys, values = (part.view(len(both), -1, attention.head_dim) for part in both.chunk(2, dim=-1))
        if self.normalise_keys is not None:
            keys = self.normalise_keys(keys)
        keys, _ = attention.rotary_emb(positions, keys.flatten(1), None)
        layer = attention.attn
        layer.impl.do_kv_cache_update(layer, keys.view_as(values), values, layer.kv_cache, slots)


class CompactLayers:
    """`GatedLayers` once more, with the same arguments and results."""

    def __init__(self, layers: GatedLayers):
        self.layers = layers
        # -> the builder of what vLLM's attention must know of a step; there when vLLM has its cache.
        self.builder: Callable[[], Any]
        self._kept: list[KeysValues] = []

    def take(self, matrix: Callable[[int], Tensor]) -> None:
        """New weights; `matrix`: a layer's number -> that of its queries, keys and values."""
        self._kept = [KeysValues(layer, matrix(i)) for i, layer in enumerate(self.layers.body.layers)]

    def __call__(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None, bounds: Tensor, fine: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        context = get_forward_context()
        whole = context.attn_metadata, context.slot_mapping
        try:
            return self._run(context, input_ids, positions, inputs_embeds, bounds, fine)
        finally:
            context.attn_metadata, context.slot_mapping = whole

    def _run(
        self, context: Any, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None, bounds: Tensor,
        fine: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        layers, body = self.layers, self.layers.body
        watched = list(layers.watched)
        hidden = body.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual, running = None, torch.arange(len(fine), device=fine.device)
        depths = torch.full_like(fine, len(body.layers), dtype=torch.int32)
        logprobs = torch.zeros_like(fine, dtype=torch.float32)
        step, here = Step(context, positions), positions
        # Streams that stay as they are differ between layers' norms by the gain alone.
        left, units, places, slots = running[:0], hidden[:0], positions[:0], positions[:0]
        for number, (layer, kept) in enumerate(zip(body.layers, self._kept, strict=True), start=1):
            if len(left):
                # First: a running position may look at one of its own step that has left.
                kept.write(units, places, slots)
            if not len(running):
                continue
            hidden, residual = layer(here, hidden, residual)
            if number not in layers.exit_depths:
                continue
            index, stream = layers.exit_depths.index(number), hidden + residual
            logit, fires = layers.ask(index, stream, bounds, fine)
            for one in watched:
                one.ask(index, number, stream, logit, fires)
            fires = _agreed(fires)
            logprobs[running] += F.logsigmoid(torch.where(fires, logit, -logit))
            leave, stay = fires.nonzero().squeeze(-1), (~fires).nonzero().squeeze(-1)
            if not len(leave):
                continue
            depths[running[leave]] = number
            left, units = torch.cat((left, running[leave])), torch.cat((units, self._unit(stream[leave])))
            places, slots = positions[left], step.slots[left]
            watched = [one for one in (one.among(~fires) for one in watched) if len(one.places)]
            running, here, bounds, fine = running[stay], here[stay], bounds[stay], fine[stay]
            hidden, residual = hidden[stay], residual[stay]
            if len(running):
                step.narrow(self.builder(), running)
        if not len(left):
            return body.norm(hidden, residual)[0], depths, logprobs
        out = hidden.new_empty(len(depths), hidden.shape[-1])
        out[left] = units * body.norm.weight
        if len(running):
            out[running] = body.norm(hidden, residual)[0]
        return out, depths, logprobs

    def _unit(self, streams: Tensor) -> Tensor:
        """Streams [R, D] as RMSNorm has them before its gain."""
        wide = streams.float()
        mean = wide.pow(2).mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean + self.layers.body.norm.variance_epsilon)).to(streams.dtype)


class Step:
    """What vLLM's attention knows of a step: positions int64 [T], which request each is of, its place in the cache
    int64 [T]."""

    def __init__(self, context: Any, positions: Tensor):
        self.context, self.positions = context, positions
        self.names = list(context.attn_metadata)
        # One for all layers: of these models all attend alike.
        self.whole, self.slots = context.attn_metadata[self.names[0]], context.slot_mapping[self.names[0]]
        assert all(one is self.whole for one in context.attn_metadata.values())
        lengths = self.whole.query_start_loc.diff()
        self.request = torch.repeat_interleave(lengths)
        assert len(self.request) == len(positions), "eager steps have no padding"

    def narrow(self, builder: Any, running: Tensor) -> None:
        """From now on attention is for these places alone, int64 [R], R > 0: stretches of neighbours of one request are
        to it what a request is, up to where they end."""
        request = self.request[running]
        first = torch.ones_like(running, dtype=torch.bool)
        first[1:] = (running.diff() != 1) | (request.diff() != 0)
        begins = first.nonzero().squeeze(-1)
        starts = torch.cat((begins, begins.new_tensor([len(running)]))).int()
        ends = self.positions[running[starts[1:] - 1]] + 1
        slots = self.slots[running]
        narrowed = builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts, query_start_loc_cpu=starts.cpu(), seq_lens=ends.int(), num_reqs=len(begins),
                num_actual_tokens=len(running), max_query_len=int(starts.diff().max()), max_seq_len=int(ends.max()),
                block_table_tensor=self.whole.block_table[request[begins]], slot_mapping=slots,
            ),
        )  # fmt: skip
        self.context.attn_metadata = dict.fromkeys(self.names, narrowed)
        self.context.slot_mapping = dict.fromkeys(self.names, slots)


def _agreed(fires: Tensor) -> Tensor:
    """What the first of the devices that share the model decides: their sums have to have one shape."""
    group = get_tp_group()
    return fires if group.world_size == 1 else group.broadcast(fires.to(torch.uint8)).bool()

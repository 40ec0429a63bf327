"""vLLM's Llama-like models with exits: positions that have left keep their stream, and deeper layers get keys and
values from it.

Masked: all positions run all layers, so shapes don't depend on what exits decide, and the model is compiled. Compact:
below an exit, positions that have left run keys and values alone. How many run is known only when a gate has been
asked, so there is no graph of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.attention.backend import CommonAttentionMetadata

from ...exit_rules import NEVER, AtExit, ExitRule, Tokens
from ...exits import gate_units
from ...products import product
from . import COMPACT


class Gate(nn.Module):
    """As everywhere: z = W2 relu(W1 x + b1) + b2 on the residual stream, float32 [...]; the first product is rounded
    as the model's are."""

    def __init__(self, hidden: int, width: int, normalise: bool, eps: float, dtype: torch.dtype):
        super().__init__()
        self.normalise, self.eps, self.dtype = normalise, eps, dtype
        self.fc1, self.fc2 = nn.Linear(hidden, width, dtype=dtype), nn.Linear(width, 1, dtype=torch.float32)
        self.fc1.bias.data = self.fc1.bias.data.float()
        self.on_cpu = self.fc1.weight.device.type == "cpu"
        if self.on_cpu:
            # There float32 alone gives float32: it holds what `dtype` holds, and is wide.
            self.fc1.weight.data = self.fc1.weight.data.float()
        self._pack()

    def load(self, name: str, tensor: Tensor) -> None:
        self.get_parameter(name).copy_(tensor.to(self.dtype) if name == "fc1.weight" else tensor)
        self._pack()

    def _pack(self) -> None:
        if self.on_cpu:
            dispatch_cpu_unquantized_gemm(self.fc1, remove_weight=False)

    def forward(self, stream: Tensor) -> Tensor:
        x, fc1 = stream.float(), self.fc1
        if self.normalise:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        packed: Any = getattr(fc1, "cpu_linear", None)
        x = x.to(self.dtype)
        x = packed(x.float(), fc1.weight, fc1.bias) if self.on_cpu else product(x, fc1.weight.t()) + fc1.bias
        return self.fc2(F.relu(x)).squeeze(-1)


@dataclass
class Watched:
    """Tokens of a step whose rule has to see readouts: their places int64 [R], names and random numbers [R, M+1].
    `readout`: streams [R, D] -> logits float32 [R, V]."""

    rule: ExitRule
    places: Tensor
    tokens: Tokens
    uniform: Tensor
    notes: Tensor
    readout: Callable[[Tensor], Tensor]

    def ask(self, index: int, depth: int, streams: Tensor, logits: Tensor, fires: Tensor) -> None:
        """Asks as the embedded engine's scheduler does. Streams [T, D], logits [T]; writes into `fires` bool [T]."""
        rows = streams[self.places]
        answer = self.rule.should_exit(
            AtExit(
                index, depth, logits[self.places], readout=lambda: self.readout(rows),
                uniform=lambda i: self.uniform[:, i], tokens=lambda: self.tokens, state=self.notes,
            )
        )  # fmt: skip
        fires[self.places] = answer.to(fires.device)

    def among(self, stays: Tensor) -> Watched:
        """Those of them that stay, bool [T], with their places among all that stay."""
        kept = stays[self.places]
        return replace(
            self, places=(stays.cumsum(0) - 1)[self.places[kept]], uniform=self.uniform[kept], notes=self.notes[kept],
            tokens=[token for token, here in zip(self.tokens, kept.tolist(), strict=True) if here],
        )  # fmt: skip


@support_torch_compile(dynamic_arg_dims=dict.fromkeys(("input_ids", "positions", "inputs_embeds", "bounds", "fine"), 0))
class GatedLayers(nn.Module):
    """A model of vLLM's without its readout, with gates between its layers. Every token of a step is asked at every
    exit and runs all layers, so that a step's shapes are those of vLLM's own model, and the graph is one."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", body: Any):
        super().__init__()
        config, dtype = vllm_config.model_config.hf_config, vllm_config.model_config.dtype
        self.body, self.exit_depths = body, tuple(config.exit_depths)
        width = gate_units(config.gate_width, config.hidden_size)
        normalise = config.gate_input == "normalised"
        gates = {
            str(depth): Gate(config.hidden_size, width, normalise, config.rms_norm_eps, dtype)
            for depth in self.exit_depths
        }
        self.gates = nn.ModuleDict(gates).requires_grad_(False)
        # Of the step; with any the graph is left aside.
        self.watched: Sequence[Watched] = ()

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None, bounds: Tensor, fine: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds float64 [T, M], fine bool [T]: as of `ExitRule.hazard_bounds` -> the last layer's stream, normalised
        [T, D]; the exits taken, int32 [T], and their log-probabilities, float32 [T]."""
        hidden = self.body.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual, last = None, len(self.body.layers)
        depths = torch.full_like(fine, last, dtype=torch.int32)
        logprobs = torch.zeros_like(fine, dtype=torch.float32)
        # Which positions have left, and the streams at the last exit, which theirs must stay.
        left, ice = torch.zeros_like(fine), None
        for number, layer in enumerate(self.body.layers, start=1):
            hidden, residual = layer(positions, hidden, residual)
            if ice is not None:
                hidden, residual = hidden.masked_fill(left[:, None], 0), torch.where(left[:, None], ice, residual)
            if number not in self.exit_depths:
                continue
            index, ice = self.exit_depths.index(number), hidden + residual
            logit, fires = self.ask(index, ice, bounds, fine)
            for watched in self.watched:
                watched.ask(index, number, ice, logit, fires)
            fires &= ~left
            logprobs += torch.where(left, 0.0, F.logsigmoid(torch.where(fires, logit, -logit)))
            depths = torch.where(fires, number, depths)
            left = left | fires
            hidden, residual = hidden.masked_fill(left[:, None], 0), torch.where(left[:, None], ice, residual)
        return self.body.norm(hidden, residual)[0], depths, logprobs

    def ask(self, index: int, streams: Tensor, bounds: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Streams [T, D] -> this exit's logits, float32 [T], and whether they are above the bounds, bool [T]."""
        logit = self.gates[str(self.exit_depths[index])](streams)
        # Some rules compare hazards in float64, the others in float32.
        hazard = torch.where(fine, logit.double().sigmoid(), logit.sigmoid().double())
        return logit, hazard > bounds[:, index]


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
        step, here = AttentionStep(context, positions), positions
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


class AttentionStep:
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


class EarlyExit:
    """Mixed in before a causal language model of vLLM's.

    What a step's tokens must know is written into buffers before it runs, and what they did is read from others:
    a graph finds them where they were when it was captured.
    """

    model: Any
    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.exit_depths = tuple(config.exit_depths)
        with set_model_tag("early_exit"):
            self.gated_layers = GatedLayers(vllm_config=vllm_config, body=self.model)
        tokens, exits = vllm_config.scheduler_config.max_num_batched_tokens, len(self.exit_depths)
        self.bounds = torch.full((tokens, exits), NEVER, dtype=torch.float64)
        self.fine = torch.zeros(tokens, dtype=torch.bool)
        self.depths, self.logprobs = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.float32)
        self.compact = CompactLayers(self.gated_layers) if getattr(config, COMPACT, False) else None
        # Without gates depths may be prescribed, and their probabilities are nothing.
        self.gated = False
        # vLLM packs matrices for a CPU and drops what it packed; new weights are written into these.
        self._plain: dict[str, nn.Parameter] = {}

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        tokens = len(positions)
        # Without a cache, when vLLM looks how much memory a step takes, nothing exits.
        layers: GatedLayers | CompactLayers = self.gated_layers
        if self.compact is not None and get_forward_context().attn_metadata is not None:
            layers = self.compact
        hidden, depths, logprobs = layers(
            input_ids=input_ids, positions=positions, inputs_embeds=inputs_embeds, bounds=self.bounds[:tokens],
            fine=self.fine[:tokens],
        )  # fmt: skip
        self.depths[:tokens].copy_(depths)
        self.logprobs[:tokens].copy_(logprobs)
        return hidden

    def readout(self, streams: Tensor) -> Tensor:
        """Streams [R, D] -> logits float32 [R, V], as if the model ended there."""
        return self.compute_logits(self.model.norm(streams)).float()  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hugging Face names; gates may be missing (a base model), and are shut then."""

        gates = self.gated_layers.gates

        def named() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith("gates."):
                    _, depth, parameter = name.split(".", 2)
                    gates.get_submodule(depth).load(parameter, tensor)  # type: ignore[operator]
                    self.gated = True
                else:
                    yield name, tensor

        matrices = [(n, m) for n, m in self.named_modules() if isinstance(m, LinearBase | VocabParallelEmbedding)]  # type: ignore[attr-defined]
        for name, module in matrices:
            # On a GPU it is the parameter that is there anyway.
            module.weight = self._plain.setdefault(name, module.weight)
        loaded: set[str] = super().load_weights(named())  # type: ignore[misc]
        if self.compact is not None:
            self.compact.take(lambda i: self._plain[f"model.layers.{i}.self_attn.qkv_proj"])
        return loaded | {f"gated_layers.gates.{name}" for name, _ in gates.named_parameters()}

    def replace_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`load_weights` when the model has run already. Without gates in `weights` there are none afterwards."""
        self.gated = False
        self.load_weights(weights)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, LinearBase | VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)


class EarlyExitLlamaForCausalLM(EarlyExit, LlamaForCausalLM):
    pass


class EarlyExitQwen2ForCausalLM(EarlyExit, Qwen2ForCausalLM):
    pass


class EarlyExitQwen3ForCausalLM(EarlyExit, Qwen3ForCausalLM):
    pass

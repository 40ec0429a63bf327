"""vLLM's Llama-like models with exits: positions that have left keep their stream, and deeper layers get keys and
values from it.

Every position runs all layers, so shapes don't depend on what exits decide, and the model is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ...exit_rules import NEVER, AtExit, ExitRule, Tokens
from ...exits import gate_units
from ...mixed_matmul import product
from .request_metadata import exit_layout


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


@support_torch_compile(dynamic_arg_dims=dict.fromkeys(("input_ids", "positions", "inputs_embeds", "bounds", "fine"), 0))
class GatedLayers(nn.Module):
    """A model of vLLM's without its readout, with gates between its layers. Every gate scores every token of a step,
    and every token runs all layers: a step's shapes are those of vLLM's own model, and one graph serves all steps."""

    leads: Tensor

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
        # A buffer, so that devices that share the model have the same graph.
        self.group = get_tp_group()
        self.register_buffer("leads", torch.tensor(float(self.group.rank_in_group == 0)), persistent=False)

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
            fires = self.agree(fires) & ~left
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

    def agree(self, fires: Tensor) -> Tensor:
        """What the first of the devices that share the model decided, bool [T]: sums over devices need not have equal
        bits on each, and a hazard just at its bound would exit on some of them. A sum of one number and zeros is exact
        however it is made."""
        if self.group.world_size == 1:
            return fires
        return self.group.all_reduce(fires * self.leads) > 0


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
        self.exit_depths, self.first_token = tuple(config.exit_depths), exit_layout(vllm_config).first_token
        with set_model_tag("early_exit"):
            self.gated_layers = GatedLayers(vllm_config=vllm_config, body=self.model)
        tokens, exits = vllm_config.scheduler_config.max_num_batched_tokens, len(self.exit_depths)
        self.bounds = torch.full((tokens, exits), NEVER, dtype=torch.float64)
        self.fine = torch.zeros(tokens, dtype=torch.bool)
        self.depths, self.logprobs = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.float32)
        # Without gates depths may be prescribed, and their probabilities are nothing.
        self.gated = False
        # vLLM packs matrices for a CPU and drops what it packed; new weights are written into these.
        self._plain: dict[str, nn.Parameter] = {}

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        tokens = len(positions)
        hidden, depths, logprobs = self.gated_layers(
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

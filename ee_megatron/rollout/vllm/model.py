"""vLLM's Llama-like models with exits: positions that have left keep their stream, and deeper layers get keys and
values from it. All positions run all layers, so shapes don't depend on what exits decide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ...exit_rules import AtExit
from ...exits import gate_log_term, gate_units
from ...products import linear
from .steps import Step, Watched

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Gate(nn.Module):
    """As everywhere: z = W2 relu(W1 x + b1) + b2 on the residual stream, float32 [...]; the first product is rounded
    as the model's are."""

    def __init__(self, hidden: int, width: int, normalise: bool, eps: float):
        super().__init__()
        self.normalise, self.eps = normalise, eps
        self.fc1, self.fc2 = nn.Linear(hidden, width, dtype=torch.float32), nn.Linear(width, 1, dtype=torch.float32)

    def forward(self, stream: Tensor) -> Tensor:
        x = stream.float()
        if self.normalise:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.fc2(F.relu(linear(x, self.fc1.weight, self.fc1.bias, stream.dtype))).squeeze(-1)


class EarlyExit:
    """Mixed in before a causal language model of vLLM's."""

    model: Any
    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.exit_depths = tuple(config.exit_depths)
        width = gate_units(config.gate_width, config.hidden_size)
        gates = {
            str(depth): Gate(config.hidden_size, width, config.gate_input == "normalised", config.rms_norm_eps)
            for depth in self.exit_depths
        }
        self.exit_gates = nn.ModuleDict(gates).requires_grad_(False)
        # Set while a step runs; without one the model is the plain one.
        self.step: Step | None = None
        self.gated = False
        # vLLM packs matrices for a CPU and drops what it packed; new weights are written into these.
        self._plain: dict[str, nn.Parameter] = {}

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        step = self.step
        hidden = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        # Of positions that have left, and zeros elsewhere: the streams, and where they are.
        ice, left = torch.zeros_like(hidden), None
        residual = None
        if step is not None:
            last = len(self.model.layers)
            step.depths = torch.full_like(step.free, last)
            step.logprobs = torch.zeros(len(step.free), device=step.free.device)
        for number, layer in enumerate(self.model.layers, start=1):
            hidden, residual = layer(positions, hidden, residual)
            if left is not None:
                hidden, residual = hidden.masked_fill(left, 0), torch.where(left, ice, residual)
            if step is None or not len(step.free) or number not in self.exit_depths:
                continue
            fired = self._ask(step, number, hidden, residual)
            frozen = torch.zeros(len(hidden), 1, dtype=torch.bool, device=hidden.device)
            frozen[step.free] = fired.unsqueeze(1)
            ice = torch.where(frozen, hidden + residual, ice)
            left = frozen if left is None else left | frozen
            hidden, residual = hidden.masked_fill(left, 0), torch.where(left, ice, residual)
        return self.model.norm(hidden, residual)[0]

    def _ask(self, step: Step, depth: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """bool [F]: which positions leave here that have not left before."""
        assert step.depths is not None and step.logprobs is not None
        index, stream = self.exit_depths.index(depth), hidden[step.free] + residual[step.free]
        logit = self.exit_gates[str(depth)](stream) if self.gated else stream.new_zeros(len(stream)).float()
        # Some rules compare hazards in float64, the others in float32.
        hazard = torch.where(step.fine, logit.double().sigmoid(), logit.sigmoid().double())
        fires = hazard > step.bounds[:, index]
        for watched in step.watched:
            self._watch(step, watched, index, depth, stream, logit, fires)
        still = step.depths == len(self.model.layers)
        fires &= still
        if self.gated:
            taken = torch.where(fires, depth, depth + 1)
            step.logprobs += torch.where(still, gate_log_term(logit, taken, depth), 0.0)
        step.depths = torch.where(fires, depth, step.depths)
        return fires

    def _watch(
        self, step: Step, watched: Watched, index: int, depth: int, stream: Tensor, logit: Tensor, fires: Tensor
    ) -> None:
        """Rules that see readouts, asked as the scheduler of the embedded engine asks them."""
        at = torch.searchsorted(step.free, watched.places)
        rows = stream[at]
        answer = watched.rule.fires(
            AtExit(
                index, depth, logit[at],
                readout=lambda: self.compute_logits(self.model.norm(rows)).float(),  # type: ignore[attr-defined]
                uniform=lambda i: watched.uniform[:, i],
                tokens=lambda: watched.tokens,
                notes=watched.notes,
            )
        )  # fmt: skip
        fires[at] = answer.to(fires.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Hugging Face names; gates may be missing (a base model), and are shut then."""

        def named() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith("gates."):
                    self.exit_gates.get_parameter(name.removeprefix("gates.")).copy_(tensor)
                    loaded.add(f"exit_gates.{name.removeprefix('gates.')}")
                else:
                    yield name, tensor

        matrices = [(n, m) for n, m in self.named_modules() if isinstance(m, LinearBase | VocabParallelEmbedding)]  # type: ignore[attr-defined]
        for name, module in matrices:
            # On a GPU it is the parameter that is there anyway.
            module.weight = self._plain.setdefault(name, module.weight)
        loaded: set[str] = set()
        loaded |= super().load_weights(named())  # type: ignore[misc]
        self.gated = self.gated or bool([name for name in loaded if name.startswith("exit_gates.")])
        return loaded | {f"exit_gates.{name}" for name, _ in self.exit_gates.named_parameters()}

    def part(self, name: str) -> Tensor:
        """The tensor of a Hugging Face name, out of the fused one that holds it; on a single device."""
        owner, _, kind = name.rpartition(".")
        for fused, parts in FUSED.items():
            stem, _, last = owner.rpartition(".")
            if last in parts:
                module = self.get_submodule(f"{stem}.{fused}")  # type: ignore[attr-defined]
                whole = self._plain[f"{stem}.{fused}"] if kind == "weight" else module.get_parameter(kind)
                return whole.split(list(module.output_sizes))[parts.index(last)]
        if owner in self._plain and kind == "weight":
            # Of a vocabulary's rows those that were added to fill a device's share are left out.
            return self._plain[owner][: getattr(self.get_submodule(owner), "org_vocab_size", None)]  # type: ignore[attr-defined]
        return self.get_parameter(name)  # type: ignore[attr-defined]

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

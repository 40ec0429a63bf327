"""The method by the book, on transformers' own layers: an independent reference for every body of the model.

Nothing is skipped and nothing is cached: every layer runs on every position, and a frozen position simply keeps its
stream. Adapters enter as W + scale * B A through `functional_call`, so autograd gives reference gradients too.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from ee_megatron.policy import PolicySpec


class Reference:
    """`exact`: in float64 throughout, but for the rotary table, so that what differs from it is the other's error."""

    def __init__(
        self,
        path,
        spec: PolicySpec | None = None,
        policy: dict[str, Tensor] | None = None,
        attention: str = "eager",
        exact: bool = False,
    ):
        # Eager attention's softmax and the norms are in float32 whatever the model is in.
        attention, dtype = ("sdpa", torch.float64) if exact else (attention, torch.float32)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
        if exact:
            for module in self.model.modules():
                if type(module).__name__.endswith("RMSNorm"):
                    module.forward = partial(_norm, module)
            policy = {name: value.double() for name, value in (policy or {}).items()}
        self.model.eval()
        self.model.requires_grad_(False)
        self.spec, self.policy = spec, policy or {}

    def stream(self, tokens: Tensor, depths: Tensor) -> list[Tensor]:
        """Residual stream [B, S, D] before the first layer and after each one, with positions frozen at `depths`."""
        inner = self.model.model
        hidden = inner.embed_tokens(tokens)
        positions = torch.arange(tokens.size(1)).unsqueeze(0)
        rotary = inner.rotary_emb(hidden, positions)
        causal = torch.full((tokens.size(1),) * 2, torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[
            None, None
        ]
        streams = [hidden]
        for index, layer in enumerate(inner.layers):
            out = functional_call(
                layer,
                self._layer_weights(index, layer),
                (hidden,),
                {"attention_mask": causal, "position_ids": positions, "position_embeddings": rotary},
            )
            out = out[0] if isinstance(out, tuple) else out
            hidden = torch.where((depths > index).unsqueeze(-1), out, hidden)
            streams.append(hidden)
        return streams

    def _layer_weights(self, index: int, layer) -> dict[str, Tensor]:
        weights = dict(layer.named_parameters())
        for name in list(weights):
            a = self.policy.get(f"model.layers.{index}.{name.removesuffix('.weight')}.lora_A.weight")
            if a is not None:
                b = self.policy[f"model.layers.{index}.{name.removesuffix('.weight')}.lora_B.weight"]
                weights[name] = weights[name] + self.spec.scale * (b @ a)
        return weights

    def logits(self, tokens: Tensor, depths: Tensor) -> Tensor:
        return self.read_out(self.stream(tokens, depths))

    def read_out(self, streams: list[Tensor]) -> Tensor:
        return self.model.lm_head(self.model.model.norm(streams[-1]))

    def gate_logits(self, tokens: Tensor, depths: Tensor) -> Tensor:
        """[B, S, M]"""
        return self.ask(self.stream(tokens, depths))

    def ask(self, streams: list[Tensor]) -> Tensor:
        """Gate logits [B, S, M] on the streams that `stream` gave."""
        found = []
        for depth in self.spec.exit_depths:
            x = streams[depth]
            if self.spec.gate_input == "normalised":
                x = x / (x.pow(2).mean(-1, keepdim=True) + self.model.config.rms_norm_eps).sqrt()
            p = {k: self.policy[f"gates.{depth}.{k}"] for k in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
            x = F.relu(x @ p["fc1.weight"].T + p["fc1.bias"])
            found.append((x @ p["fc2.weight"].T + p["fc2.bias"]).squeeze(-1))
        return torch.stack(found, dim=-1)

    def log_q(self, gate_logits: Tensor, depths: Tensor) -> Tensor:
        """log q(prescribed exit) [B, S], by plain probabilities in double precision; 0 at padding (depth 0)."""
        hazards = torch.sigmoid(gate_logits.double())
        alive, chosen = torch.ones_like(hazards[..., 0]), torch.ones_like(hazards[..., 0])
        for i, depth in enumerate(self.spec.exit_depths):
            chosen = torch.where(depths == depth, alive * hazards[..., i], chosen)
            alive = alive * (1 - hazards[..., i])
        return torch.where(depths >= self.model.config.num_hidden_layers, alive, chosen).log().float()


def _norm(module, hidden: Tensor) -> Tensor:
    return module.weight * hidden / (hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def random_policy(dims, spec: PolicySpec, seed: int = 0, size: float = 0.15) -> dict[str, Tensor]:
    """Adapters and gates that matter: nothing is zero, and hazards lie around a half."""
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in spec.tensor_shapes(dims).items()}

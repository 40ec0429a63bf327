"""Llama, Qwen2 or Qwen3 whose generated tokens may stop after a few layers. Needs only torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    out = model.generate(**inputs)                                              # the exit policy of config.json
    out = model.generate(**inputs, exit_policy={"kind": "threshold", "value": 0.9})
    model.last_exit_depths                                                      # layers run for every generated token

What an exit at depth e does: the residual stream of the position stays what it was after e layers; every deeper layer
still computes that position's key and value from it, with its own norm and projections, so that later tokens that go
deeper find them in the cache; the next token is read from the final norm and the head as always. Prompt positions never
exit, so the first generated token comes from all layers; with `first_token` in config.json the last of them may.
"""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_early_exit import EarlyExitConfig, check_exit_policy

# The cache is called `cache` in newer transformers and `past_key_values` in older ones.
CACHE_FIELD = next(
    field.name for field in dataclass_fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)


# PyTorch 2.8 and later multiply bfloat16 matrices into float32 on a GPU.
WIDE_PRODUCT = "dtype" in torch.ops.aten.mm.overloads()
# Rows of a matrix that are copied in float32 at a time where there is no such product: few enough to stay in the cache.
ROWS = 4096


class WideLinear(nn.Linear):
    """A linear map whose result is float32: the weight is rounded to the input's dtype, the sums are not."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> float32 [..., out]."""
        bias = None if self.bias is None else self.bias.float()
        if x.dtype == torch.float32:
            return F.linear(x, self.weight.float(), bias)
        weight = self.weight.to(x.dtype)
        if WIDE_PRODUCT and x.is_cuda and not torch.is_grad_enabled():
            rows = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)
            made = rows.view(*x.shape[:-1], weight.shape[0])
        else:
            made = torch.cat([F.linear(x.float(), part.float()) for part in weight.split(ROWS)], dim=-1)
        return made if bias is None else made + bias


class Gate(nn.Module):
    """A two-layer perceptron on the residual stream: its output is the logit of exiting here."""

    def __init__(self, hidden: int, width: float, normalised: bool, eps: float):
        super().__init__()
        self.fc1 = WideLinear(hidden, round(width * hidden))
        self.fc2 = nn.Linear(round(width * hidden), 1)
        self.normalised, self.eps = normalised, eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Residual stream [..., D] -> logit, float32 [...]."""
        x = x_BTD.float()
        if self.normalised:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        inner = F.relu(self.fc1(x.to(x_BTD.dtype)))
        return self.fc2(inner.to(self.fc2.weight.dtype)).float().squeeze(-1)


def rotate(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split form; cos and sin [B, 1, T, d]."""
    first, second = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos + torch.cat((-second, first), dim=-1) * sin


def attention_mask_4d(mask_BS: Tensor | None, rows: int, new: int, past: int, device: torch.device) -> Tensor | None:
    """Which keys a query sees, bool [B or 1, 1, new, past + new]; None where one new position sees them all.

    `mask_BS` is 1 for tokens and 0 for padding over all past + new positions. Every position sees itself, so that
    padding has something to look at and no row of the softmax is empty.
    """
    if mask_BS is not None and mask_BS.dim() != 2:
        raise ValueError(f"attention_mask has {mask_BS.dim()} dimensions, expected 2; static caches are not supported")
    if mask_BS is not None and mask_BS.shape != (rows, past + new):
        raise ValueError(f"attention_mask has shape {tuple(mask_BS.shape)}, expected {(rows, past + new)}")
    if mask_BS is not None and bool(mask_BS.all()):
        mask_BS = None
    if mask_BS is None and new == 1:
        return None
    query = torch.arange(past, past + new, device=device)[:, None]
    key = torch.arange(past + new, device=device)[None, :]
    visible = (key <= query)[None, None]
    if mask_BS is None:
        return visible
    return (visible & mask_BS.bool()[:, None, None, :]) | (key == query)[None, None]


def heads(x_BTE: Tensor, projection: nn.Module, attention: Any, norm: str | None = None) -> Tensor:
    """[B, T, D] -> [B, heads, T, d], with the per-head norm that Qwen3 puts on queries and keys."""
    x = projection(x_BTE).unflatten(-1, (-1, attention.head_dim))
    if norm is not None and hasattr(attention, norm):
        x = getattr(attention, norm)(x)
    return x.transpose(1, 2)


class EarlyExitForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = EarlyExitConfig
    config: EarlyExitConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # Gates were trained in float32; what of them is rounded is rounded as in training (WideLinear).
    _keep_in_fp32_modules_strict = {"gates"}  # noqa: RUF012

    def __init__(self, config: EarlyExitConfig):
        super().__init__(config)
        base = config.base_config()
        # The base class by its configuration; its modules are used, its forward is not.
        self.model: Any = MODEL_MAPPING[type(base)](base)  # type: ignore[operator]
        self.vocab_size = config.vocab_size
        self.lm_head = WideLinear(config.hidden_size, config.vocab_size, bias=False)
        normalised = config.gate_input == "normalised"
        self.gates = nn.ModuleDict(
            {
                str(depth): Gate(config.hidden_size, config.gate_width, normalised, config.rms_norm_eps)
                for depth in config.exit_depths
            }
        )
        self.last_exit_depths: Tensor | None = None
        self._call_policy: dict | None = None
        self._recorded: list[Tensor] | None = None
        self.post_init()

    def exit_policy(self) -> dict:
        """The policy in force: of the running `generate` call, else of generation_config, else of config."""
        own = getattr(self.generation_config, "exit_policy", None)
        return self._call_policy or own or self.config.exit_policy

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, exit_policy: dict | None = None, **kwargs):
        """As in transformers, with `exit_policy` (see the configuration) for this call.

        Afterwards `last_exit_depths`, int64 [rows, generated tokens], says how many layers ran for each token, -1 after
        a row's end; None under beam search, where rows change places. Raises ValueError for `prefill_chunk_size` where
        the first token may exit.
        """
        given = kwargs.get("generation_config")
        pieces = kwargs.get("prefill_chunk_size") or getattr(
            given or self.generation_config, "prefill_chunk_size", None
        )
        if self.config.first_token and pieces:
            raise ValueError(f"prefill_chunk_size={pieces}: which piece ends the prompt isn't known; leave it out")
        policy = exit_policy or getattr(given, "exit_policy", None) or self.exit_policy()
        check_exit_policy(policy, self.config.exit_depths, self.config.num_hidden_layers)
        beams = kwargs.get("num_beams") or getattr(given or self.generation_config, "num_beams", None) or 1
        self._call_policy, self._recorded, self.last_exit_depths = policy, [], None
        try:
            output = super().generate(inputs, *args, **kwargs)
            if beams == 1 and self._recorded:
                depths = torch.stack(self._recorded, dim=1)
                tokens = output if isinstance(output, Tensor) else output.sequences
                ends = kwargs.get("eos_token_id", getattr(given or self.generation_config, "eos_token_id", None))
                self.last_exit_depths = self._without_tail(depths, tokens[:, -depths.shape[1] :], ends)
            return output
        finally:
            self._call_policy, self._recorded = None, None

    @staticmethod
    def _without_tail(depths_BT: Tensor, tokens_BT: Tensor, ends: int | list[int] | None) -> Tensor:
        if ends is None:
            return depths_BT
        end = torch.isin(tokens_BT, torch.as_tensor(ends, device=tokens_BT.device).reshape(-1))
        after = (end.int().cumsum(dim=1) - end.int()) > 0
        return depths_BT.masked_fill(after.to(depths_BT.device), -1)

    def prepare_inputs_for_generation(self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        inputs["is_prompt"] = bool(is_first_iteration)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_depths: Tensor | None = None,
        is_prompt: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids int64 [B, T] -> logits float32 [B, T or fewer, V].

        exit_depths, int64 [B, T]: prescribed depths (values of config.exit_depths, or the number of layers); the gates
        are not asked. Without it, one new position on top of a cache exits by the exit policy, and of what `is_prompt`
        none or, with config.first_token, the last one; anything else runs through all layers.
        """
        cache = cache if cache is not None else past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        x_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, new = x_BTD.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x_BTD.device)[None]
        mask = attention_mask_4d(attention_mask, rows, new, past, x_BTD.device)
        rope = tuple(part.unsqueeze(1) for part in self.model.rotary_emb(x_BTD, position_ids))
        asked = exit_depths is None and (self.config.first_token if is_prompt else new == 1 and past > 0)
        policy = self.exit_policy() if asked else {"kind": "off"}
        depth_BT = self._start_depths(exit_depths, policy, rows, new, x_BTD.device)
        for depth, layer in enumerate(self.model.layers):
            if str(depth) in self.gates and policy["kind"] in ("threshold", "sample"):
                depth_BT = self._ask_gate(depth, x_BTD, depth_BT, policy)
            x_BTD = self._layer(layer, depth, x_BTD, depth_BT > depth, mask, rope, cache)
        if self._recorded is not None:
            # A prompt may come in several pieces; only its last position predicts a generated token.
            self._recorded = [*([] if is_prompt else self._recorded), depth_BT[:, -1]]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.model.norm(x_BTD[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        made: dict[str, Any] = {CACHE_FIELD: cache if use_cache else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **made)
        return output.to_tuple() if return_dict is False else output

    def _start_depths(self, given: Tensor | None, policy: dict, rows: int, new: int, device: torch.device) -> Tensor:
        """Depths before any gate was asked, int64 [B, T]. Raises ValueError for a prescribed depth that is no exit."""
        if given is None:
            depth_BT = torch.full((rows, new), self.config.num_hidden_layers, dtype=torch.long, device=device)
            if policy["kind"] == "fixed":
                depth_BT[:, -1] = policy["value"]
            return depth_BT
        outcomes = [*self.config.exit_depths, self.config.num_hidden_layers]
        given = torch.as_tensor(given, device=device).long()
        if given.shape != (rows, new):
            raise ValueError(f"exit_depths has shape {tuple(given.shape)}, expected {(rows, new)}")
        if not bool(torch.isin(given, torch.tensor(outcomes, device=device)).all()):
            raise ValueError(f"exit_depths holds values outside {outcomes}")
        return given

    def _ask_gate(self, depth: int, x_BTD: Tensor, depth_BT: Tensor, policy: dict) -> Tensor:
        """Only the last position may exit: what is before it is the prompt's."""
        last_B1 = depth_BT[:, -1:]
        undecided = last_B1 > depth
        if not bool(undecided.any()):
            return depth_BT
        hazard_B1 = torch.sigmoid(self.gates[str(depth)](x_BTD[:, -1:]))
        bar = torch.rand_like(hazard_B1) if policy["kind"] == "sample" else policy["value"]
        return torch.cat([depth_BT[:, :-1], torch.where(undecided & (hazard_B1 > bar), depth, last_B1)], dim=1)

    def _layer(
        self,
        layer: Any,
        index: int,
        x_BTD: Tensor,
        active_BT: Tensor,
        mask: Tensor | None,
        rope: tuple[Tensor, Tensor],
        cache: DynamicCache | None,
    ) -> Tensor:
        """One decoder layer: keys and values for every position, the rest for the rows that have an active position."""
        attention = layer.self_attn
        cos, sin = rope
        normed = layer.input_layernorm(x_BTD)
        k = rotate(heads(normed, attention.k_proj, attention, "k_norm"), cos, sin)
        v = heads(normed, attention.v_proj, attention)
        if cache is not None:
            k, v = cache.update(k, v, index)
        active_B = active_BT.any(dim=1)
        if not bool(active_B.any()):
            return x_BTD
        rows = None if bool(active_B.all()) else active_B.nonzero().squeeze(1)
        if rows is not None:
            normed, k, v = normed[rows], k[rows], v[rows]
            # A single row of positions or of the mask holds for all rows.
            cos, sin = (t[rows] if t.shape[0] > 1 else t for t in (cos, sin))
            mask = mask[rows] if mask is not None and mask.shape[0] > 1 else mask
        stream = x_BTD if rows is None else x_BTD[rows]
        q = rotate(heads(normed, attention.q_proj, attention, "q_norm"), cos, sin)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scaling, enable_gqa=True)
        stream = stream + attention.o_proj(context.transpose(1, 2).flatten(2))
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        if rows is not None:
            stream = x_BTD.index_copy(0, rows, stream)
        return torch.where(active_BT[..., None], stream, x_BTD)


__all__ = ["EarlyExitForCausalLM"]

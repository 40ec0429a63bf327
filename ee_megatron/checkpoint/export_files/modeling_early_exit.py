"""A decoder (BASE_MODEL_TYPES) whose generated tokens may stop after a few layers. Needs only torch and transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    out = model.generate(**inputs)                                              # the exit policy of config.json
    out = model.generate(**inputs, exit_policy="threshold:0.9")                 # or {"kind": "threshold", "value": 0.9}
    model.last_exit_depths                                                      # layers run for every generated token

What an exit at depth e does: the residual stream of the position stays what it was after e layers; every deeper layer
still computes that position's key and value from it, with its own norm and projections, so that later tokens that go
deeper find them in the cache; the next token is read from the final norm and the head as always. Prompt positions never
exit, so the first generated token comes from all layers; with `first_token` in config.json the last of them may.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import fields as dataclass_fields
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_early_exit import EarlyExitConfig, check_exit_policy, read_exit_policy
from .layers_early_exit import Gate, Pass, WideLinear, attention_mask_4d, check_cache, with_exits
from .speculation_early_exit import can_speculate, speculate

# The cache is called `cache` in newer transformers and `past_key_values` in older ones.
CACHE_FIELD = next(
    field.name for field in dataclass_fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
# Arguments of `forward` beside its own: what the loss takes, and what says nothing that isn't known otherwise.
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
NEEDLESS_ARGUMENTS = ("cache_position", "token_type_ids")
# What `generate` needs for itself and, in newer transformers, leaves among the arguments for the model.
ARGUMENTS_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
# Decoding that was never compared with the definition of an exit: the argument of `generate` that requests it.
REFUSED = {
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "custom_generate": "a decoding loop of your own",
    "assistant_early_exit": "drafts by early exit; exit_policy='speculate:DEPTH' makes them",
    "token_healing": "token healing",
}


def check_mode(options: dict[str, Any]) -> None:
    """Raise ValueError, one line, for arguments of `generate` that exits can't be combined with."""
    words = [f"{name} ({words})" for name, words in REFUSED.items() if options.get(name)]
    if options.get("guidance_scale") not in (None, 1):
        words.append("guidance_scale (classifier-free guidance)")
    if (options.get("num_beam_groups") or 1) > 1:
        words.append("num_beam_groups (group beam search)")
    if options.get("cache_implementation") == "paged":
        words.append("cache_implementation='paged' (continuous batching)")
    if (options.get("num_beams") or 1) > 1 and options.get("use_cache") is False:
        words.append("num_beams with use_cache=False (beams change places, and their exits are not remembered)")
    if words:
        raise ValueError(f'{"; ".join(words)}: not supported with early exits; leave it out or pass exit_policy="off"')


class Generation:
    """One running `generate` call.

    policy: what exits follow. prompt: positions of the prompt, padding included; None until the first forward pass has
    read it, where that pass reads the prompt and nothing else. With `first_token` the prompt's last position may exit.
    aligned: whether rows keep their places, so that depths are known. deepest: the last exit at which drafts for full
    depth may leave, None: there are none.
    """

    def __init__(self, policy: dict, prompt: int | None, first_token: bool, aligned: bool, deepest: int | None):
        self.deepest = deepest
        self.policy, self.prompt, self.first_token, self.aligned = policy, prompt, first_token, aligned
        # int64 [B, positions that were read]: layers that each ran.
        self.depths_BT: Tensor | None = None

    def begin(self, past: int, new: int, cached: bool) -> tuple[Tensor | None, int]:
        """Before positions past .. past + new - 1 are read: the depths that are known already, int64 [B, t], and the
        first of the new positions that may exit.

        Without a cache all positions are read again at every step, each as deep as it went when its token was made.
        """
        if self.prompt is None:
            self.prompt = past + new
        known = None if cached else self.depths_BT
        free = max(self.prompt - int(self.first_token) - past, 0, 0 if known is None else known.shape[1])
        return known, free

    def note(self, past: int, depths_BT: Tensor) -> None:
        """Positions past, past + 1, ... ran so deep. A draft that was thrown away is written over."""
        if not self.aligned:
            return
        if self.depths_BT is None:
            before = depths_BT.new_full((depths_BT.shape[0], past), -1)
        else:
            before = self.depths_BT[:, :past]
        self.depths_BT = torch.cat([before, depths_BT], dim=1)

    def of_tokens(self, tokens_BT: Tensor, ends: int | list[int] | None) -> Tensor | None:
        """Depths of the generated tokens, int64 [B, T], -1 after a row's end; None where rows changed places."""
        if not self.aligned or self.depths_BT is None or self.prompt is None:
            return None
        first = self.prompt - 1
        depths_BT = self.depths_BT[:, first : first + tokens_BT.shape[1]]
        if ends is None:
            return depths_BT
        end = torch.isin(tokens_BT, torch.as_tensor(ends, device=tokens_BT.device).reshape(-1))
        after = (end.int().cumsum(dim=1) - end.int()) > 0
        return depths_BT.masked_fill(after.to(depths_BT.device), -1)


# The `generate` calls under way in this thread, each with its model, the innermost last: drafts are made within one.
RUNNING: ContextVar[tuple[tuple[Any, Generation], ...]] = ContextVar("RUNNING", default=())


def running_call(model: Any) -> Generation | None:
    """The innermost `generate` call of `model` that is under way in this thread."""
    return next((call for owner, call in reversed(RUNNING.get()) if owner is model), None)


class EarlyExitForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = EarlyExitConfig
    config: EarlyExitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        f"{family}DecoderLayer" for family in ("Llama", "Qwen2", "Qwen3", "SmolLM3", "Olmo2")
    ]
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # Gates were trained in float32; what of them is rounded is rounded as in training (WideLinear). Quantisation
    # looks at the first name, loading in 16 bits at the second.
    _keep_in_fp32_modules = ["gates"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"gates"}  # noqa: RUF012

    def __init__(self, config: EarlyExitConfig):
        self._check_attention(config)
        super().__init__(config)
        base = config.base_config()
        # The base class by its configuration. Its modules are used; the loop over its layers is this class's.
        self.model: Any = MODEL_MAPPING[type(base)](base)  # type: ignore[operator]
        for layer in self.model.layers:
            with_exits(layer)
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
        self.post_init()

    # Older transformers don't find the head by itself, and would not tie it.
    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings  # type: ignore[assignment]

    @staticmethod
    def _check_attention(config: EarlyExitConfig) -> None:
        kind = getattr(config, "_attn_implementation", None) or "sdpa"
        if kind not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation {kind!r} isn't supported with early exits; use sdpa or eager")

    def exit_policy(self) -> dict:
        """The policy in force: of this thread's `generate` call; else, while training, "off"; else of
        generation_config; else of config."""
        running = running_call(self)
        if running is not None:
            return running.policy
        if self.training:
            return {"kind": "off"}
        return read_exit_policy(getattr(self.generation_config, "exit_policy", None) or self.config.exit_policy)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *args,
        exit_policy: dict | str | None = None,
        **kwargs,
    ):
        """As in transformers, with `exit_policy` (see the configuration) for this call; without one, a model that is
        training doesn't exit. Calls in several threads don't see each other.

        `last_exit_depths`, int64 [rows, generated tokens], says of the call that finished last how many layers ran for
        each token, -1 after a row's end; None under beam search, where rows change places. Drafts (assisted, prompt
        lookup) are checked under the same exits. Raises ValueError for a mode that exits can't be combined with; with
        the policy "off" all are transformers' own.
        """
        # Transformers 5.0 gives a draft's `generate` what `prepare_inputs_for_generation` made.
        kwargs.pop("of_generate", None)
        policy = read_exit_policy(exit_policy or getattr(generation_config, "exit_policy", None) or self.exit_policy())
        check_exit_policy(policy, self.config.exit_depths, self.config.num_hidden_layers)
        deepest = None
        if policy["kind"] == "speculate":
            deepest, policy = policy["value"], {"kind": "off"}

        def setting(name: str) -> Any:
            values = [getattr(config, name, None) for config in (generation_config, self.generation_config)]
            return kwargs[name] if name in kwargs else next((value for value in values if value is not None), None)

        others = ("num_beam_groups", "cache_implementation", "guidance_scale")
        own_loop = {name: setting(name) for name in (*REFUSED, *others)}
        beams = setting("num_beams") or 1
        if policy["kind"] != "off":
            check_mode({**own_loop, "num_beams": beams, "use_cache": setting("use_cache")})
        # A prompt that comes in pieces, or with a draft behind it, doesn't end where the first pass ends.
        drafted = kwargs.get("assistant_model") or any(isinstance(value, PreTrainedModel) for value in args)
        pieces = drafted or setting("prompt_lookup_num_tokens") or setting("prefill_chunk_size")
        ids, embedded, mask = inputs, kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        ids = kwargs.get("input_ids") if ids is None else ids
        read = next((part.shape[1] for part in (mask, embedded, ids) if part is not None), 1)
        aligned = beams == 1 and not any(own_loop[name] for name in REFUSED)
        running = Generation(policy, read if pieces else None, self.config.first_token, aligned, deepest)
        token = RUNNING.set((*RUNNING.get(), (self, running)))
        try:
            output = super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            RUNNING.reset(token)
        tokens = output if isinstance(output, Tensor) else output.sequences
        given = ids.shape[1] if ids is not None else int(embedded is None)
        self.last_exit_depths = running.of_tokens(tokens[:, given:], setting("eos_token_id"))
        return output

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """Transformers' loop, or where this call drafts and can, the one of speculation_early_exit.py."""
        running = running_call(self)
        synced, streamer = kwargs.get("synced_gpus", False), kwargs.get("streamer")
        if running is None or not running.deepest or not can_speculate(input_ids, generation_config, synced, kwargs):
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        ids = speculate(
            self, input_ids, running.deepest, logits_processor, stopping_criteria, generation_config, streamer, cache
        )
        running.prompt, layers = input_ids.shape[1], self.config.num_hidden_layers
        running.depths_BT = torch.full((1, ids.shape[1] - 1), layers, device=ids.device)
        return ids

    # Transformers reads the signature of its own.
    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        for name in ARGUMENTS_OF_GENERATE:
            inputs.pop(name, None)
        # Tells the passes of `generate` from those that are made in between (guidance, streamers). A bool, since older
        # beam search divides whatever else it finds here among parts of the batch.
        inputs["of_generate"] = True
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_depths: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """input_ids int64 [B, T] or inputs_embeds [B, T, D] -> logits float32 [B, T or fewer, V].

        exit_depths, int64 [B, T]: prescribed depths (values of config.exit_depths, or the number of layers); the gates
        do not decide. Without it, `generate`'s tokens and one new position on top of a cache exit by the exit policy;
        anything else, training too, runs through all layers.

        Hidden states are transformers'; of a layer that a position skipped it is that before the layer. Attentions
        [B, H, T, S]: 0 for a row that skipped the layer as a whole.
        """
        running = running_call(self) if kwargs.pop("of_generate", False) else None
        self._check_call(kwargs, input_ids, inputs_embeds)
        cache = cache if cache is not None else past_key_values
        check_cache(cache)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, new = x_BTD.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        # Positions that begin anew mean several sequences in one row, unless a cache says what came before.
        packed = position_ids if cache is None else None
        if self.model.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache, use_cache = None, False
        elif use_cache and cache is None:
            cache = DynamicCache()
        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x_BTD.device)[None]
        mask = attention_mask_4d(attention_mask, packed, rows, new, past, x_BTD.device)
        rope = tuple(part.unsqueeze(1) for part in self.model.rotary_emb(x_BTD, position_ids))
        attentions_wanted = self.config.output_attentions if output_attentions is None else output_attentions
        weights: dict[int, Tensor] | None = {} if attentions_wanted else None
        eager = attentions_wanted or self.config._attn_implementation == "eager"
        shared = Pass(mask, rope, cache, past, eager, weights)  # type: ignore[arg-type]
        depth_BT, policy, first = self._start_depths(exit_depths, running, rows, new, past, cache, x_BTD.device)
        hidden: list[Tensor] = []
        for depth, layer in enumerate(self.model.layers):
            if first < new and str(depth) in self.gates and policy["kind"] in ("threshold", "sample"):
                depth_BT = self._apply_gate(depth, x_BTD, depth_BT, policy, first)
            if hidden_wanted:
                hidden.append(x_BTD)
            x_BTD = self._through(layer, x_BTD, depth_BT > depth, shared)
        if running is not None:
            running.note(past, depth_BT)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        read_BTD = self.model.norm(x_BTD if hidden_wanted else x_BTD[:, keep])
        logits = self.lm_head(read_BTD[:, keep] if hidden_wanted else read_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        made: dict[str, Any] = {CACHE_FIELD: cache if use_cache else None}
        made |= {"hidden_states": (*hidden, read_BTD)} if hidden_wanted else {}
        if weights is not None:
            none = x_BTD.new_zeros(rows, self.config.num_attention_heads, new, past + new)
            made["attentions"] = tuple(weights.get(index, none) for index in range(len(self.model.layers)))
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **made)
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _check_call(self, kwargs: dict[str, Any], input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        """Raise TypeError or ValueError for what would be ignored; drop from `kwargs` what isn't for the loss."""
        self._check_attention(self.config)
        for name in NEEDLESS_ARGUMENTS:
            kwargs.pop(name, None)
        # Older `generate` says of what it doesn't want that it doesn't.
        for name in [name for name, value in kwargs.items() if value is None or value is False]:
            kwargs.pop(name)
        strange = sorted(set(kwargs) - set(LOSS_ARGUMENTS))
        if strange:
            raise TypeError(f"a model with early exits doesn't take {', '.join(strange)}; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        placed = {str(place) for place in (getattr(self, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
        if len(placed) > 1:
            raise ValueError(
                f"device_map spreads the layers over {', '.join(sorted(placed))}; early exits need them on one device, "
                "with the rest on cpu or disk"
            )

    def _start_depths(
        self,
        given: Tensor | None,
        running: Generation | None,
        rows: int,
        new: int,
        past: int,
        cache: Any,
        device: torch.device,
    ) -> tuple[Tensor, dict, int]:
        """Depths before any gate decides, int64 [B, T]; what decides; the first position that it decides on.

        Raises ValueError for a prescribed depth that is not an exit.
        """
        layers = self.config.num_hidden_layers
        if given is None:
            depth_BT = torch.full((rows, new), layers, dtype=torch.long, device=device)
            policy, first = self.exit_policy(), 0 if new == 1 and past > 0 else new
            if running is not None:
                known_BT, first = running.begin(past, new, cache is not None)
                if known_BT is not None:
                    depth_BT[:, : known_BT.shape[1]] = known_BT
            if policy["kind"] == "fixed":
                depth_BT[:, first:] = policy["value"]
            return depth_BT, policy, first
        outcomes = [*self.config.exit_depths, layers]
        given = torch.as_tensor(given, device=device).long()
        if given.shape != (rows, new):
            raise ValueError(f"exit_depths has shape {tuple(given.shape)}, expected {(rows, new)}")
        if not bool(torch.isin(given, torch.tensor(outcomes, device=device)).all()):
            raise ValueError(f"exit_depths holds values outside {outcomes}")
        return given, {"kind": "off"}, new

    def _apply_gate(self, depth: int, x_BTD: Tensor, depth_BT: Tensor, policy: dict, first: int) -> Tensor:
        """Only positions from `first` on may exit: what is before them is the prompt's, or decided already."""
        exit_BT = depth_BT[:, first:]
        undecided_BT = exit_BT > depth
        if not bool(undecided_BT.any()):
            return depth_BT
        hazard_BT = torch.sigmoid(self.gates[str(depth)](x_BTD[:, first:]))
        bar = torch.rand_like(hazard_BT) if policy["kind"] == "sample" else policy["value"]
        exit_BT = torch.where(undecided_BT & (hazard_BT > bar), depth, exit_BT)
        return torch.cat([depth_BT[:, :first], exit_BT], dim=1)

    def _through(self, layer: Any, x_BTD: Tensor, active_BT: Tensor, shared: Pass) -> Tensor:
        """The layer's output on the stream [B, T, D]. A layer that no position runs writes its keys and values and is
        not called, so its hooks don't fire."""
        if not bool(active_BT.any()):
            layer.skip(x_BTD, shared)
            return x_BTD
        # Layers of newer transformers see to gradient checkpointing themselves.
        again = self.model.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if again and not hasattr(layer, "gradient_checkpointing"):
            return self.model._gradient_checkpointing_func(layer.__call__, x_BTD, active_BT, shared)
        return layer(x_BTD, active_BT, shared)


__all__ = ["EarlyExitForCausalLM"]

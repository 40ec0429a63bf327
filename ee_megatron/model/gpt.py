"""The early-exit GPT: megatron-core's GPTModel with this project's layers, returning hidden states, not logits.

Logits over a large vocabulary are the biggest tensor of a training step, so the loss asks for them in chunks
(`readout`), only where a position counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from ..families import inverse_frequencies
from .config import EarlyExitTransformerConfig, padded_vocab
from .layer import CausalAttention, EarlyExitLayer, HeadNorm, RMSNorm, SkippingAttention, WholeNorm
from .lora import DownLinear, GateUpLinear, LoRAPair, OutLinear, QKVLinear
from .packed import Control

# Under which names megatron-core stores a layer's norms: those of Transformer Engine, which fuses a norm with the
# product behind it. Its layer spec for unfused norms says the same.
STORED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def layer_spec(config: EarlyExitTransformerConfig) -> ModuleSpec:
    dims = config.dims
    assert dims is not None
    norms: list[Any] = [HeadNorm if dims.qk_norm else None] * 2
    if dims.qk_norm_whole:
        norms = [ModuleSpec(WholeNorm, {"width": size}) for size in (dims.q_size, dims.kv_size)]
    before = IdentityOp if dims.norm_after else RMSNorm
    attention = ModuleSpec(
        module=SkippingAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=QKVLinear,
            core_attention=CausalAttention,
            linear_proj=OutLinear,
            q_layernorm=norms[0],
            k_layernorm=norms[1],
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=GateUpLinear, linear_fc2=DownLinear))
    return ModuleSpec(
        module=EarlyExitLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=STORED_NORMS,
        ),
    )


class EarlyExitGPT(GPTModel):
    """One pipeline stage's part of the model.

    `forward(tokens [1, W], control)` returns this stage's hidden states of packed sequences [W, 1, D] (sharded along W
    under sequence parallelism); on the last stage they are final_norm(h) and whole along W. Without a control it is
    megatron-core's model: tokens [b, s] -> [s, b, D], every sequence whole and without exits.
    """

    def forward(self, tokens: Tensor, control: Control | None = None) -> Tensor:  # type: ignore[override]
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        tp = self.pg_collection.tp
        share = (tp.size(), tp.rank()) if self.config.sequence_parallel else (1, 0)
        extra = None if control is None else {"context": control.on_rank(*share)}
        return super().forward(tokens, positions, None, extra_block_kwargs=extra)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            # Whole along the sequence, because the loss picks single positions out of it. Every rank computes the same
            # loss on it up to its own vocabulary shard, so the backward pass sums over ranks (reduce-scatter).
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        return hidden_states

    def readout_weight(self) -> nn.Parameter:
        """The head's local rows [V_padded / tensor, D]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def early_exit_layers(self) -> list[EarlyExitLayer]:
        """This stage's layers, in order."""
        return list(self.decoder.layers)

    def ask_for_input_gradient(self) -> None:
        """Make the embedding's output ask for a gradient, as a frozen embedding's doesn't. What hangs on a layer's
        backward pass (recomputation, ZeRO-3's hooks) works only if the layer's input asks for one."""
        self.embedding.register_forward_hook(_ask_for_gradient)

    def take_gates(self) -> dict[int, Tensor]:
        """Gate logits of the latest forward pass by depth, fp32 [W]; this stage's gates only."""
        taken: dict[int, Tensor] = {}
        for layer in self.early_exit_layers():
            if layer.recorded is not None:
                logit = layer.recorded
                if self.config.sequence_parallel:
                    logit = gather_from_sequence_parallel_region(logit, group=self.pg_collection.tp)
                taken[layer.depth] = logit
                layer.recorded = None
        return taken

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is the base: the same weights without adapters, bit for bit."""
        pairs = [module for module in self.modules() if isinstance(module, LoRAPair)]
        for pair in pairs:
            pair.enabled = False
        try:
            yield
        finally:
            for pair in pairs:
                pair.enabled = True

    @contextmanager
    def recording_gates(self) -> Iterator[None]:
        """Inside, every gated layer keeps its logits of the latest forward pass for `take_gates`."""
        layers = self.early_exit_layers()
        for layer in layers:
            layer.record = layer.gate is not None
        try:
            yield
        finally:
            for layer in layers:
                layer.record, layer.recorded = False, None


class Rotary(RotaryEmbedding):
    """megatron-core's angles without its cache, which keeps those of the last 32 widths, and every micro-batch may have
    another."""

    def forward(self, max_seq_len: int, offset: int = 0, **_: Any) -> Tensor:
        return self.get_emb(max_seq_len, offset)


def _ask_for_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def build_stage(config: EarlyExitTransformerConfig) -> EarlyExitGPT:
    """This rank's stage; process groups must exist. Its weights are uninitialised until they are loaded."""
    dims = config.dims
    assert dims is not None
    spec = layer_spec(config)
    count = get_num_layers_to_build(config)
    block = TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    model = EarlyExitGPT(
        config,
        block,
        vocab_size=padded_vocab(dims.vocab, config.tensor_model_parallel_size),
        max_sequence_length=dims.max_positions,
        pre_process=pp_rank == 0,
        post_process=pp_rank == config.pipeline_model_parallel_size - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=dims.tied,
        position_embedding_type="rope",
        rotary_base=int(dims.rope_theta),
    )
    if model.pre_process and config.recompute:
        model.ask_for_input_gradient()
    model.rotary_pos_emb = Rotary(dims.head_dim, 1.0, use_cpu_initialization=config.use_cpu_initialization)
    model.rotary_pos_emb.inv_freq = inverse_frequencies(dims).to(model.rotary_pos_emb.inv_freq.device)
    return model

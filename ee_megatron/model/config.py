"""From a model's dimensions and a run's layout to megatron-core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from ..families import ModelDims
from ..families import padded_vocab as padded_vocab
from ..policy import PolicySpec


@dataclass
class EarlyExitTransformerConfig(TransformerConfig):
    """TransformerConfig plus what the exits need.

    dims: the model's dimensions; spec: adapters and gates (None: the plain model, no gates, no adapters);
    adapter_dropout: probability of dropping an input of an adapter in training mode; recompute: layers keep their
    inputs only and are run again in the backward pass; flex_attention: packed sequences attend by FlexAttention
    (model/attention.py); fused: their norms, rotations and SwiGLU are a kernel each, for a GPU (model/layer.py).
    """

    dims: ModelDims | None = None
    spec: PolicySpec | None = None
    adapter_dropout: float = 0.0
    recompute: bool = False
    flex_attention: bool = False
    fused: bool = False


def megatron_config(
    dims: ModelDims,
    spec: PolicySpec | None,
    stage_sizes: tuple[int, ...],
    *,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: bool = False,
    dtype: torch.dtype = torch.float32,
    on_cpu: bool = True,
    adapter_dropout: float = 0.0,
    flex_attention: bool = False,
    fused: bool = False,
) -> EarlyExitTransformerConfig:
    """The config of one run. `stage_sizes`: layers per stage, their sum is L.

    Weights are never initialised here: they are loaded right after the build.
    """
    pipeline = len(stage_sizes)
    layout = "|".join("t" * size for size in stage_sizes)
    return EarlyExitTransformerConfig(
        dims=dims,
        spec=spec,
        adapter_dropout=adapter_dropout,
        num_layers=dims.num_layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.intermediate,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_heads,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=dims.rms_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        # 1 for a layer that doesn't rotate.
        no_rope_freq=[int(layer in dims.no_rope) for layer in range(dims.num_layers)] if dims.no_rope else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_model_parallel_layout=f"E{layout}L" if pipeline > 1 else None,
        sequence_parallel=sequence_parallel and tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=not on_cpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=False,
        # The loss arrives already normalised over the global batch, so the schedule must not divide it again.
        calculate_per_token_loss=True,
        recompute=recompute,
        flex_attention=flex_attention,
        fused=fused,
    )

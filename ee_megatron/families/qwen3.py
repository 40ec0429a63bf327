"""Qwen3, dense sizes."""

from __future__ import annotations

from .base import ModelDims, read_common

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"


def read_dims(config: dict) -> ModelDims:
    """config.json of a dense Qwen3 -> dimensions (RMSNorm on q and k). Raises ValueError for what is not supported."""
    bias = bool(config.get("attention_bias", False))
    head_dim = int(config.get("head_dim") or 128)
    return read_common(config, MODEL_TYPE, head_dim=head_dim, qkv_bias=bias, out_bias=bias, qk_norm=True)

"""Qwen3, dense sizes."""

from __future__ import annotations

from .base import ModelDims, flag, read_common

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
VLLM = "Qwen3"


def read_dims(config: dict) -> ModelDims:
    """config.json of a dense Qwen3 -> dimensions (RMSNorm on q and k). Raises ValueError for what is not supported."""
    bias = flag(config, "attention_bias", MODEL_TYPE)
    config = {**config, "head_dim": 128 if config.get("head_dim") is None else config["head_dim"]}
    return read_common(config, MODEL_TYPE, qkv_bias=bias, out_bias=bias, qk_norm=True)

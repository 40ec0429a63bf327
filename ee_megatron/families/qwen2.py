"""Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen."""

from __future__ import annotations

from .base import ModelDims, read_common

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
VLLM = "Qwen2"


def read_dims(config: dict) -> ModelDims:
    """config.json of a Qwen2 -> dimensions (always a bias on q, k, v). Raises ValueError for what is not supported."""
    return read_common(config, MODEL_TYPE, qkv_bias=True)

"""Llama 2, Llama 3.x, SmolLM2, DeepSeek-R1-Distill-Llama."""

from __future__ import annotations

from .base import ModelDims, read_common

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def read_dims(config: dict) -> ModelDims:
    """config.json of a Llama -> dimensions. Raises ValueError for what is not supported, naming the field."""
    bias = bool(config.get("attention_bias", False))
    if config.get("sliding_window"):
        raise ValueError(f"llama: sliding_window={config['sliding_window']} is not supported; expected null")
    return read_common(config, MODEL_TYPE, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))

"""Llama 2, Llama 3.x, SmolLM2, DeepSeek-R1-Distill-Llama."""

from __future__ import annotations

from .base import ModelDims, flag, read_common

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
VLLM = "Llama"


def read_dims(config: dict) -> ModelDims:
    """config.json of a Llama -> dimensions. Raises ValueError for what is not supported, naming the field."""
    bias = flag(config, "attention_bias", MODEL_TYPE)
    if config.get("sliding_window"):
        raise ValueError(f"llama: sliding_window={config['sliding_window']} is not supported; expected null")
    mlp_bias = flag(config, "mlp_bias", MODEL_TYPE)
    return read_common(config, MODEL_TYPE, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)

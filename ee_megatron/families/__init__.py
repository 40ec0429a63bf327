"""Model families: fields of config.json that `base.py` doesn't read for all. A new family is an entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .base import ModelDims, features, flag, inverse_frequencies, padded_vocab, read_common


class Family(NamedTuple):
    """A model family. `architecture`: as config.json names it; `read_dims`: config.json -> dimensions, ValueError that
    names an unsupported field; `vllm`: the family's name in rollout/vllm/model.py, if it has a class there."""

    architecture: str
    read_dims: Callable[[dict], ModelDims]
    vllm: str = ""


def _llama(config: dict) -> ModelDims:
    """Llama 2, Llama 3.x, SmolLM2, DeepSeek-R1-Distill-Llama."""
    bias, mlp_bias = flag(config, "attention_bias", "llama"), flag(config, "mlp_bias", "llama")
    if config.get("sliding_window"):
        raise ValueError(f"llama: sliding_window={config['sliding_window']} is not supported; expected null")
    return read_common(config, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _qwen2(config: dict) -> ModelDims:
    """Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen: always a bias on q, k, v."""
    return read_common(config, "qwen2", qkv_bias=True)


def _qwen3(config: dict) -> ModelDims:
    """Qwen3, dense sizes: RMSNorm on q and k."""
    bias = flag(config, "attention_bias", "qwen3")
    config = {**config, "head_dim": 128 if config.get("head_dim") is None else config["head_dim"]}
    return read_common(config, "qwen3", qkv_bias=bias, out_bias=bias, qk_norm=True)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, vllm="Llama"),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, vllm="Qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, vllm="Qwen3"),
}
"""By model_type, as config.json names it."""
VLLM = {name: family.vllm for name, family in FAMILIES.items() if family.vllm}


def dims_from_config(config: dict) -> ModelDims:
    """Dimensions from a config.json as a dict. Raises ValueError for an unsupported architecture or field."""
    kind = config.get("model_type")
    if kind == "early_exit":
        kind = config.get("base_model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind].read_dims(config)


__all__ = ["FAMILIES", "VLLM", "ModelDims", "dims_from_config", "features", "inverse_frequencies", "padded_vocab"]

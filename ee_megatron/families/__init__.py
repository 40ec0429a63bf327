"""Model families: fields of config.json that `base.py` doesn't read for all. A new family is an entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

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


def _smollm3(config: dict) -> ModelDims:
    """SmolLM3: Llama with some layers that don't rotate; tied unless config.json says otherwise."""
    bias, mlp_bias = flag(config, "attention_bias", "smollm3"), flag(config, "mlp_bias", "smollm3")
    config = {"tie_word_embeddings": True, **config}
    biases = {"qkv_bias": bias, "out_bias": bias, "mlp_bias": mlp_bias}
    dims = read_common(config, "smollm3", implements=("no_rope_layers",), **biases)
    return replace(dims, no_rope=_layers_without_rope(config, dims.num_layers))


def _layers_without_rope(config: dict, layers: int) -> tuple[int, ...]:
    """From `no_rope_layers`, which in spite of its name has 1 for a layer with RoPE, or from its default."""
    rotated, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if rotated is None and isinstance(interval, int) and interval > 0:
        rotated = [int((layer + 1) % interval > 0) for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(rope not in (0, 1) for rope in rotated):
        raise ValueError(
            f"smollm3: no_rope_layers={rotated!r} with no_rope_layer_interval={interval!r}, expected 1 (RoPE) or 0 for "
            f"each of {layers} layers, or null and an interval of at least 1"
        )
    return tuple(layer for layer in range(layers) if not rotated[layer])


def _olmo2(config: dict) -> ModelDims:
    """OLMo-2: norms behind attention and MLP, and of queries and keys over all heads."""
    bias = flag(config, "attention_bias", "olmo2")
    more: dict[str, Any] = {"qk_norm": True, "qk_norm_whole": True, "norm_after": True}
    return read_common({"rms_norm_eps": 1e-5, **config}, "olmo2", qkv_bias=bias, out_bias=bias, **more)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, vllm="Llama"),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, vllm="Qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, vllm="Qwen3"),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2),
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

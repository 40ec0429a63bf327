"""Model families. A new one is a module like these and one entry in FAMILIES.

A family's module has MODEL_TYPE and ARCHITECTURE, as config.json names them, `read_dims`, and VLLM, the family's name
in rollout/vllm/model.py, if it has a class there.
"""

from __future__ import annotations

from . import llama, qwen2, qwen3
from .base import ModelDims, features, inverse_frequencies, padded_vocab

FAMILIES = {module.MODEL_TYPE: module for module in (llama, qwen2, qwen3)}
VLLM: dict[str, str] = {name: module.VLLM for name, module in FAMILIES.items() if hasattr(module, "VLLM")}


def dims_from_config(config: dict) -> ModelDims:
    """A config.json as a dict -> dimensions. Raises ValueError for an unsupported architecture or field."""
    kind = config.get("model_type")
    if kind == "early_exit":
        kind = config.get("base_model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind].read_dims(config)


__all__ = ["FAMILIES", "VLLM", "ModelDims", "dims_from_config", "features", "inverse_frequencies", "padded_vocab"]

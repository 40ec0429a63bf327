"""Dimensions of published models by name, so that a run can be planned where no model directory is."""

from __future__ import annotations

from typing import Any

from ..families import ModelDims, dims_from_config


def _config(*values: Any, **more: Any) -> dict[str, Any]:
    """The fields of a model's own config.json that decide shapes."""
    names = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size",
    )  # fmt: skip
    return {**dict(zip(names, values, strict=True)), "max_position_embeddings": 131072, **more}


TIED = {"tie_word_embeddings": True}

# With the published number of parameters (tied weights counted once).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (_config("qwen2", 1536, 8960, 28, 12, 2, 151936), 1_777_088_000),
    "DeepSeek-R1-Distill-Qwen-7B": (_config("qwen2", 3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "DeepSeek-R1-Distill-Qwen-14B": (_config("qwen2", 5120, 13824, 48, 40, 8, 152064), 14_770_033_664),
    "DeepSeek-R1-Distill-Qwen-32B": (_config("qwen2", 5120, 27648, 64, 40, 8, 152064), 32_763_876_352),
    "DeepSeek-R1-Distill-Llama-8B": (_config("llama", 4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "DeepSeek-R1-Distill-Llama-70B": (_config("llama", 8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Qwen3-0.6B": (_config("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED), 596_049_920),
    "Qwen3-8B": (_config("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128), 8_190_735_360),
    "Qwen3-32B": (_config("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128), 32_762_123_264),
    "SmolLM2-135M": (_config("llama", 576, 1536, 30, 9, 3, 49152, **TIED), 134_515_008),
}


def published_dims(name: str) -> ModelDims:
    """Dimensions of a model of `PUBLISHED`. Raises ValueError, with the names there are, for another."""
    if name not in PUBLISHED:
        raise ValueError(f"--dims {name}: no such model; expected one of {', '.join(PUBLISHED)}")
    return dims_from_config(PUBLISHED[name][0])

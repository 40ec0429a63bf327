"""Config-only: the models that the project names, by their published dimensions, without their weights."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ee_megatron.checkpoint.megatron_directory import CheckpointLayout, global_shape
from ee_megatron.checkpoint.megatron_io import whole_entries
from ee_megatron.exits import ExitLayout
from ee_megatron.families import dims_from_config


def qwen2(hidden, intermediate, layers, heads, kv, vocab=152064, tied=False, theta=1e6, eps=1e-6):
    return dense("qwen2", hidden, intermediate, layers, heads, kv, vocab, tied, theta, eps) | {
        "sliding_window": 131072,
        "use_sliding_window": False,
        "max_window_layers": layers,
    }


def qwen3(hidden, intermediate, layers, heads, kv=8, tied=False):
    return dense("qwen3", hidden, intermediate, layers, heads, kv, 151936, tied, 1e6, 1e-6) | {
        "head_dim": 128,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def llama3(hidden, intermediate, layers, heads, kv=8, factor: float | None = 8.0, tied=False, head_dim=128):
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    return dense("llama", hidden, intermediate, layers, heads, kv, 128256, tied, 5e5, 1e-5) | {
        "head_dim": head_dim,
        "rope_scaling": scaling if factor else None,
        "attention_bias": False,
        "mlp_bias": False,
    }


def dense(kind, hidden, intermediate, layers, heads, kv, vocab, tied, theta, eps):
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "max_position_embeddings": 131072,
    }


# config, published number of parameters (tied weights once)
MODELS: dict[str, tuple[dict, int]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (qwen2(1536, 8960, 28, 12, 2, 151936, theta=1e4), 1_777_088_000),
    "DeepSeek-R1-Distill-Qwen-7B": (qwen2(3584, 18944, 28, 28, 4, theta=1e4), 7_615_616_512),
    "DeepSeek-R1-Distill-Qwen-14B": (qwen2(5120, 13824, 48, 40, 8, eps=1e-5), 14_770_033_664),
    "DeepSeek-R1-Distill-Qwen-32B": (qwen2(5120, 27648, 64, 40, 8, eps=1e-5), 32_763_876_352),
    "DeepSeek-R1-Distill-Llama-8B": (llama3(4096, 14336, 32, 32), 8_030_261_248),
    "DeepSeek-R1-Distill-Llama-70B": (llama3(8192, 28672, 80, 64), 70_553_706_496),
    "Qwen2.5-0.5B": (qwen2(896, 4864, 24, 14, 2, 151936, tied=True), 494_032_768),
    "Qwen2.5-1.5B": (qwen2(1536, 8960, 28, 12, 2, 151936, tied=True), 1_543_714_304),
    "Qwen2.5-3B": (qwen2(2048, 11008, 36, 16, 2, 151936, tied=True), 3_085_938_688),
    "Qwen2.5-7B": (qwen2(3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen2.5-14B": (qwen2(5120, 13824, 48, 40, 8), 14_770_033_664),
    "Qwen2.5-32B": (qwen2(5120, 27648, 64, 40, 8), 32_763_876_352),
    "Qwen2.5-72B": (qwen2(8192, 29568, 80, 64, 8), 72_706_203_648),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, tied=True), 596_049_920),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, tied=True), 1_720_574_976),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, tied=True), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32), 8_190_735_360),
    "Qwen3-14B": (qwen3(5120, 17408, 40, 40), 14_768_307_200),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64), 32_762_123_264),
    "Llama-3-8B": (llama3(4096, 14336, 32, 32, factor=None), 8_030_261_248),
    "Llama-3.1-8B": (llama3(4096, 14336, 32, 32), 8_030_261_248),
    "Llama-3.1-70B": (llama3(8192, 28672, 80, 64), 70_553_706_496),
    "Llama-3.1-405B": (llama3(16384, 53248, 126, 128), 405_853_388_800),
    "Llama-3.2-1B": (llama3(2048, 8192, 16, 32, factor=32.0, tied=True, head_dim=64), 1_235_814_400),
    "Llama-3.2-3B": (llama3(3072, 8192, 28, 24, factor=32.0, tied=True), 3_212_749_824),
    "Llama-3.3-70B": (llama3(8192, 28672, 80, 64), 70_553_706_496),
    "SmolLM2-135M": (dense("llama", 576, 1536, 30, 9, 3, 49152, True, 1e5, 1e-5), 134_515_008),
    "SmolLM2-360M": (dense("llama", 960, 2560, 32, 15, 5, 49152, True, 1e5, 1e-5), 361_821_120),
    "SmolLM2-1.7B": (dense("llama", 2048, 8192, 24, 32, 32, 49152, True, 1.3e5, 1e-5), 1_711_376_384),
}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_of_a_published_model_are_those_of_transformers(name: str) -> None:
    config, published = MODELS[name]
    shapes = dims_from_config(config).tensor_shapes()
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == published
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**fields), dtype=torch.bfloat16)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert shapes == theirs


@pytest.mark.parametrize("name", MODELS)
def test_megatron_parameters_of_a_published_model_take_every_tensor_once(name: str) -> None:
    dims = dims_from_config(MODELS[name][0])
    shapes = dims.tensor_shapes()
    exits = ExitLayout.default(dims.num_layers, 4)
    for ranks in sorted({1, dims.kv_heads} | ({2} if dims.kv_heads % 2 == 0 else set())):
        layout = CheckpointLayout.plan(dims, exits, ranks, 4)
        assert sum(layout.stage_layers) == dims.num_layers
        left = dict(shapes)
        for item in whole_entries(dims):
            parts = [torch.empty(left.pop(part), device="meta") for part in item.names]
            whole = torch.Size(global_shape(item, [part.shape for part in parts])).numel()
            locals_ = [item.shard(parts, ranks, rank) for rank in range(ranks)]
            assert len({local.shape for local in locals_}) == 1
            copies = ranks if locals_[0].shape == global_shape(item, [part.shape for part in parts]) else 1
            padding = sum(local.numel() for local in locals_) - copies * whole
            assert 0 <= padding < ranks * dims.hidden
            assert padding == 0 or item.parameter.endswith(("word_embeddings.weight", "output_layer.weight"))
        assert not left

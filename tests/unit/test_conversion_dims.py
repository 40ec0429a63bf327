"""config.json alone: the published models by their dimensions, what is refused, and what no reader may lose."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ee_megatron import cli
from ee_megatron.checkpoint.mapping import whole_entries
from ee_megatron.checkpoint.megatron_settings import CARRIED, arguments, refuse_lost
from ee_megatron.checkpoint.megatron_write import CheckpointLayout
from ee_megatron.checkpoint.policy_files import check_base
from ee_megatron.exits import ExitLayout
from ee_megatron.families import FAMILIES, Family, ModelDims, dims_from_config
from ee_megatron.families.base import read_common
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.conversion import fields, made, policy_on, refused
from tests.covering import EXTENDED
from tests.tiny import tiny_hf


def dense(kind, hidden, intermediate, layers, heads, kv, vocab, tied, theta, eps, **more):
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": vocab}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 131072}
    more |= {"tie_word_embeddings": tied, "rope_theta": theta, "rms_norm_eps": eps, "hidden_act": "silu"}
    return {"model_type": kind, "attention_dropout": 0.0, **sizes, **more}


def qwen2(hidden, intermediate, layers, heads, kv, vocab=152064, tied=False, theta=1e6, eps=1e-6):
    window = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": layers}
    return dense("qwen2", hidden, intermediate, layers, heads, kv, vocab, tied, theta, eps, **window)


def qwen3(hidden, intermediate, layers, heads, kv=8, tied=False):
    more = {"head_dim": 128, "attention_bias": False, "sliding_window": None, "use_sliding_window": False}
    return dense("qwen3", hidden, intermediate, layers, heads, kv, 151936, tied, 1e6, 1e-6, **more)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama3(hidden, intermediate, layers, heads, kv=8, factor: float | None = 8.0, tied=False, head_dim=128):
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192} if factor else None
    more = {"head_dim": head_dim, "rope_scaling": scaling, "attention_bias": False, "mlp_bias": False}
    return dense("llama", hidden, intermediate, layers, heads, kv, 128256, tied, 5e5, 1e-5, **more)


# config, published number of parameters (tied weights once); Llama-3.3 and R1's Llamas have those of Llama-3.1
MODELS: dict[str, tuple[dict, int]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (qwen2(1536, 8960, 28, 12, 2, 151936, theta=1e4), 1_777_088_000),
    "DeepSeek-R1-Distill-Qwen-7B": (qwen2(3584, 18944, 28, 28, 4, theta=1e4), 7_615_616_512),
    "DeepSeek-R1-Distill-Qwen-14B": (qwen2(5120, 13824, 48, 40, 8, eps=1e-5), 14_770_033_664),
    "DeepSeek-R1-Distill-Qwen-32B": (qwen2(5120, 27648, 64, 40, 8, eps=1e-5), 32_763_876_352),
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
    "SmolLM2-135M": (dense("llama", 576, 1536, 30, 9, 3, 49152, True, 1e5, 1e-5), 134_515_008),
    "SmolLM2-360M": (dense("llama", 960, 2560, 32, 15, 5, 49152, True, 1e5, 1e-5), 361_821_120),
    "SmolLM2-1.7B": (dense("llama", 2048, 8192, 24, 32, 32, 49152, True, 1.3e5, 1e-5), 1_711_376_384),
    "SmolLM3-3B": (dense("smollm3", 2048, 11008, 36, 16, 4, 128256, True, 5e6, 1e-6), 3_075_098_624),
    "OLMo-2-0425-1B": (dense("olmo2", 2048, 8192, 16, 16, 16, 100352, False, 5e5, 1e-6), 1_484_916_736),
    "OLMo-2-1124-7B": (dense("olmo2", 4096, 11008, 32, 32, 32, 100352, False, 5e5, 1e-6), 7_298_617_344),
}


# Every family, tied and untied, heads of the hidden size and of their own; the others in `make test-all`.
FEW = {"DeepSeek-R1-Distill-Qwen-1.5B", "Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen3-8B", "Llama-3-8B", "Llama-3.2-1B"}
FEW |= {"SmolLM2-360M", "SmolLM3-3B", "OLMo-2-0425-1B"}


def test_a_published_model_has_its_number_of_parameters() -> None:
    for name, (config, published) in MODELS.items():
        shapes = dims_from_config(config).tensor_shapes()
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == published, name


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else EXTENDED) for n in MODELS])
def test_a_published_model_has_the_tensors_of_transformers_and_megatron_takes_each_once(name: str) -> None:
    config, _ = MODELS[name]
    dims = dims_from_config(config)
    shapes = dims.tensor_shapes()
    given = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**given), dtype=torch.bfloat16)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert shapes == theirs
    exits = ExitLayout.default(dims.num_layers, 4)
    for ranks in sorted({1, dims.kv_heads} | ({2} if dims.kv_heads % 2 == 0 else set())):
        layout = CheckpointLayout.plan(dims, exits, ranks, 4)
        assert sum(layout.stage_layers) == dims.num_layers
        left = dict(shapes)
        for item in whole_entries(dims):
            parts = [torch.empty(left.pop(part), device="meta") for part in item.names]
            shape = item.shape([tuple(part.shape) for part in parts])
            whole = torch.Size(shape).numel()
            locals_ = [item.shard(parts, ranks, rank) for rank in range(ranks)]
            assert len({local.shape for local in locals_}) == 1
            copies = ranks if locals_[0].shape == shape else 1
            padding = sum(local.numel() for local in locals_) - copies * whole
            assert 0 <= padding < ranks * dims.hidden
            assert padding == 0 or item.parameter.endswith(("word_embeddings.weight", "output_layer.weight"))
        assert not left


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("named", "said"),
    [
        *(("rope_theta", {"rope_theta": value}) for value in (0, -1.0, NAN, INF, 10**400, "10000", True, [1])),
        ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}),
        *(("rms_norm_eps", {"rms_norm_eps": value}) for value in (0, -1e-6, NAN, INF, "1e-5", None)),
        *(("factor", {"rope_scaling": {"type": "linear", "factor": value}}) for value in (0, NAN, INF, "2", [2], True)),
        *((name, {"rope_scaling": LLAMA3 | {name: 0}}) for name in LLAMA3 if name != "rope_type"),
        ("low_freq_factor", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}),
        *(("rope_parameters", {"rope_scaling": value}) for value in ("linear", [1], {"full_attention": {"factor": 2}})),
        ("rope_type", {"rope_scaling": {"rope_type": ["linear"], "factor": 2}}),
        *(("max_position_embeddings", {"max_position_embeddings": value}) for value in (0, "512", 1.5)),
        *(("tie_word_embeddings", {"tie_word_embeddings": value}) for value in ("false", 1.0)),
        *(("layer_types", {"layer_types": value}) for value in (5, [["full_attention"]], ["sliding_attention"])),
        *(("num_hidden_layers", {"num_hidden_layers": value}) for value in (10**5, 10**9)),
        *(("head_dim", {"head_dim": value}) for value in (1, 15)),
        *(("eos_token_id", {"eos_token_id": value}) for value in ("x", -1, 10**9, [1.5], [[2]])),
        ("partial_rotary_factor", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("attention_multiplier", {"attention_multiplier": 0.1}),
        ("no_rope_layers", {"no_rope_layers": [1, 2]}),
        ("attn_logit_softcapping", {"attn_logit_softcapping": 50.0}),
        ("head_dim", {"head_dim": 0}),
        *(("model_type", {"model_type": value}) for value in (None, 7, ["llama"], {"llama": 1})),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_config_says_is_a_number_of_use_or_refused_by_its_name(named: str, said: dict) -> None:
    for family in FAMILIES:
        config = dense(family, 64, 96, 2, 4, 2, 130, True, 1e4, 1e-6, head_dim=16)
        assert dims_from_config(config).rope_theta == 1e4
        with pytest.raises(ValueError, match=named) as refused:
            dims_from_config(config | said)
        assert "\n" not in str(refused.value)


@dataclass(frozen=True)
class Unrotated(ModelDims):
    """Of a family that isn't there: layers without RoPE."""

    unrotated: tuple[int, ...] = ()


def read_odd(config: dict) -> Unrotated:
    dims = read_common(config, "odd", implements=("no_rope_layers",))
    return Unrotated(**vars(dims), unrotated=tuple(config.get("no_rope_layers", ())))


def test_what_only_a_new_family_has_is_lost_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Family("LlamaForCausalLM", read_odd)
    monkeypatch.setitem(FAMILIES, "odd", odd)
    monkeypatch.chdir(tmp_path)
    base = tiny_hf("llama", Path("base"), layers=2)
    imported = "import --hf base --out megatron --quiet"
    planned = "run name=x teacher=null exits.depths=[1] exits.first_token=false device=cpu model.path=base "
    planned += "runs=runs rollout=vllm rollout.max_new_tokens=64 --dry-run"
    assert cli.main(planned.split()) == 0
    # A policy that was made with RoPE everywhere is a stranger where some layers have none.
    fields(base / "config.json", model_type="odd")
    policy = policy_on(base, Path("policy"), PolicySpec(2, (1,), rank=0), owner=base)
    check_base(policy, HFDirectory(base))
    fields(base / "config.json", no_rope_layers=[1, 0])
    with pytest.raises(ValueError, match="another base model"):
        check_base(policy, HFDirectory(base))
    # A Megatron checkpoint has no word for it, and there is no such model in vLLM.
    refused(capsys, imported, names=("unrotated",))
    assert not Path("megatron").exists()
    assert cli.main(planned.split()) == 2 and "rollout.backend=vllm" in capsys.readouterr().err
    fields(base / "config.json", no_rope_layers=[])
    made(imported)


def test_which_layers_rotate_is_part_of_the_model(tmp_path, monkeypatch, capsys):
    """In the identity of a base, and in what Megatron-LM records of it; vLLM has no early-exit model of the family."""
    monkeypatch.chdir(tmp_path)
    base = tiny_hf("smollm3", Path("base"), layers=2)
    policy = policy_on(base, Path("policy"), PolicySpec(2, (1,), rank=0), owner=base)
    fields(base / "config.json", no_rope_layers=None)
    check_base(policy, HFDirectory(base))
    shutil.copytree(base, "other")
    for said in ({"no_rope_layer_interval": 1}, {"no_rope_layers": [1, 1]}):
        fields("other/config.json", **said)
        with pytest.raises(ValueError, match="another base model"):
            check_base(policy, HFDirectory("other"))
    made("import --hf base --out saved --quiet")
    shutil.move("saved/weights", "iter_0000010")
    for n, (recorded, config) in enumerate([([0, 1], "other"), (None, "base"), ([0], "base"), (2, "base")]):
        state = torch.load("iter_0000010/common.pt", weights_only=False)
        state["args"].no_rope_freq = recorded
        torch.save(state, "iter_0000010/common.pt")
        command = f"import --megatron iter_0000010 --config {config} --out made-{n} --quiet"
        made(command) if recorded == 2 else refused(capsys, command, names=("no_rope_freq",))
    planned = "run name=x teacher=null exits.depths=[1] exits.first_token=false device=cpu model.path=base "
    assert cli.main(f"{planned} runs=runs rollout=vllm rollout.max_new_tokens=64 --dry-run".split()) == 2
    assert "rollout.backend=vllm" in capsys.readouterr().err


def test_what_a_config_leaves_unsaid_is_what_transformers_takes_for_it():
    """SmolLM3's configs say nothing of tied embeddings, whose default there is another one than Llama's."""
    unsaid = ("tie_word_embeddings", "rope_theta", "rms_norm_eps")
    for family in FAMILIES:
        config = {name: value for name, value in MODELS["SmolLM3-3B"][0].items() if name not in unsaid}
        config["model_type"] = family
        theirs, dims = CONFIG_MAPPING[family](**config), dims_from_config(config)
        assert dims.tied == theirs.tie_word_embeddings, family
        assert dims.rope_theta == theirs.rope_parameters["rope_theta"], family
        assert dims.rms_eps == theirs.rms_norm_eps, family
        rotated = getattr(theirs, "no_rope_layers", [1] * dims.num_layers)
        assert dims.no_rope == tuple(layer for layer in range(dims.num_layers) if not rotated[layer])


def test_megatrons_arguments_say_every_field_of_the_dimensions() -> None:
    dims = ModelDims("llama", 2, 64, 96, 4, 2, 16, 130, 512, 1e-6, 1e4, (), True, True, True, True, True)
    lists = {"rope_scaling": (("factor", 2.0), ("rope_type", "linear")), "no_rope": (1,)}
    layout = {"tensor": 1, "pipeline": 1}
    said = vars(arguments(dims, layout, torch.float32))
    lost = {*ModelDims.__dataclass_fields__} - CARRIED
    assert lost == {"qk_norm_whole", "norm_after"} and len(CARRIED) + len(lost) == len(ModelDims.__dataclass_fields__)
    for name in lost:
        with pytest.raises(ValueError, match=name):
            arguments(replace(dims, **{name: True}), layout, torch.float32)
    for name in CARRIED - {"family"}:
        value = getattr(dims, name)
        other = lists.get(name) or (not value if isinstance(value, bool) else 2 * value)
        assert vars(arguments(replace(dims, **{name: other}), layout, torch.float32)) != said, name
    refuse_lost(Unrotated(**vars(dims)))
    with pytest.raises(ValueError, match="unrotated"):
        arguments(Unrotated(**vars(dims), unrotated=(1,)), layout, torch.float32)

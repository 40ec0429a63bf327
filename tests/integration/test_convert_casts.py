"""What doesn't fit into the dtype that was asked for is refused, in every direction; a PEFT adapter finds its base."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ee_megatron.checkpoint.base_identity import base_identity
from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, save_policy
from tests.tiny import tiny_hf

LAYERS, DEPTHS = 4, (1, 3)


def policy_for(base, size: float = 0.1, **options):
    spec = PolicySpec(LAYERS, DEPTHS, alpha=2.0, **options)
    shapes = spec.tensor_shapes(HFDirectory(base).dims)
    generator = torch.Generator().manual_seed(0)
    return spec, {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def refused(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_weights_beyond_float16_are_refused_by_name_both_ways(tmp_path, capsys):
    base = tiny_hf("llama", tmp_path / "base", layers=LAYERS, hidden=32)
    name = "model.layers.2.mlp.up_proj.weight"
    stored = load_file(base / "model.safetensors")
    stored[name][3, :2] = torch.tensor([70000.0, -80000.0])
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "policy").mkdir()
    save_policy(tmp_path / "policy", *policy_for(base, rank=2), base_identity(HFDirectory(base)).to_json())
    say = f"{name}: 2 of {stored[name].numel()} numbers, up to 8e+04, don't fit into float16, which ends at 6.55e+04"
    both = ["--out", str(tmp_path / "out"), "--quiet"]
    assert say in refused(capsys, "import", "--hf", str(base), "--exit-depths", "1,3", "--dtype", "fp16", *both)
    given = ["--checkpoint", str(tmp_path / "policy"), "--hf", str(base)]
    assert say in refused(capsys, "export", *given, "--dtype", "float16", *both)
    assert not (tmp_path / "out").exists()
    assert main(["export", *given, "--dtype", "bfloat16", *both]) == 0


def test_what_an_adapter_makes_too_large_is_refused(tmp_path):
    base = tiny_hf("llama", tmp_path / "base", layers=LAYERS, hidden=32)
    spec, tensors = policy_for(base, size=300.0, rank=2)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+: \d+ of \d+ numbers, up to .* don't fit into float16"):
        export_hf(base, (spec, tensors), tmp_path / "out", dtype="float16")
    tensors = {key: value * (1e5 if "lora_B" in key else 1) for key, value in tensors.items()}
    with pytest.raises(ValueError, match=r"policy tensor \S+lora_B.weight: .* don't fit into float16"):
        export_hf(base, (spec, tensors), tmp_path / "out", adapters="keep", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_kept_adapter_finds_its_base_from_anywhere(tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    base = tiny_hf("llama", tmp_path / "base", layers=LAYERS, hidden=32)
    spec, tensors = policy_for(base, rank=2)
    (tmp_path / "policy").mkdir()
    save_policy(tmp_path / "policy", spec, tensors)
    monkeypatch.chdir(tmp_path)
    keep = ["--adapters", "keep", "--quiet"]
    assert main(["export", "--checkpoint", "policy", "--hf", "base", "--out", "kept", *keep]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    plain = export_hf(base, (spec, tensors), tmp_path / "plain", gates="drop")
    merged = model.merge_and_unload().state_dict()
    for name, value in load_file(plain / "model.safetensors").items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)

    # A Megatron checkpoint holds no directory that PEFT could load.
    monkeypatch.chdir(tmp_path)
    assert main(["import", "--hf", "base", "--policy", "policy", "--out", "megatron", "--quiet"]) == 0
    export = ["export", "--checkpoint", "megatron", "--out", "again", *keep]
    assert "say with --base-name what it was imported from" in refused(capsys, *export)
    assert "neither a directory nor a name on the hub" in refused(capsys, *export, "--base-name", "../nowhere")
    other = tiny_hf("llama", tmp_path / "other", layers=LAYERS, hidden=64)
    assert "has other dimensions than" in refused(capsys, *export, "--base-name", str(other))
    assert "only for --adapters keep" in refused(capsys, *export[:5], "--base-name", "base")
    assert not (tmp_path / "again").exists()
    for name, expected in (("org/model", "org/model"), ("base", str(base))):
        out = str(tmp_path / f"named-{name[0]}")
        assert main(["export", "--checkpoint", "megatron", "--out", out, *keep, "--base-name", name]) == 0
        config = json.loads((tmp_path / f"named-{name[0]}" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected

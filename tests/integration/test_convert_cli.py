"""The converter: Hugging Face -> Megatron -> Hugging Face, under other layouts, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layout_cases import split
from ranks import Ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.mapping import load_base
from ee_megatron.checkpoint.megatron_io import WEIGHTS, load_weights
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.model.config import megatron_config
from ee_megatron.model.gpt import build_stage
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, load_policy, save_policy
from tests.tiny import ONE_EACH, tiny_hf

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def random_policy(base: Path, folder: Path) -> Path:
    spec = PolicySpec(6, (2, 4), rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    shapes = spec.tensor_shapes(HFDirectory(base).dims)
    folder.mkdir()
    save_policy(folder, spec, {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    return folder


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.mark.parametrize(("family", "tied"), [*ONE_EACH, ("llama", False)])
def test_roundtrip_is_bit_exact(tmp_path, capsys, family, tied):
    base = tiny_hf(family, tmp_path / "base", tied=tied, vocab=133)
    assert run("roundtrip", "--hf", base) == 0
    assert f"{len(HFDirectory(base).names())} tensors came back equal" in capsys.readouterr().out


@torch.no_grad()
def test_export_of_an_imported_checkpoint_equals_export_of_its_parts(tmp_path):
    base = tiny_hf("qwen3", tmp_path / "base")
    policy = random_policy(base, tmp_path / "policy")
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", base, "--out", megatron, "--policy", policy, "--tp", 2, "--pp", 3) == 0
    assert run("export", "--checkpoint", megatron, "--out", tmp_path / "a") == 0
    assert run("export", "--checkpoint", policy, "--hf", base, "--out", tmp_path / "b") == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert sorted(a) == sorted(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("gates.4.") for name in a)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (base / name).read_bytes()
    # Under the name that transformers 4 has, too.
    made, given = (json.loads((path / "tokenizer_config.json").read_text()) for path in (tmp_path / "a", base))
    assert made == {**given, "tokenizer_class": "PreTrainedTokenizerFast"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    model.generate(torch.arange(6)[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert set(model.last_exit_depths[0, 1:].tolist()) <= {2, 4, 6}


def test_import_starts_gates_shut_and_converts_dtype(tmp_path, capsys):
    base = tiny_hf("llama", tmp_path / "base")
    out = tmp_path / "megatron"
    assert run("import", "--hf", base, "--out", out, "--exit-depths", "2,4", "--dtype", "bf16") == 0
    spec, tensors = load_policy(out)
    assert (spec.exit_depths, spec.rank) == ((2, 4), 0)
    assert sorted(tensors) == sorted(spec.gate_shapes(HFDirectory(base).dims))
    assert run("inspect", out) == 0
    shown = capsys.readouterr().out
    assert "decoder.layers.5.mlp.linear_fc1.weight" in shown and "bfloat16" in shown and "exit_depths [2, 4]" in shown
    assert run("export", "--checkpoint", out, "--out", tmp_path / "plain", "--gates", "drop") == 0
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    source = HFDirectory(base)
    assert all(torch.equal(stored[name], source.tensor(name).bfloat16()) for name in source.names())


def compare_layouts(pairs: list[tuple[Path, Path]], tensor: int, sizes: tuple[int, ...]) -> None:
    """On every rank: the converted weights are those that the rank cuts out of the model itself."""
    split(Degrees(tensor, len(sizes)))
    for base, weights in pairs:
        source = HFDirectory(base)
        config = megatron_config(source.dims, None, sizes, tensor=tensor)
        expected, found = build_stage(config), build_stage(config)
        load_base(expected, source)
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.fill_(7.0)
        load_weights(found, weights)
        other = dict(found.named_parameters())
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameter, other[name]), (base, name)


def test_imported_checkpoint_loads_under_tensor_and_pipeline_parallelism(tmp_path):
    pairs = []
    # 133 is odd: under two tensor ranks the vocabulary is padded. Stages of two and four layers.
    for family, tied in ONE_EACH:
        base, out = tiny_hf(family, tmp_path / family, tied=tied, vocab=133), tmp_path / f"{family}-megatron"
        assert run("import", "--hf", base, "--out", out, "--exit-depths", "2,4") == 0
        pairs.append((base, out / WEIGHTS))
    with Ranks(4, tmp_path / "ranks") as ranks:
        ranks.call("test_convert_cli:compare_layouts", pairs=pairs, tensor=2, sizes=(2, 4))


def damaged(base: Path, kind: str) -> None:
    weights, config = base / "model.safetensors", base / "config.json"
    if kind == "missing":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt_oss"}))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("missing", (), "no such file"),
        ("truncated", (), "truncated"),
        ("architecture", (), "'gpt_oss' is not supported"),
        ("", ("--exit-depths", "2,6"), "[6] outside 1..5"),
        ("", ("--tp", 3), "num_attention_heads=4 does not divide"),
        ("", ("--tp", 4), "num_key_value_heads=2 does not divide"),
        ("", ("--pp", 4, "--exit-depths", "3"), "need 3 boundaries at exits"),
        ("", ("--policy", "nowhere"), "no policy.json"),
    ],
)
def test_import_refuses_in_one_line_and_leaves_nothing(tmp_path, capsys, kind, options, message):
    base = tiny_hf("llama", tmp_path / "base")
    if kind:
        damaged(base, kind)
    capsys.readouterr()
    assert run("import", "--hf", base, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_export_refuses_damaged_checkpoints(tmp_path, capsys):
    base = tiny_hf("llama", tmp_path / "base")
    policy = random_policy(base, tmp_path / "policy")
    megatron = tmp_path / "megatron"
    assert run("import", "--hf", base, "--out", megatron, "--policy", policy) == 0
    capsys.readouterr()
    assert run("export", "--checkpoint", policy, "--out", tmp_path / "out") == 2
    assert "add --hf BASE" in capsys.readouterr().err
    assert run("export", "--checkpoint", policy, "--hf", base, "--out", base) == 2
    assert "exists already" in capsys.readouterr().err
    for harm in ("cut", "flip", "gone"):
        copy = tmp_path / harm
        shutil.copytree(megatron, copy)
        file = max((copy / WEIGHTS).glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        if harm == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif harm == "flip":
            middle = len(content) // 2
            content[middle : middle + 64] = bytes(byte ^ 1 for byte in content[middle : middle + 64])
            file.write_bytes(content)
        else:
            (copy / WEIGHTS / "metadata.json").unlink()
        assert run("export", "--checkpoint", copy, "--out", tmp_path / "out") == 2, harm
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "convert it again" in error, (harm, error)
        assert not (tmp_path / "out").exists()


def test_inspect_shows_every_kind_of_directory(tmp_path, capsys):
    base = tiny_hf("qwen2", tmp_path / "base")
    policy = random_policy(base, tmp_path / "policy")
    assert run("export", "--checkpoint", policy, "--hf", base, "--out", tmp_path / "peft", "--adapters", "keep") == 0
    for folder, kind, tensor in (
        (base, "hugging face qwen2", "model.layers.5.self_attn.q_proj.bias"),
        (policy, "policy", "gates.2.fc1.weight"),
        (tmp_path / "peft", "peft adapter", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"),
    ):
        capsys.readouterr()
        assert run("inspect", folder) == 0
        shown = capsys.readouterr().out
        assert kind in shown.splitlines()[0] and tensor in shown
    assert run("inspect", tmp_path / "nowhere") == 2


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_inspect_says_which_tensors_hold_numbers_that_are_not_finite(tmp_path, capsys, value):
    """As exports to float16 did before they refused what doesn't fit: their manifests agree with them."""
    base = tiny_hf("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    names = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"
    for name in names:
        tensors[name].view(-1)[5] = float(value)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run("inspect", base) == 1
    shown = capsys.readouterr()
    marked = [line.split()[0] for line in shown.out.splitlines() if line.endswith("NaN or infinite")]
    assert sorted(marked) == sorted(names)
    assert shown.err.count("\n") == 1 and names[0] in shown.err and "and 1 more of" in shown.err
    # Headers say nothing of numbers.
    assert run("inspect", base, "--no-hash") == 0


def test_the_tool_runs_as_a_program(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    command = [sys.executable, str(TOOL), "import", "--hf", str(base), "--out", str(tmp_path / "out"), "--tp", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / WEIGHTS / "metadata.json").is_file()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert again.returncode == 2
    assert "exists already" in again.stderr

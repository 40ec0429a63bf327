"""Checkpoints of every kind against each other and against the decoder: policies, exports, full fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.bodies import logits_of
from ee_megatron.checkpoint.describe import open_checkpoint
from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.checkpoint.policy_files import open_policy
from ee_megatron.checkpoint.verify import verify
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, load_policy, save_policy
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.tensors import FileTensors
from tests.processes import ee_megatron
from tests.tiny import ONE_EACH, tiny_hf

LAYERS, DEPTHS = 6, (2, 3, 5)


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def random_policy(base: Path, folder: Path, full: bool = False) -> Path:
    """Adapters, or a base that has been trained on; gates with hazards round one half."""
    spec = PolicySpec(LAYERS, DEPTHS, rank=0 if full else 4, alpha=8.0, full=full)
    source, generator = HFDirectory(base), torch.Generator().manual_seed(1)
    tensors = {
        name: 0.2 * torch.randn(shape, generator=generator) for name, shape in spec.tensor_shapes(source.dims).items()
    }
    if full:
        tensors |= {n: source.tensor(n).float() + 0.05 * tensors[n] for n in source.dims.tensor_shapes()}
    folder.mkdir()
    save_policy(folder, spec, tensors)
    return folder


def patterns(rows: int = 3, length: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 128, (rows, length), generator=generator)
    return ids, torch.tensor([*DEPTHS, LAYERS])[torch.randint(0, len(DEPTHS) + 1, ids.shape, generator=generator)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def greedy(decoder: Decoder, prompt: list[int], count: int, threshold: float) -> tuple[list[int], list[int]]:
    """Token by token from the decoder's whole forward pass: the first gate over the threshold is the exit."""
    ids, depths = list(prompt), [LAYERS] * len(prompt)
    for step in range(count):
        tokens, lengths = torch.tensor([ids]), torch.tensor([len(ids)])
        if step:
            depths.append(LAYERS)
            _, residuals = decoder.forward_with_residuals(tokens, lengths, torch.tensor([depths]))
            for index, depth in enumerate(DEPTHS):
                if float(torch.sigmoid(decoder.gate_logit(index, residuals[index][:, -1])).reshape(())) > threshold:
                    depths[-1] = depth
                    break
        hidden = decoder.forward_parallel(tokens, lengths, torch.tensor([depths]))
        ids.append(int(decoder.readout(hidden[:, -1]).argmax()))
    return ids[len(prompt) :], [LAYERS, *depths[len(prompt) :]]


@pytest.mark.parametrize(("family", "tied"), ONE_EACH)
def test_embedded_export_speaks_as_the_decoder_does(tmp_path, family, tied):
    base = tiny_hf(family, tmp_path / "base", tied=tied)
    policy = random_policy(base, tmp_path / "policy")
    out = tmp_path / "out"
    assert run("export", "--checkpoint", policy, "--hf", base, "--out", out) == 0
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    spec, tensors = load_policy(policy)
    decoder = Decoder.from_hf(base, spec, torch.float32, "cpu")
    decoder.load_policy(tensors)
    ids, depths = patterns()
    hidden = decoder.forward_parallel(ids, torch.full((3,), ids.shape[1]), depths)
    with torch.no_grad():
        close(model(ids, exit_depths=depths).logits, decoder.readout(hidden))
    made = model.generate(
        ids, exit_policy={"kind": "threshold", "value": 0.5}, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    taken = set()
    for row in range(3):
        tokens, exits = greedy(decoder, ids[row].tolist(), 12, 0.5)
        assert made[row, ids.shape[1] :].tolist() == tokens
        assert model.last_exit_depths[row].tolist() == exits[:12]
        taken |= set(exits)
    assert len(taken) > 1


@pytest.mark.parametrize(("family", "tied"), ONE_EACH)
def test_every_kind_is_the_same_model_by_tensors_and_logits(tmp_path, capsys, family, tied):
    base = tiny_hf(family, tmp_path / "base", tied=tied, vocab=133)
    policy = random_policy(base, tmp_path / "policy")
    made = {name: tmp_path / name for name in ("megatron", "embed", "plain", "sidecar", "back")}
    assert run("import", "--hf", base, "--out", made["megatron"], "--policy", policy, "--tp", 2, "--pp", 2) == 0
    for gates in ("embed", "sidecar", "drop"):
        out = made["plain" if gates == "drop" else gates]
        assert run("export", "--checkpoint", made["megatron"], "--out", out, "--gates", gates) == 0
    # The gates travel on: from an embedded export into a Megatron checkpoint.
    assert run("import", "--hf", made["embed"], "--out", made["back"], "--tp", 2) == 0
    opened = {name: open_checkpoint(path) for name, path in made.items()}
    opened["policy"] = open_checkpoint(policy, base)
    assert {name for name, one in opened.items() if one.gates()} == set(opened) - {"plain"}
    for name in opened:
        same, lines = verify(opened["megatron"], opened[name])
        assert same, (name, lines)
        assert any("random exits" in line for line in lines)
    ids, depths = patterns()
    full = torch.full_like(depths, LAYERS)
    by_kind = {name: (logits_of(one, ids, depths), logits_of(one, ids, full)) for name, one in opened.items()}
    assert {one.kind for one in opened.values()} == {"megatron", "embed", "hf"}
    for exits, plain in by_kind.values():
        close(exits, by_kind["embed"][0])
        close(plain, by_kind["embed"][1])
        assert (exits - plain).abs().max() > 0.1
    assert run("verify", made["embed"], base, "--no-logits") == 1
    assert "differs by up to" in capsys.readouterr().err


def test_verify_finds_one_changed_number_one_changed_gate_and_other_dimensions(tmp_path, capsys):
    base = tiny_hf("llama", tmp_path / "base")
    policy = random_policy(base, tmp_path / "policy")
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        assert run("export", "--checkpoint", policy, "--hf", base, "--out", out) == 0
    assert run("verify", one, two) == 0
    for name in ("model.layers.3.mlp.up_proj.weight", "gates.3.fc2.weight"):
        tensors = load_file(one / "model.safetensors")
        tensors[name][0, 0] += 0.01
        save_file(tensors, two / "model.safetensors", metadata={"format": "pt"})
        capsys.readouterr()
        assert run("verify", one, two) == 1
        shown = capsys.readouterr()
        assert f"{name}: differs" in shown.err and "DIFFERENT" in shown.out
        assert run("inspect", two) == 2
        assert f"{name} is not what manifest.json says" in capsys.readouterr().err
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert run("verify", one, two) == 1
    assert run("verify", one, tmp_path / "nowhere") == 2


def test_verify_counts_rounding_as_equal_and_says_so(tmp_path, capsys):
    base = tiny_hf("qwen2", tmp_path / "base")
    assert run("import", "--hf", base, "--out", tmp_path / "half", "--dtype", "bf16") == 0
    capsys.readouterr()
    assert run("verify", base, tmp_path / "half", "--no-logits") == 0
    assert "stored in two dtypes" in capsys.readouterr().out
    # As logits they are not the same model.
    assert run("verify", base, tmp_path / "half") == 1


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_full_fine_tuning_exports_the_tuned_base(tmp_path, capsys, family, tied):
    base = tiny_hf(family, tmp_path / "base", tied=tied)
    policy = random_policy(base, tmp_path / "policy", full=True)
    spec, tensors = load_policy(policy)
    assert isinstance(open_policy(policy)[1], FileTensors)
    for gates in ("embed", "drop"):
        assert run("export", "--checkpoint", policy, "--hf", base, "--out", tmp_path / gates, "--gates", gates) == 0
        stored = load_file(tmp_path / gates / "model.safetensors")
        assert sorted(stored) == sorted(tensors if gates == "embed" else HFDirectory(base).dims.tensor_shapes())
        assert all(torch.equal(stored[name], tensors[name]) for name in stored)
    manifest = json.loads((tmp_path / "embed" / "manifest.json").read_text())["tensors"]
    assert {source for line in manifest.values() for source in line["source"]} == {f"policy:{name}" for name in tensors}
    # In a Megatron checkpoint the tuned model is the base, and what is left of the policy are its gates.
    assert run("import", "--hf", base, "--out", tmp_path / "megatron", "--policy", policy, "--tp", 2) == 0
    left, gates = load_policy(tmp_path / "megatron")
    assert not left.full and sorted(gates) == sorted(spec.gate_shapes(HFDirectory(base).dims))
    assert run("verify", tmp_path / "megatron", tmp_path / "embed") == 0
    assert run("verify", tmp_path / "megatron", policy, "--hf", base) == 0
    capsys.readouterr()
    assert run("export", "--checkpoint", policy, "--hf", base, "--out", tmp_path / "k", "--adapters", "keep") == 2
    assert "no adapters" in capsys.readouterr().err
    data = bytearray((policy / "policy.safetensors").read_bytes())
    data[-3] ^= 1
    (policy / "policy.safetensors").write_bytes(data)
    assert run("export", "--checkpoint", policy, "--hf", base, "--out", tmp_path / "x") == 2
    assert "do not match the digest" in capsys.readouterr().err


def test_bf16_base_of_a_full_policy_gives_a_bf16_export(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    policy = random_policy(base, tmp_path / "policy", full=True)
    out = export_hf(base, policy, tmp_path / "out", gates="drop")
    tuned = load_policy(policy)[1]
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], tuned[name].bfloat16()) for name in stored)


def test_shards_are_of_the_size_asked_for_and_indexed(tmp_path):
    base = tiny_hf("qwen3", tmp_path / "base", tied=False)
    assert run("import", "--hf", base, "--out", tmp_path / "m", "--exit-depths", "2,4") == 0
    out = tmp_path / "out"
    assert (
        run("export", "--checkpoint", tmp_path / "m", "--out", out, "--max-shard-size", "120KB", "--gates", "embed")
        == 0
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 4
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    total = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert index["metadata"]["total_size"] == total
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 120_000 for file in files)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False).shape[1] <= 9


def test_the_command_says_nothing_but_its_result(tmp_path):
    base = tiny_hf("llama", tmp_path / "base")
    done = ee_megatron("convert", "roundtrip", "--hf", base, "--tp", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("\n") == 1

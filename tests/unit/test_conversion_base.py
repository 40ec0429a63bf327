"""A policy belongs to one base model: the same in other files and dtypes, refused on any other wherever they meet. And
the base model of a run may be a Megatron checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ee_megatron import cli
from ee_megatron.checkpoint.describe import open_base
from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.checkpoint.policy_files import base_identity, recorded_base
from ee_megatron.checkpoint.sources import HFSource, TunedSource
from ee_megatron.checkpoint.store import read_manifest
from ee_megatron.config.errors import faults_of
from ee_megatron.config.identity import stage_dir, stage_order, to_yaml
from ee_megatron.config.load import attempt, load
from ee_megatron.config.schema import RunConfig
from ee_megatron.evaluation.evaluate import EvaluationRow
from ee_megatron.evaluation.results import write_results
from ee_megatron.exit_rules import Threshold
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.inference import model_resolver
from ee_megatron.observe.rundir import DONE, RunDirectory
from ee_megatron.policy import POLICY_JSON, PolicySpec, initial_policy
from ee_megatron.report.inputs import runs_in
from ee_megatron.sweeps.run_metrics import imported
from ee_megatron.tensors import HeldStream
from ee_megatron.training import launch, stages
from ee_megatron.training.checkpoints import TrainingStreams, write_training
from ee_megatron.training.import_checkpoint import import_model
from ee_megatron.training.preflight import Preflight
from tests.conversion import MODEL, SMALL, cast, contents, fields, foreign, hashes, in_shards, made, policy_on, refused
from tests.reference import random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(3, (1, 2), rank=2, alpha=4.0)
STRANGER = "another base model"


def identity(path: Path):
    return base_identity(open_base(path))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A base, its teacher (adapters merged into it, as stage 0 does), a policy on the teacher, other forms of that."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: root / name for name in ("base", "teacher", "policy", "sharded", "megatron")}
    base = tiny_hf("llama", paths["base"], tied=False, layers=3, **SMALL)
    adapters = random_policy(HFDirectory(base).dims, SPEC, size=0.02)
    export_hf(base, (SPEC, adapters), paths["teacher"], "merge", "drop")
    policy_on(base, paths["policy"], SPEC, owner=paths["teacher"])
    shutil.copytree(paths["teacher"], paths["sharded"])
    in_shards(paths["sharded"])
    made("import --tp 2 --quiet --hf", paths["teacher"], "--out", paths["megatron"])
    return paths


def test_the_files_and_the_dtype_of_a_model_are_not_its_identity(models, tmp_path):
    teacher = identity(models["teacher"])
    assert identity(models["sharded"]).bfloat16 == teacher.bfloat16
    assert identity(models["megatron"]) == teacher
    bare = tmp_path / "megatron"
    shutil.copytree(models["megatron"], bare)
    # As ranks leave it: no record, so the chunks are looked at.
    (bare / "manifest.json").unlink()
    found = identity(bare)
    assert (found.bfloat16, found.float16, found.path) == (teacher.bfloat16, teacher.float16, str(bare))
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    for number, dtypes in enumerate(((brain,), (brain, single), (half,), (half, single))):
        copy = identity(cast(shutil.copytree(models["teacher"], tmp_path / str(number)), *dtypes))
        assert copy.same(teacher) and teacher.same(copy), dtypes
    made("import --dtype fp16 --quiet --hf", models["teacher"], "--out", tmp_path / "half")
    assert identity(tmp_path / "half").same(teacher)


def test_contents_and_mathematics_of_a_model_are_its_identity(models, tmp_path):
    base, teacher = identity(models["base"]), identity(models["teacher"])
    # What headers say is the same of both.
    assert HFDirectory(models["base"]).dims == HFDirectory(models["teacher"]).dims
    assert not base.same(teacher) and not teacher.same(base)

    def changed(**changes: object):
        shutil.copytree(models["base"], tmp_path / "other", dirs_exist_ok=True)
        fields(tmp_path / "other" / "config.json", **changes)
        return identity(tmp_path / "other")

    assert not changed(rms_norm_eps=1e-3).same(base)
    assert changed(max_position_embeddings=64).same(base)
    rope = {"rope_type": "linear", "rope_theta": 1e4}
    scaled = [changed(rope_parameters=rope | {"factor": factor}) for factor in (2, 2.0, 4.0)]
    assert scaled[0] == scaled[1] and not scaled[1].same(scaled[2]) and not scaled[0].same(base)
    tensors = {name: tensor.clone() for name, tensor in load_file(models["base"] / MODEL).items()}
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    tuned = base_identity(TunedSource(HFSource(models["base"]), tensors))
    assert not tuned.same(base) and changed().same(base)
    save_file(tensors, tmp_path / "other" / MODEL, metadata={"format": "pt"})
    assert identity(tmp_path / "other").same(tuned)


def test_the_converter_refuses_a_stranger_before_it_writes_and_takes_the_model_in_any_form(models, tmp_path, capsys):
    out, policy = tmp_path / "out", models["policy"]
    joins = {
        "export": lambda base: ("export --quiet --checkpoint", policy, "--hf", base, "--out", out),
        "import": lambda base: ("import --quiet --policy", policy, "--hf", base, "--out", out),
        "verify": lambda base: ("verify --no-logits --hf", base, policy, policy),
    }
    # Which two models, and how to go on all the same.
    names = [STRANGER, "--base-unchecked"]
    for name in ("base", "teacher"):
        names += [str(models[name]), identity(models[name]).bfloat16[:12]]
    for name, join in joins.items():
        refused(capsys, *join(models["base"]), names=tuple(names))
        assert not any(tmp_path.iterdir())
        for base in ("teacher", "sharded", *(["megatron"] if name != "import" else [])):
            made(*join(models[base]))
            shutil.rmtree(out, ignore_errors=True)
        made(*join(models["base"]), "--base-unchecked")
        shutil.rmtree(out, ignore_errors=True)


def test_a_policy_that_is_put_into_another_models_checkpoint_is_found_out(models, tmp_path, capsys):
    mixed, out = tmp_path / "mixed", tmp_path / "out"
    made("import --gates fresh --quiet --hf", models["base"], "--out", mixed)
    for file in ("policy.json", "policy.safetensors"):
        shutil.copy(models["policy"] / file, mixed)
    before = contents(tmp_path)
    for command in ("export", "reshard"):
        refused(capsys, command, "--checkpoint", mixed, "--out", out, names=(STRANGER,))
    export = ("export --checkpoint", models["megatron"], "--hf", models["base"], "--out", out)
    refused(capsys, *export, names=(str(models["base"]), str(models["megatron"]), "--hf"))
    assert contents(tmp_path) == before


def test_what_an_import_writes_says_which_base_it_belongs_to(models, tmp_path, capsys):
    made("inspect", models["policy"])
    assert f"base {identity(models['teacher'])}" in capsys.readouterr().out
    out = tmp_path / "out"
    made("import --quiet --hf", models["teacher"], "--policy", models["policy"], "--out", out)
    assert recorded_base(out) == identity(models["teacher"]) == recorded_base(models["policy"])
    assert read_manifest(out)["base"] == identity(models["teacher"]).to_json()


def test_an_older_policy_is_taken_and_that_is_said_once(models, tmp_path, capsys):
    old = shutil.copytree(models["policy"], tmp_path / "old")
    data = json.loads((old / POLICY_JSON).read_text())
    (old / POLICY_JSON).write_text(json.dumps({name: data[name] for name in data if name != "base"}))
    verify = ("verify --no-logits", old, old, "--hf", models["base"])
    for _ in range(2):
        made(*verify)
    assert capsys.readouterr().err.count(f"{old}: ") == 1
    (old / POLICY_JSON).write_text(json.dumps(data | {"base": "smollm"}))
    refused(capsys, *verify, names=(str(old), "'base' is 'smollm'", "path", "bfloat16", "float16"))


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_answering_refuses_a_stranger_unless_told_otherwise(models, capsys, command):
    options = [command, "--model", str(models["base"]), "--policy", str(models["policy"])]
    prompt = ["--prompt", "x"] if command == "generate" else []
    assert cli.main([*options, *prompt]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1 and STRANGER in lines[0]
    if prompt:
        assert cli.main([*options, *prompt, "--base-unchecked", "--max-new-tokens", "2", "--exits", "off"]) == 0
        assert "2 tokens" in capsys.readouterr().out


def settings(model: Path, folder: Path, *more: str) -> RunConfig:
    fixed = ("name=x", "teacher=null", "exits.depths=[1,2]", "device=cpu")
    return load([*fixed, f"model.path={model}", f"runs={folder}", *more])


def leave(cfg: RunConfig, stage: str, base: Path) -> None:
    """A checkpoint as `stage` on `base` leaves it."""
    spec = PolicySpec(3, (1, 2), rank=0)
    tensors = initial_policy(HFDirectory(base).dims, spec, 0)
    tensors["gates.1.fc2.weight"].fill_(0.1)
    with RunDirectory(stage_dir(cfg, stage)) as directory:
        with directory.write_checkpoint(1) as checkpoint:
            streams = TrainingStreams(1, HeldStream(tensors), {"exp_avg": HeldStream(tensors)})
            write_training(checkpoint, spec, streams, {}, identity(base).to_json())
        directory.write_atomic(DONE, "\n")


@pytest.mark.parametrize("stage", ["rl", "evaluate"])
def test_stages_refuse_the_policies_of_another_base_before_they_start(models, tmp_path, stage):
    control = [f"evaluate.controls.policy={models['policy']}"] if stage == "evaluate" else []
    options = [f"init_policy={models['policy']}", *control]
    with pytest.raises(ValueError, match=STRANGER):
        stages.ready_model(settings(models["base"], tmp_path, *options), stage)
    for name in ("teacher", "sharded"):
        assert stages.ready_model(settings(models[name], tmp_path, *options), stage) == models[name]
    if control:
        # A policy of its own, and a stranger to compare it with.
        cfg = settings(models["base"], tmp_path, *control)
        leave(cfg, "calibrate", models["base"])
        with pytest.raises(ValueError, match=STRANGER):
            stages.ready_model(cfg, stage)


def test_a_run_does_not_go_on_when_its_model_has_become_another(models, tmp_path):
    model = shutil.copytree(models["base"], tmp_path / "model")
    cfg = settings(model, tmp_path / "runs")
    leave(cfg, "calibrate", model)
    leave(cfg, "rl", model)
    assert stages.ready_model(cfg, "rl") == model
    shutil.copy(models["teacher"] / MODEL, model)
    for stage in ("calibrate", "rl", "evaluate"):
        with pytest.raises(ValueError, match=STRANGER):
            stages.ready_model(cfg, stage)


def test_an_export_is_kept_for_the_evaluation_that_it_came_from_and_made_again_for_another(models, tmp_path, capsys):
    def exported(threshold: float) -> tuple[Path, dict]:
        cfg = settings(models["base"], tmp_path, f"evaluate.thresholds=[{threshold}]")
        if not stages.is_done(cfg, "rl"):
            leave(cfg, "rl", models["base"])
        folder = stage_dir(cfg, "evaluate")
        folder.mkdir(exist_ok=True)
        meta = {"name": "x", "split": "held out", "threshold_reinforced": threshold}
        write_results(folder / "results.json", rows(threshold), [], meta)
        out = launch.export(cfg, "ee-megatron run name=x")
        assert read_manifest(out)["origin"]["evaluation"] == folder.name
        return out, json.loads((out / "config.json").read_text())["exit_policy"]

    def rows(threshold: float) -> list[EvaluationRow]:
        said = [("teacher", "full depth", 0.9, 1.0), ("reinforced", f"hazard > {threshold:g}", 0.8125, 0.5)]
        return [EvaluationRow(model, exits, 16, 0, right, 0.5, 1, depth, 1, 1) for model, exits, right, depth in said]

    out, rule = exported(0.5)
    assert rule["value"] == 0.5
    card = (out / "README.md").read_text()
    assert "| reinforced | hazard > 0.5 | 0.812 | 0.500 to 1.000 | 0.500 | 16 |" in card and "run name=x\n" in card
    assert "| teacher | full depth | 0.900 | 0.500 to 1.000 | 1.000 | 16 |" in card
    before = out.stat().st_ino
    assert exported(0.5) == (out, rule) and out.stat().st_ino == before
    capsys.readouterr()
    assert exported(0.7)[1]["value"] == 0.7
    assert str(out) in capsys.readouterr().out
    # One from before there was a record.
    manifest = read_manifest(out)
    del manifest["origin"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    fields(out / "config.json", exit_policy="stale")
    assert exported(0.7)[1]["value"] == 0.7
    assert "hazard > 0.7" in (out / "README.md").read_text()
    # What a user has made of the card stays.
    (out / "README.md").write_text("mine")
    assert exported(0.9)[1]["value"] == 0.9 and (out / "README.md").read_text() == "mine"


def test_a_converted_policy_has_the_figures_of_its_evaluation_and_no_other_checkpoint_has(models, tmp_path):
    cfg = settings(models["base"], tmp_path)
    leave(cfg, "rl", models["base"])
    folder, policy = stage_dir(cfg, "evaluate"), stage_dir(cfg, "rl") / "checkpoints" / "step_1"

    def card(name: str, threshold: float = 0.5) -> str:
        made("export --quiet --checkpoint", policy, "--hf", models["base"], "--out", tmp_path / name)
        said = json.loads((tmp_path / name / "config.json").read_text())["exit_policy"]
        assert said == {"kind": "threshold", "value": threshold}
        assert model_resolver.resolve(models["base"], policy).default_exits == Threshold(threshold)
        return (tmp_path / name / "README.md").read_text()

    assert "Not measured" in card("before") and "0.250" not in card("again")
    with RunDirectory(folder) as directory:
        directory.write_atomic("config.yaml", to_yaml(cfg))
        row = EvaluationRow("reinforced", "full depth", 8, 2, 0.25, 0.1, 0.4, 1.0, 1, 1)
        write_results(
            folder / "results.json", [row], [], {"name": "x", "split": "held out", "threshold_reinforced": 0.3}
        )
        directory.write_atomic(DONE, "")
    assert "| reinforced | full depth | 0.250 | 0.100 to 0.400 | 1.000 | 8 |" in card("after", 0.3)
    shutil.copytree(policy, policy.with_name("step_2"))
    assert "Not measured" in card("older")


class Start:
    """A model, its config.json and tokenizer alone, as somebody has them whose weights are Megatron's, and what
    Megatron-LM saved of it after ten updates of 4 sequences to 64 positions."""

    def __init__(self, tmp: Path) -> None:
        self.base, self.saved = foreign(tmp)
        self.runs = tmp / "runs"
        weights = shutil.ignore_patterns("*.safetensors")
        self.shape = shutil.copytree(self.base, tmp / "shape", ignore=weights)
        common = self.saved / "iter_0000010" / "common.pt"
        state = torch.load(common, weights_only=False)
        state["iteration"], state["args"].consumed_train_samples, state["args"].seq_length = 10, 40, 64
        torch.save(state, common)

    def settings(self, checkpoint: Path | None, *more: str) -> list[str]:
        given = [
            f"model.path={self.shape if checkpoint else self.base}",
            f"runs={self.runs}",
            "name=from",
            "task=arithmetic",
            *more,
        ]
        given += [f"model.checkpoint={checkpoint}"] if checkpoint else []
        return [*given, "teacher=null", "exits.depths=[1]", "device=cpu"]


@pytest.fixture
def given(tmp_path: Path) -> Start:
    return Start(tmp_path)


def test_the_model_is_the_checkpoints_to_the_bit_and_others_start_from_it(given):
    words = given.settings(given.saved)
    cfg = load(words)
    assert stage_order(cfg)[:2] == ["import-checkpoint", "traces"]
    with pytest.raises(FileNotFoundError, match="ee-megatron import-checkpoint"):
        stages.base_model(cfg)
    launch.run_stage("import-checkpoint", cfg, words)
    model = stages.base_model(cfg)
    (run,), ends = runs_in([made_in := stage_dir(cfg, "import-checkpoint")])
    link = made_in.parent / "latest" / "import-checkpoint"
    assert link.resolve() == made_in and runs_in([link])[1] == [made_in]
    assert [*run.stages.items()] == [("import-checkpoint", made_in)] and ends == [made_in]
    assert model == made_in / "model" and hashes(model) == hashes(given.base)
    assert (model / "tokenizer.json").read_bytes() == (given.base / "tokenizer.json").read_bytes()
    figures = json.loads((stage_dir(cfg, "import-checkpoint") / "imported.json").read_text())
    assert figures == {"iteration": 10, "tokens": 10 * 4 * 64}
    assert imported(figures) == {"iteration": 10, "tokens_pretrain": 2560}
    # Gone from where it was: what has been imported is enough.
    shutil.rmtree(given.saved)
    assert not Preflight().faults(attempt(words), ["import-checkpoint", "traces"])


def test_a_stage_that_ended_behind_the_model_goes_on_from_there(given, monkeypatch):
    cfg = load(given.settings(given.saved))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ee_megatron.checkpoint.megatron_settings.trained_for", killed)
        with pytest.raises(KeyboardInterrupt):
            import_model(cfg)
    assert not stages.is_done(cfg, "import-checkpoint")
    written = (stage_dir(cfg, "import-checkpoint") / "model" / "config.json").stat().st_mtime_ns
    model = import_model(cfg)
    assert stages.is_done(cfg, "import-checkpoint") and hashes(model) == hashes(given.base)
    assert (model / "config.json").stat().st_mtime_ns == written


def test_only_runs_that_name_a_checkpoint_are_named_after_it(given):
    cfgs = [load(given.settings(path)) for path in (None, given.saved, given.saved / "iter_0000010")]
    assert "import-checkpoint" not in stage_order(cfgs[0])
    for stage in ("traces", "evaluate"):
        assert len({stage_dir(cfg, stage) for cfg in cfgs}) == 3


def other_shape(given: Start) -> None:
    fields(given.shape / "config.json", rms_norm_eps=0.5)


def ours(given: Start, *words: str) -> None:
    shutil.rmtree(given.saved)
    made("import --hf", given.base, "--out", given.saved, *words)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda given: [file.unlink() for file in given.shape.glob("tokenizer.*")], "tokenizer.*model.checkpoint"),
        (other_shape, "norm_epsilon=1e-06.*0.5.*model.path"),
        (lambda given: shutil.rmtree(given.saved), "saved: no such directory"),
        (lambda given: ours(given, "--exit-depths 1"), "has its own gates.*model.path"),
        (lambda given: (ours(given), other_shape(given)), "another shape.*config.json"),
    ],
    ids=["no tokenizer", "another shape", "gone", "with gates", "ours of another shape"],
)
def test_what_does_not_fit_is_a_line_before_anything_starts(given, harm, message):
    harm(given)
    words = given.settings(given.saved)
    (found,) = Preflight().faults(attempt(words), ["import-checkpoint", "traces"])
    (said,) = faults_of(lambda: import_model(load(words)))
    assert found == said and "\n" not in said
    assert re.search(message, said)
    assert not list(given.runs.rglob("model*"))


def test_ours_is_taken_as_it_is_too(given):
    ours(given, "--tp 2")
    cfg = load(given.settings(given.saved))
    assert hashes(import_model(cfg)) == hashes(given.base)
    # What wasn't trained there has no number of updates.
    assert json.loads((stage_dir(cfg, "import-checkpoint") / "imported.json").read_text()) == {}


def test_the_stage_needs_one_model_to_start_from(given):
    (said,) = Preflight().faults(attempt(given.settings(None)), ["import-checkpoint"], inputs=True)
    assert said.startswith("import-checkpoint: these settings leave this stage out")
    words = given.settings(given.saved, "pretrain=true")
    (said,) = Preflight().faults(attempt(words), ["import-checkpoint"])
    assert "two models" in said

"""The whole method through the command line on a tiny model, with the real parts: ranks at PP2, DeepSpeed,
Ray actors, verifier processes, export and report. And one stage killed in the middle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ee_megatron.checkpoint.policy_files import base_identity, recorded_base
from ee_megatron.checkpoint.store import read_manifest
from ee_megatron.exit_rules import CONTROLS
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.observe.metrics import read_metrics
from ee_megatron.training import stages
from ee_megatron.training.serialization import load_traces
from tests.covering import EXTENDED, SLOW
from tests.processes import Command, ee_megatron
from tests.tiny import tiny_hf

SETTINGS = [
    "name=tiny", "device=cpu", "model.dtype=float32", "parallel.pipeline=2", "parallel.tokens_per_micro_batch=128",
    "exits.depths=[2,3,4]", "adapter.rank=4", "teacher=null", "task.validation=6", "task.evaluation=8",
    "traces.problems=16", "traces.wide_operands=0.25", "calibrate.epochs=1", "calibrate.exit_samples=1",
    "calibrate.batch_size=8", "rl.steps=4", "rl.prompts_per_step=4", "rl.group_size=2", "rollout.max_new_tokens=8",
    "rollout.actors=1", "rl.dump_rollouts=true", "rl.wide_operands=0.5", "rollout.threads=1",
    "evaluate.thresholds=[0.5]", "evaluate.wide_problems=5", "evaluate.wide_test=7", "evaluate.answers=3",
    "evaluate.controls=true", "evaluate.externalisation=true",
    "evaluate.externalisation.prompts=4", "tracker.wandb=disabled",
]  # fmt: skip


def command(name: str, folder: Path, *extra: str) -> list[str]:
    where = [f"model.path={folder / 'model'}", f"runs={folder / 'runs'}"]
    return [name, *SETTINGS, *where, *extra]


def run(name: str, folder: Path, *extra: str) -> str:
    done = ee_megatron(*command(name, folder, *extra), timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def only(folder: Path, stage: str) -> Path:
    (found,) = (folder / "runs" / "tiny").glob(f"{stage}-*")
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("method")
    tiny_hf("llama", folder / "model")
    return folder, run("run", folder)


@pytest.mark.timeout(1000)
def test_every_stage_leaves_what_the_next_one_needs(finished):
    folder, output = finished
    for stage in ("traces", "calibrate", "rl", "evaluate"):
        assert (only(folder, stage) / "DONE").is_file(), stage
    results = json.loads((only(folder, "evaluate") / "results.json").read_text())
    assert [(r["model"], r["n"]) for r in results["rows"]] == [("teacher", 8)] + [("calibrated", 8)] * 3 + [
        ("reinforced", 8)
    ] * 3
    for row in results["rows"]:
        assert row["low"] <= row["accuracy"] <= row["high"] and 0 < row["mean_depth"] <= 1
        assert row["exits"] != "full depth" or row["mean_depth"] == 1.0
    for row in results["rows"]:
        assert f"{row['mean_depth']:.3f}" in output
    rules = [*(rule.control for rule in CONTROLS), "calibrated gates"]
    assert [(e["control"], e["matched_by"]) for e in results["controls"]] == [("(reinforced)", "itself")] + [
        (rule, by) for rule in rules for by in ("depth", "accuracy")
    ]
    for entry in results["controls"]:
        assert entry["matched_by"] != "depth" or entry["within"] == (
            abs(entry["validation"]["mean_depth"] / entry["target"] - 1) <= 0.01
        )
    (wide,) = re.findall(r"and (\d+) on wide operands", results["meta"]["threshold choice"])
    assert 1 < int(wide) <= 5
    on_wide = results["wide"]
    assert list(on_wide) == ["teacher, full depth"] + [
        f"{model}, {exits}" for model in ("calibrated", "reinforced") for exits in ("full depth", "hazard > 0.5")
    ]
    (asked,) = {entry["row"]["n"] for entry in on_wide.values()}
    assert 1 < asked <= 7 and "on wide operands" in output
    assert [entry["paired"].get("n") for entry in on_wide.values()] == [None] + [asked] * 4
    # As many sets of answers as were announced.
    measured, announced = re.findall(r"^evaluate (\d+)/(\d+)", output, re.MULTILINE)[-1]
    assert measured == announced
    # What wandb and TensorBoard get of an evaluation, whatever threshold was chosen.
    (logged,) = read_metrics(only(folder, "evaluate") / "metrics.jsonl")
    by_rule = {row["model"]: row for row in results["rows"] if row["exits"].startswith("hazard")}
    for model in ("calibrated", "reinforced"):
        assert logged[f"{model}/threshold/accuracy"] == by_rule[model]["accuracy"]
        assert logged[f"{model}/wide/threshold/accuracy"] == on_wide[f"{model}, hazard > 0.5"]["row"]["accuracy"]
        assert logged[f"{model}/threshold/kl"] == by_rule[model]["kl"] and logged[f"{model}/threshold"] == 0.5
    policies = [f"{model}{rule}" for model in ("calibrated", "reinforced") for rule in ("", " at full depth")]
    assert list(results["externalisation"]) == ["teacher", *policies]
    assert (
        results["externalisation"]["reinforced at full depth"]["serial_depth"]["all"]["quantiles"]["0.5"]["value"] == 6
    )
    assert all(found["n"] == 4 for found in results["externalisation"].values())
    assert results["depth"]["teacher, full depth"]["flops"]["value"] > 0
    assert set(results["pareto"]) == {"calibrated", "reinforced"} == set(results["gates"])
    assert "random exits" in output and "mistake sensitivity" in output
    # The page's address first, then each stage, the table once.
    assert output.startswith("report: ") and output.count("mean depth  total depth") == 1
    lines = (only(folder, "evaluate") / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 8 and all(len(json.loads(line)["answers"]) == 3 for line in lines)
    kept = sorted(path.name for path in (only(folder, "rl") / "samples").iterdir())
    assert kept == [f"step_{step}.json" for step in (1, 2, 3, 4)]
    page = (folder / "runs" / "tiny" / "report.html").read_text()
    assert "Verdict" in page and "Rollouts over training" in page
    assert "reinforced" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (only(folder, "export") / "modeling_early_exit.py").is_file()
    cfg, model, checkpoint = stages.trained(only(folder, "rl"))
    assert (cfg.rl.steps, model, checkpoint.name) == (4, folder / "model", "step_4")
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        stages.trained(only(folder, "traces"))
    for stage in ("calibrate", "rl"):
        assert recorded_base(stages.trained(only(folder, stage))[2]) == base_identity(HFDirectory(folder / "model"))
    origin = read_manifest(only(folder, "export"))["origin"]
    assert origin["evaluation"] == only(folder, "evaluate").name


@pytest.mark.timeout(1000)
def test_learner_and_pool_agree_at_every_step(finished):
    """Replayed scores equal the ones recorded at sampling: fp32, two implementations, pipeline against decoder."""
    folder, _ = finished
    rows = read_metrics(only(folder, "rl") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["logprob_diff"] < 1e-5 and row["exit_logprob_diff"] < 1e-5
        assert row["importance_ratio_max"] < 1.001
        assert row["grad_norm"] > 0


def test_traces_and_rl_are_of_problems_on_wide_operands_too(finished):
    traced = [trace.prompt_id for trace in load_traces(only(finished[0], "traces") / "dataset")]
    assert [name.endswith("/wide") for name in traced] == [False] * 12 + [True] * 4, traced
    of_steps = only(finished[0], "rl") / "rollouts"
    lines = [line for file in of_steps.glob("*/rollouts.jsonl") for line in file.read_text().splitlines()]
    # Of two answers to each problem.
    ids = [json.loads(line)["prompt"]["id"] for line in lines[::2]]
    wide = [name for name in ids if name.endswith("/wide")]
    assert len(ids) == 16 and 3 <= len(wide) <= 13, ids


@pytest.mark.timeout(1000)
@EXTENDED
def test_a_second_run_does_nothing_again(finished):
    folder, _ = finished
    before = (only(folder, "rl") / "metrics.jsonl").read_bytes()
    output = run("rl", folder)
    assert "finished before" in output
    assert (only(folder, "rl") / "metrics.jsonl").read_bytes() == before


@pytest.mark.timeout(1000)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished):
    """SIGKILL of every learner process after two of four steps; the same command then gives the undisturbed metrics."""
    folder, _ = finished
    undisturbed = read_metrics(only(folder, "rl") / "metrics.jsonl")
    runs = folder / "runs" / "tiny"
    whole = only(folder, "rl")
    whole.rename(runs / "kept")
    job = Command(command("rl", folder))
    deadline = time.monotonic() + 120
    while not (whole / "checkpoints" / "step_2" / "COMPLETE").is_file():
        assert time.monotonic() < deadline and job.poll() is None, "the run did not reach step 2"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (whole / "DONE").is_file()
    run("rl", folder)
    resumed = read_metrics(whole / "metrics.jsonl")
    clock = ("seconds", "tokens_per_s", "time")
    for a, b in zip(undisturbed, resumed, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(clock)} == {
            k: v for k, v in b.items() if not k.startswith(clock)
        }


@pytest.mark.timeout(1000)
@EXTENDED
def test_a_killed_evaluation_goes_on_with_the_sets_that_it_has(finished):
    """SIGKILL after some of its sets; the same command then makes the others, and the undisturbed results."""
    folder, _ = finished
    whole = only(folder, "evaluate")
    answers = whole.parent / "answers"
    undisturbed = json.loads((whole / "results.json").read_text())
    shutil.rmtree(whole)
    shutil.rmtree(answers)
    job = Command(command("evaluate", folder))

    def complete() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in answers.glob("[0-9a-f]*") if p.is_dir()}

    deadline = time.monotonic() + 120
    while len(complete()) < 4:
        assert time.monotonic() < deadline and job.poll() is None, "the evaluation did not make four sets"
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (whole / "DONE").is_file()
    before = complete()
    run("evaluate", folder)
    after = complete()
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    # A set that was read again is there without its scores, too, and then only the one with them is looked at.
    assert (whole / "log.txt").read_text().count("answers reused") >= len(before) / 2

    def timeless(found):
        """Without what the clock decides."""
        if isinstance(found, dict):
            return {k: timeless(v) for k, v in found.items() if k not in ("tokens_per_s", "date")}
        return [timeless(v) for v in found] if isinstance(found, list) else found

    assert timeless(json.loads((whole / "results.json").read_text())) == timeless(undisturbed)


@SLOW
@pytest.mark.timeout(1000)
def test_the_adapters_stop_and_shrink_while_the_gates_settle_and_a_resumed_run_shrinks_them_once(finished):
    folder, _ = finished
    runs = folder / "runs" / "tiny"
    settings = (
        "calibrate.epochs=4", "calibrate.wise_ft_alpha=0.75", "calibrate.gate_only_fraction=0.25",
        "calibrate.gate_targets=current", "calibrate.student_patterns=0.5", "calibrate.uniform_patterns=1",
        "calibrate.checkpoint_every=3",
    )  # fmt: skip
    before = set(runs.glob("calibrate-*"))
    run("calibrate", folder, *settings)
    (stage,) = set(runs.glob("calibrate-*")) - before
    try:
        at, end = (load_file(stage / "checkpoints" / f"step_{step}" / "policy.safetensors") for step in (6, 8))
        for name, tensor in end.items():
            if "lora" in name:
                share = 1.0 if "lora_A" in name else 0.75
                assert np.allclose(tensor, at[name] * share, rtol=1e-6, atol=0), name
        assert any(not np.array_equal(end[name], at[name]) for name in end if name.startswith("gates."))
        assert all(np.abs(at[name]).max() > 0 for name in at if "lora_B" in name)
        # Exits are drawn at random; neither gates nor traces of a model that was never trained ask for any.
        depths = [row["pattern_depth"] for row in read_metrics(stage / "metrics.jsonl")]
        assert max(depths) < 0.9 and len(depths) == 8
        # Step 6 is the last before the change.
        (stage / "DONE").unlink()
        shutil.rmtree(stage / "checkpoints" / "step_8")
        run("calibrate", folder, *settings)
        again = load_file(stage / "checkpoints" / "step_8" / "policy.safetensors")
        assert all(np.array_equal(again[name], end[name]) for name in end)
    finally:
        stage.rename(folder / "settled")


@SLOW
@pytest.mark.timeout(900)
def test_full_fine_tuning_goes_on_from_a_checkpoint_with_rollouts_made_ahead(finished):
    """Checkpoints and weights pass through the ranks in blocks then, and start values, policies and AdamW's state are
    read in parts."""
    folder, _ = finished
    full = (
        "adapter.full=true", "calibrate.wise_ft_alpha=0.75", "calibrate.gate_only_fraction=0.5",
        "rl.checkpoint_every=1",
        "rollout.max_staleness=1", "rollout.sync_dtype=bfloat16",
    )  # fmt: skip
    runs = folder / "runs" / "tiny"
    others = set(runs.glob("rl-*"))
    run("traces", folder, *full)
    run("calibrate", folder, *full)
    run("rl", folder, *full)
    (stage,) = (path for path in set(runs.glob("rl-*")) - others)
    undisturbed = read_metrics(stage / "metrics.jsonl")
    end = load_file(stage / "checkpoints" / "step_4" / "policy.safetensors")
    assert "model.embed_tokens.weight" in end
    assert all(row["exit_logprob_diff"] < 0.1 for row in undisturbed)
    (stage / "DONE").unlink()
    shutil.rmtree(stage / "checkpoints" / "step_4")
    shutil.rmtree(stage / "ahead" / "version_4")
    run("rl", folder, *full)
    assert all(np.array_equal(tensor, end[name]) for name, tensor in load_file(
        stage / "checkpoints" / "step_4" / "policy.safetensors"
    ).items())  # fmt: skip
    assert [row["reward"] for row in read_metrics(stage / "metrics.jsonl")] == [row["reward"] for row in undisturbed]


@pytest.mark.timeout(400)
@EXTENDED
def test_stages_end_with_the_run_that_started_them(tmp_path):
    tiny_hf("llama", tmp_path / "model")
    # Two ranks, for far longer than the test waits.
    method = Command(command("run", tmp_path, "calibrate.epochs=4000", "rollout.backend=local"))
    try:
        deadline = time.monotonic() + 250
        while not any(read_metrics(found) for found in (tmp_path / "runs").glob("tiny/calibrate-*/metrics.jsonl")):
            assert method.poll() is None and time.monotonic() < deadline, "no update"
            time.sleep(0.1)
        below = psutil.Process(method.pid).children(recursive=True)
        assert len(below) >= 3
    finally:
        method.kill()
        method.wait()
    _, alive = psutil.wait_procs(below, 60)
    assert not alive


@pytest.mark.parametrize(("damage", "says"), [("cut", "truncated or damaged"), ("gone", "no such file")])
@pytest.mark.parametrize("name", ["run", "teacher"])
def test_damaged_weights_are_one_line_before_anything_starts(name, damage, says, tmp_path):
    weights = tiny_hf("llama", tmp_path / "model") / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        weights.unlink()
    done = ee_megatron(*command(name, tmp_path, "teacher=true"), timeout=100)
    assert done.returncode == 2
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and says in errors[0]
    assert not (tmp_path / "runs").exists()

"""A sweep on this machine with real stages: what fails, what is killed, what is shared; nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from ee_megatron.convert import main as convert
from ee_megatron.observe.metrics import read_metrics
from ee_megatron.sweeps import records
from ee_megatron.sweeps.grid import from_settings
from ee_megatron.sweeps.local import LocalExecutor
from ee_megatron.sweeps.sweep import Sweep, resolve
from tests.covering import EXTENDED, SLOW
from tests.processes import Command, ee_megatron
from tests.tiny import tiny_hf

SETTINGS = [
    "device=cpu", "model.dtype=float32", "parallel.tokens_per_micro_batch=128", "exits.depths=[2,3,4]",
    "adapter.rank=4",
    "teacher=null", "task.validation=4", "task.evaluation=4", "traces.problems=4", "calibrate.epochs=1",
    "calibrate.exit_samples=1", "calibrate.batch_size=4", "rl.prompts_per_step=2", "rl.group_size=2",
    "rollout.max_new_tokens=6", "rollout=local", "rollout.threads=1", "evaluate.thresholds=[0.5]",
    "evaluate.answers=2", "tracker.wandb=disabled",
]  # fmt: skip
LONG = 40
GRID = [
    "rl.depth_penalty.weight=0,0.5,1", f"rl.steps=2,3,{LONG}", "rl.adapter_lr=3e-4,1e30,3e-4",
    "--zip", "rl.depth_penalty.weight,rl.steps,rl.adapter_lr", "--last", "rl",
]  # fmt: skip


def command(folder: Path, name: str, *extra: str) -> list[str]:
    where = [f"model.path={folder / 'model'}", f"runs={folder / 'runs'}", "--name", name]
    return ["sweep", *SETTINGS, *where, *extra]


def begin(folder: Path, *extra: str) -> Command:
    return Command(command(folder, "grid", *GRID, *extra))


def finish(process: Command, timeout: float = 150) -> str:
    try:
        return "".join(process.communicate(timeout=timeout))
    finally:
        process.kill()


def until(what, timeout: float, title: str) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, title
        time.sleep(0.02)


def record_of(sweep: Sweep, index: int) -> records.Record:
    record = records.read_record(sweep, sweep.runs[index].tasks[-1])
    assert record is not None
    return record


def rl_directory(sweep: Sweep, index: int) -> Path:
    return records.stage_path(sweep, sweep.runs[index].tasks[-1])


@pytest.mark.timeout(300)
@EXTENDED
def test_a_sweep_survives_failures_and_kills_and_does_nothing_twice(tmp_path):
    """Shared stages once; a run that cannot learn; a run whose stage is killed, then one whose whole sweep is."""
    tiny_hf("llama", tmp_path / "model")
    runs = tmp_path / "runs" / "grid"

    first = begin(tmp_path, "--max-parallel", "2")
    until(lambda: list(runs.glob("sweep-*/manifest.json")) or first.poll() is not None, 60, "no manifest")
    sweep = records.find_sweep("grid", tmp_path / "runs")
    shared = sweep.tasks[0]
    assert [stage for stage, _ in shared.stages] == ["traces", "calibrate"] and len(shared.runs) == 3
    long = rl_directory(sweep, 2)
    until(
        lambda: (long / "checkpoints" / "step_2" / "COMPLETE").is_file() or first.poll() is not None, 150, "no step 2"
    )
    (stage,) = psutil.Process(record_of(sweep, 2).pid).children()
    stage.kill()
    said = finish(first)
    assert first.returncode == 1, said
    assert [records.run_state(sweep, run) for run in sweep.runs] == ["finished", "failed", "killed"], said
    assert "not finite" in record_of(sweep, 1).error and "error: rl.depth_penalty.weight=0.5" in said, said
    assert record_of(sweep, 2).error == "killed by SIGKILL" and record_of(sweep, 2).code == -signal.SIGKILL

    # Continued; then the sweep itself is killed, and what it had started ends by itself, with a checkpoint.
    done = len(read_metrics(long / "metrics.jsonl"))
    second = begin(tmp_path)
    until(lambda: len(read_metrics(long / "metrics.jsonl")) > done + 1 or second.poll() is not None, 100, "no progress")
    below = psutil.Process(second.pid).children(recursive=True)
    second.kill()
    assert len(below) >= 2
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below), 60, "orphans live on")
    finish(second)
    assert records.run_state(sweep, sweep.runs[2]) in ("stopped", "finished") and record_of(sweep, 2).starts == 2

    third = begin(tmp_path)
    said = finish(third)
    assert "1 task(s) to start" in said and "tasks 1/1" in said and third.returncode == 1, said
    assert [records.run_state(sweep, run) for run in sweep.runs] == ["finished", "failed", "finished"], said
    for index, steps in ((0, 2), (2, LONG)):
        rows = read_metrics(rl_directory(sweep, index) / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
    starts = [records.read_record(sweep, shared.key).starts, *(record_of(sweep, index).starts for index in range(3))]
    assert starts == [1, 1, 1, 3]
    result = records.read_result(sweep, sweep.runs[2].id)
    assert (
        result["steps"] == LONG and result["flops_rl"] > 0 and result["seconds_all_stages"] > result["seconds_rl"] > 0
    )
    assert len(list(runs.glob("traces-*"))) == len(list(runs.glob("calibrate-*"))) == 1

    last = finish(begin(tmp_path))
    assert "0 task(s) to start" in last and "2 finished, 1 failed" in last
    assert [record_of(sweep, index).starts for index in range(3)] == [1, 1, 3]


@SLOW
@pytest.mark.timeout(200)
def test_the_debug_executor_goes_through_the_whole_method_in_one_process(tmp_path):
    """And a second sweep of the same settings finds everything made, and has its results without starting anything."""
    tiny_hf("llama", tmp_path / "model")
    grid = command(tmp_path, "whole", "rl.steps=1", "seed=1")
    done = ee_megatron(*grid, "--executor", "debug")
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = [records.open_sweep(path) for path in (tmp_path / "runs" / "whole").glob("sweep-*")]
    result = records.read_result(sweep, sweep.runs[0].id)
    evaluated = json.loads((records.stage_path(sweep, f"evaluate-{sweep.runs[0].id}") / "results.json").read_text())
    assert result["policy"] == "reinforced" and result["seed"] == 1
    assert result["accuracy"] == evaluated["rows"][-1]["accuracy"]
    assert result["flops_answer"] > 0 and result["flops_rl"] > 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "whole").glob("*-*/*.json*")}
    (sweep.directory / "results" / f"{sweep.runs[0].id}.json").unlink()
    again = ee_megatron(*grid)
    assert again.returncode == 0 and "0 task(s) to start" in again.stdout, again.stdout + again.stderr
    assert records.read_result(sweep, sweep.runs[0].id) == result
    changed = {file.name for file, stamp in before.items() if file.stat().st_mtime_ns != stamp}
    assert changed <= {"manifest.json"}


@pytest.mark.timeout(200)
@EXTENDED
def test_checkpoints_of_a_pretraining_run_are_an_axis(tmp_path):
    """Each is imported once, and what it was trained for stands in the table."""
    model = tiny_hf("llama", tmp_path / "model")
    for iteration in (10, 20):
        out = tmp_path / f"iter_{iteration:07d}"
        assert convert(["import", "--hf", str(model), "--out", str(out), "--quiet"]) == 0
        common = out / "weights" / "common.pt"
        state = torch.load(common, weights_only=False)
        state["iteration"] = iteration
        state["args"].consumed_train_samples, state["args"].seq_length = 4 * iteration, 64
        torch.save(state, common)
        # As Megatron-LM has it: the weights alone.
        (out / "weights").rename(tmp_path / f"saved_{iteration}")
    for file in model.glob("*.safetensors"):
        file.unlink()
    axis = f"model.checkpoint={tmp_path / 'saved_10'},{tmp_path / 'saved_20'}"
    grid = command(tmp_path, "series", axis, "traces.temperature=0.7,0.8", "--last", "traces", "--executor", "debug")
    done = ee_megatron(*grid)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = [records.open_sweep(path) for path in (tmp_path / "runs" / "series").glob("sweep-*")]
    found = [records.read_result(sweep, run.id) for run in sweep.runs]
    assert sorted((row["iteration"], row["tokens_pretrain"]) for row in found) == [(10, 2560)] * 2 + [(20, 5120)] * 2
    imported = list((tmp_path / "runs" / "series").glob("imported-*"))
    assert len(imported) == 2 and len(list((tmp_path / "runs" / "series").glob("traces-*"))) == 4


STUBBORN = """\
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1]).write_text("told"), sys.exit(85)))
Path(sys.argv[1]).write_text("started")
time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_an_interrupted_executor_tells_its_tasks_and_waits_for_them(tmp_path):
    grid = from_settings(
        ["name=t", f"runs={tmp_path}", "model.path=m", "teacher=null", "init_policy=s", "rl.steps=1,2,3"]
    )
    sweep = resolve(grid, "rl", lambda cfg: None)
    records.save(sweep)
    script = tmp_path / "task.py"
    script.write_text(STUBBORN)
    said: list[str] = []
    executor = LocalExecutor(
        sweep, lambda key: [sys.executable, str(script), str(tmp_path / key)], os.environ, 2, said.append
    )

    def interrupt() -> None:
        until(lambda: len(list(tmp_path.glob("rl-*"))) == 2, 30, "two tasks")
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    helper = threading.Thread(target=interrupt)
    helper.start()
    code = executor.run(sweep.tasks)
    helper.join()
    assert code == 130 and list(executor.codes.values()) == [85, 85]
    assert sorted(file.read_text() for file in tmp_path.glob("rl-*")) == ["told", "told"]
    assert signal.getsignal(signal.SIGINT) is before and sum(text.startswith("started") for text in said) == 2

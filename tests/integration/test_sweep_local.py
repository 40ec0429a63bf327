"""A sweep on this machine with real stages: what fails, what is killed, what is shared; nothing is done twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from ee_megatron.observe.metrics import read_metrics
from ee_megatron.sweeps.sweep import Sweep, TaskRecord, find_sweep
from tests.covering import EXTENDED
from tests.processes import Command
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


def record_of(sweep: Sweep, index: int) -> TaskRecord:
    record = sweep.record(sweep.runs[index].task)
    assert record is not None
    return record


def rl_directory(sweep: Sweep, index: int) -> Path:
    return sweep.directory.parent / sweep.runs[index].task


def states(sweep: Sweep) -> list[str]:
    return [sweep.run_state(run) for run in sweep.runs]


@pytest.mark.timeout(300)
@EXTENDED
def test_a_sweep_survives_failures_and_kills_and_does_nothing_twice(tmp_path):
    """Shared stages once; a run that cannot learn; a run whose stage is killed, then one whose whole sweep is."""
    tiny_hf("llama", tmp_path / "model")
    runs = tmp_path / "runs" / "grid"

    first = begin(tmp_path, "--max-parallel", "2")
    until(lambda: list(runs.glob("sweep-*/manifest.json")) or first.poll() is not None, 60, "no manifest")
    sweep = find_sweep("grid", tmp_path / "runs")
    shared = next(iter(sweep.tasks.values()))
    assert [step.stage for step in shared.steps] == ["traces", "calibrate"] and len(shared.runs) == 3
    long = rl_directory(sweep, 2)
    until(
        lambda: (long / "checkpoints" / "step_2" / "COMPLETE").is_file() or first.poll() is not None, 150, "no step 2"
    )
    stages = psutil.Process(first.pid).children()
    (stage,) = [child for child in stages if f"rl.steps={LONG}" in child.cmdline()]
    stage.kill()
    said = finish(first)
    assert first.returncode == 1, said
    assert states(sweep) == ["finished", "failed", "killed"], said
    assert "not finite" in record_of(sweep, 1).error and "error: rl.depth_penalty.weight=0.5" in said, said
    assert record_of(sweep, 2).error == "killed by SIGKILL" and record_of(sweep, 2).code == -signal.SIGKILL

    # Continued; then the sweep itself is killed, and what it had started ends by itself, with a checkpoint. The next
    # one is started at once and waits for it.
    done = len(read_metrics(long / "metrics.jsonl"))
    second = begin(tmp_path)
    until(lambda: len(read_metrics(long / "metrics.jsonl")) > done + 1 or second.poll() is not None, 100, "no progress")
    below = psutil.Process(second.pid).children(recursive=True)
    second.kill()
    assert below

    third = begin(tmp_path)
    said = finish(third)
    finish(second)
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below), 60, "orphans live on")
    assert "1 to start" in said and "tasks 1/1" in said and third.returncode == 1, said
    assert states(sweep) == ["finished", "failed", "finished"], said
    for index, steps in ((0, 2), (2, LONG)):
        rows = read_metrics(rl_directory(sweep, index) / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [sweep.record(shared.key).starts, *(record_of(sweep, index).starts for index in range(3))] == [1, 1, 1, 3]
    result = sweep.result(sweep.runs[2])
    assert result["steps"] == LONG and result["flops_rl"] > 0
    assert len(list(runs.glob("traces-*"))) == len(list(runs.glob("calibrate-*"))) == 1

    last = finish(begin(tmp_path))
    assert "0 to start" in last and "2 finished, 1 failed" in last
    assert [record_of(sweep, index).starts for index in range(3)] == [1, 1, 3]

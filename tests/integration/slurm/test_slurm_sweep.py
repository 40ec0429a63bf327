"""Sweeps as job arrays, through submitit, on a real Slurm: preempted, robbed of a node, told to stop; each run once."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ee_megatron.observe.metrics import read_metrics
from ee_megatron.sweeps.sweep import Sweep, TaskRecord, find_sweep
from tools import mini_slurm

ROOT = Path(__file__).parents[3]
ALONE = ["cluster.nodes=1", "cluster.rollout_nodes=0", "cluster.gpus_per_node=0", "parallel.recompute=false",
         "rollout=local"]  # fmt: skip
# A node at a time for each task, so that several nodes are at work.
WHOLE_NODES = ["--executor", "slurm", "--slurm", "cpus-per-task=16", "--slurm", "time=10"]
# Steps of a run that something is to happen to: on a busy machine a test looks at it seconds later.
LONG = 200


def sweep(site, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EE_SITE_ENV": "no site file",
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    command = [sys.executable, "-m", "ee_megatron.cli", "sweep", *arguments]
    return site.cluster.run(*command, cwd=ROOT, environment=environment, timeout=90, check=check)


def opened(site, name: str) -> Sweep:
    return find_sweep(name, site.folder / "runs")


def logs(site, name: str) -> str:
    """What tasks, stages and submitit said, for a failing test's message."""
    folder = opened(site, name).directory
    files = sorted([*folder.glob("logs/*.log"), *folder.glob("slurm/*.out"), *folder.glob("tasks/*.json")])
    return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in files)


def wait_for(site, name: str, what, timeout: float, title: str) -> None:
    try:
        mini_slurm.until(what, timeout, title, pause=0.3)
    except TimeoutError as error:
        queue = site.cluster.run("squeue").stdout
        raise AssertionError(f"{error}\n{queue}\n{logs(site, name)}") from None


def at_work(site, name: str, keys: set[str]) -> dict[str, TaskRecord]:
    """Task -> record of those of the tasks that are in the middle of RL."""
    found, current = {}, opened(site, name)
    for key in keys:
        record = current.record(key)
        if record is None or record.state != "running" or current.is_done(current.tasks[key]):
            continue
        if (current.directory.parent / key / "checkpoints").is_dir():
            found[key] = record
    return found


def one_at_work(site, name: str, keys: set[str]) -> TaskRecord:
    """Wait for one of the tasks to be in the middle of RL and take it out of `keys`."""
    wait_for(site, name, lambda: at_work(site, name, keys), 120, f"one of {keys} to have a checkpoint")
    key, record = next(iter(at_work(site, name, keys).items()))
    keys.remove(key)
    return record


def preempt(site, name: str, record: TaskRecord) -> None:
    """An urgent job takes a task's node."""
    site.cluster.run("sbatch", "--partition=urgent", f"--nodelist={record.host}", "--exclusive", "--output=/dev/null",
                     "--wrap=true")  # fmt: skip
    title = f"job {record.job} to be requeued"
    wait_for(site, name, lambda: site.cluster.job(record.job)["Restarts"] != "0", 60, title)


@pytest.mark.timeout(1000)
def test_twelve_runs_come_to_eleven_results_whatever_happens_to_their_jobs(site):
    """One array: two tasks are preempted, one loses its node, one cannot learn. Nothing that was done is done again."""
    # The ones that something will happen to take longer than the others.
    steps = [LONG if run in (0, 2, 3) else 4 for run in range(12)]
    grid = [
        "rl.depth_penalty.weight=range(0,1.15,0.1)", "rl.seed=1,2,3,1,2,3,1,2,3,1,2,3",
        f"rl.steps={','.join(map(str, steps))}",
        f"rl.adapter_lr={','.join('1e30' if run == 1 else '3e-4' for run in range(12))}",
        "--zip", "rl.depth_penalty.weight,rl.seed,rl.steps,rl.adapter_lr", "--last", "rl", "--name", "array",
    ]  # fmt: skip
    settings = ["experiment=rl_7b", *site.rl("array", *ALONE, "parallel.pipeline=1"),
                "rl.checkpoint_every=2", "rl.prompts_per_step=2"]  # fmt: skip
    command = [*settings, *grid, *WHOLE_NODES]
    said = sweep(site, *command).stdout
    assert "12 run(s)" in said and "12 tasks in an array" in said and said.count("submitted job") == 1
    # It has returned at once: the queue has what there is to do, and a second sweep has nothing to add.
    assert "0 to start" in sweep(site, *command).stdout

    current = opened(site, "array")
    long = {run.task for run, count in zip(current.runs, steps, strict=True) if count == LONG}
    struck = [one_at_work(site, "array", long)]
    preempt(site, "array", struck[0])
    struck.append(one_at_work(site, "array", long))
    preempt(site, "array", struck[1])
    struck.append(one_at_work(site, "array", long))
    node = struck[2].host
    site.cluster.power_off(node)
    try:
        wait_for(site, "array", lambda: not site.queue(), 600, "the end of the array")
    finally:
        site.cluster.power_on(node)

    states = [current.run_state(run) for run in current.runs]
    assert states.count("finished") == 11 and states[1] == "failed", logs(site, "array")
    for run, count in zip(current.runs, steps, strict=True):
        record, directory = current.record(run.task), current.directory.parent / run.task
        if run is current.runs[1]:
            assert record.starts == 1 and "not finite" in record.error, record
            continue
        # Every step once, whoever was stopped: what went on did so from its checkpoint.
        assert [row["step"] for row in read_metrics(directory / "metrics.jsonl")] == list(range(1, count + 1))
        assert (record.starts > 1) == (record.job in [each.job for each in struck]), record
    sweep(site, "collect", "array", "--runs", str(site.folder / "runs"))
    table = list(csv.DictReader(io.StringIO((current.directory / "table.csv").read_text())))
    assert [row["status"] for row in table] == states
    assert "not finite" in table[1]["error"] and not table[1]["reward"]
    assert all(row["reward"] and float(row["flops_rl"]) > 0 for row in table if not row["error"])
    shown = sweep(site, "status", "array", "--runs", str(site.folder / "runs")).stdout
    assert "11 finished, 1 failed" in shown and "not finite" in shown
    assert "0 to start" in sweep(site, *command).stdout
    site.no_strays()


@pytest.mark.timeout(600)
def test_shared_stages_come_first_and_several_ranks_stop_and_go_on_by_submitits_protocol(site):
    """Traces once for two calibrations on two ranks each; one of them is told to stop in the middle."""
    settings = site.settings("phases", *ALONE, "parallel.pipeline=2", "calibrate.epochs=60",
                             "calibrate.checkpoint_every=1000", "--last", "calibrate")  # fmt: skip
    command = ["experiment=rl_7b", *settings, "calibrate.kl_factor=1,4", "--name", "phases",
               "--executor", "slurm", "--slurm", "cpus-per-task=8", "--slurm", "time=10"]  # fmt: skip
    said = sweep(site, *command).stdout
    assert said.count("submitted job") == 2 and "traces for 2 runs" in said and "2 tasks in an array" in said
    current = opened(site, "phases")
    shared, first, second = current.tasks
    metrics = {key: current.directory.parent / key / "metrics.jsonl" for key in (first, second)}

    def under_way() -> bool:
        return metrics[first].is_file() and len(read_metrics(metrics[first])) > 3

    wait_for(site, "phases", under_way, 240, "a calibration to be under way")
    assert current.is_done(current.tasks[shared])
    job = current.record(first).job
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)
    wait_for(site, "phases", lambda: not site.queue(), 300, "the end of the arrays")
    assert [current.run_state(run) for run in current.runs] == ["finished"] * 2, logs(site, "phases")
    assert [current.record(key).starts for key in (shared, first, second)] == [1, 2, 1]
    for file in metrics.values():
        rows = read_metrics(file)
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    checkpoints = metrics[first].parent / "checkpoints"
    # Nothing but the word to stop has made a checkpoint before the last.
    assert len(list(checkpoints.iterdir())) == 2


@pytest.mark.timeout(480)
def test_a_killed_run_is_dead_at_once_and_goes_on_on_another_node(site):
    """Its lock names a process of a node that nobody here can look at: Slurm is asked."""
    settings = ["experiment=rl_7b", *site.rl("dropped", *ALONE, "parallel.pipeline=1"), f"rl.steps={LONG}",
                "rl.checkpoint_every=2", "rl.prompts_per_step=2"]  # fmt: skip
    command = [*settings, "--last", "rl", "--name", "dropped", "--executor", "slurm", "--slurm", "time=10"]
    assert "cpus-per-task=8 mem=0" in sweep(site, *command).stdout
    (task,) = opened(site, "dropped").tasks
    record = one_at_work(site, "dropped", {task})
    found = site.cluster.job(record.job)
    assert (found["CPUs/Task"], found["MinMemoryNode"]) == ("8", "0"), found
    assert "0 to start" in sweep(site, *command).stdout
    assert f"job {record.job} (RUNNING)" in sweep(site, "status", "dropped", "--runs", str(site.folder / "runs")).stdout
    # At once and without a word to anybody, as a node that is short of memory does: the record says that it is running,
    # and its locks are held.
    for pid, node, program in site.cluster.processes():
        if node == record.host and "python" in program[0]:
            os.kill(pid, signal.SIGKILL)
    wait_for(site, "dropped", lambda: not site.queue(), 60, "the killed job's end")
    assert opened(site, "dropped").record(task).state == "running"
    said = sweep(site, *command, "--slurm", f"exclude={record.host}").stdout
    assert "1 to start" in said, said

    def started_again() -> bool:
        now = opened(site, "dropped").record(task)
        return now.job != record.job and now.stage == "rl"

    wait_for(site, "dropped", started_again, 100, "the run to go on")
    now = opened(site, "dropped").record(task)
    assert now.host != record.host and now.starts == 2

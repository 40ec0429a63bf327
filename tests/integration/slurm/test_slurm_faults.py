"""What happens to a job on a cluster: it is warned, preempted, runs out of time, loses a rank or a node."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

RL = ["sbatch", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "slurm/rl_7b.sh"]
SECONDS = 240


def metrics(site, name):
    return (site.directory(name) / "metrics.jsonl").read_bytes()


@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_stop_goes_on_as_if_nothing_had_happened(site):
    """USR1 in the middle, no checkpoint but the one it asks for: back into the queue, the same directory, and at the
    end the metrics of a run that was never stopped, to the byte."""
    settings = ["rl.steps=8", "rl.checkpoint_every=100"]
    straight = site.submit([*RL, *site.rl("straight", *settings)])
    assert site.end(straight, SECONDS)["JobState"] == "COMPLETED", site.everything(straight)

    job = site.submit([*RL, *site.rl("stopped", *settings)])
    site.reach("stopped", job, 3)
    site.cluster.run("scancel", "--signal=USR1", job)
    found = site.cluster.wait(job, lambda job: job["Restarts"] == "1", 90)
    assert found["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), site.everything(job)
    (checkpoint,) = (site.directory("stopped") / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name.split("_")[1]) < 8
    found = site.end(job, SECONDS)
    assert found["JobState"] == "COMPLETED" and found["Restarts"] == "1", site.everything(job)
    assert "stopped with a checkpoint: back into the queue (restart 1 of at most 20)" in site.log(job)
    assert metrics(site, "stopped") == metrics(site, "straight")
    assert len(list((site.directory("stopped") / "slurm").iterdir())) == 2


@pytest.mark.timeout(900)
def test_a_time_limit_sends_the_job_back_as_often_as_it_may(site):
    """A real limit, warned of before it comes; the second start is stopped by hand and has no third."""
    endless = site.rl("limit", "rl.steps=100000", "rl.checkpoint_every=100000", "cluster.requeue_limit=1")
    job = site.submit([*RL, *endless], "--time=10", "--signal=B:USR1@30")
    site.reach("limit", job, 1)
    # Only now, so that a slow start does not use it up. Slurm counts whole minutes and looks at limits twice in each.
    hours, minutes, seconds = (int(part) for part in site.cluster.job(job)["RunTime"].split(":"))
    limit = (3600 * hours + 60 * minutes + seconds + 59) // 60 + 1
    site.cluster.run("scontrol", "update", f"job={job}", f"timelimit={limit}")
    found = site.cluster.wait(job, lambda job: job["Restarts"] == "1", 150)
    assert found["JobState"] != "TIMEOUT", site.everything(job)
    done = len(site.rows("limit"))
    assert done > 0, site.everything(job)
    site.cluster.run("scontrol", "update", f"job={job}", "timelimit=10")
    site.reach("limit", job, done + 2)
    steps = [row["step"] for row in site.rows("limit")]
    assert steps == list(range(1, len(steps) + 1))
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)
    found = site.end(job, 90)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "85:0", "1"), site.everything(job)
    assert "as often as cluster.requeue_limit lets it" in site.log(job)


@pytest.mark.timeout(600)
def test_a_preempted_job_goes_on_when_its_nodes_are_free_again(site):
    job = site.submit([*RL, *site.rl("preempted", "rl.steps=12")])
    site.reach("preempted", job, 2)
    urgent = site.cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"
    ).stdout.strip()
    assert site.end(urgent, 120)["JobState"] == "COMPLETED", site.everything(job)
    found = site.end(job, SECONDS)
    assert found["JobState"] == "COMPLETED" and int(found["Restarts"]) >= 1, site.everything(job)
    assert [row["step"] for row in site.rows("preempted")] == list(range(1, 13))


@pytest.mark.timeout(600)
def test_a_cancelled_job_does_not_come_back(site):
    job = site.submit([*RL, *site.rl("cancelled", "rl.steps=100000")])
    site.reach("cancelled", job, 1)
    site.cluster.run("scancel", job)
    found = site.end(job, 90)
    assert found["JobState"] == "CANCELLED" and found["Restarts"] == "0", site.everything(job)


@pytest.mark.timeout(600)
def test_a_lost_rollout_node_does_not_stop_the_learner(site):
    """Three nodes, two of them with an actor; one loses its power in the middle of the run."""
    settings = site.rl("lost", "rl.steps=30", "cluster.nodes=3", "cluster.rollout_nodes=2", "rollout.actors=2",
                       "rollout.failure_budget=2")  # fmt: skip
    job = site.submit([*RL, *settings], "--nodes=3")
    site.reach("lost", job, 3)
    assert site.rows("lost")[-1]["actors_alive"] == 2
    site.cluster.power_off("node3")
    try:
        found = site.end(job, SECONDS)
        assert found["JobState"] == "COMPLETED" and found["Restarts"] == "0", site.everything(job)
        last = site.rows("lost")[-1]
        assert (last["step"], last["actors_alive"], last["actor_restarts"]) == (30, 1, 1)
        log = (site.directory("lost") / "log.txt").read_text()
        assert "its node is gone" in log and "no node has room for 1 of 2 rollout actors" in log
        # The nodes of this cluster share the machine's files: the two that are left have removed Ray's.
        assert not Path(f"/tmp/ee-ray-{job}").exists()
    finally:
        site.cluster.power_on("node3")


@pytest.mark.timeout(600)
def test_a_killed_rank_ends_the_job_with_its_reason_and_it_can_be_submitted_again(site):
    settings = site.rl("killed", "rl.steps=100000", "rl.checkpoint_every=1")
    job = site.submit([*RL, *settings])
    site.reach("killed", job, 2)
    (victim,) = [pid for pid, node, command in site.cluster.processes() if node == "node1" and is_rank(pid, command, 1)]
    os.kill(victim, signal.SIGKILL)
    found = site.end(job, 60)
    # srun's code is the highest of its tasks', and the other rank may have been on its way out when it was ended.
    assert (found["JobState"], found["ExitCode"]) in [("FAILED", "137:0"), ("FAILED", "143:0")], site.everything(job)
    log = site.log(job)
    assert "task 1: Killed" in log and f"the ranks ended with exit code {found['ExitCode'][:3]}" in log, log
    site.no_strays()
    done = len(site.rows("killed"))
    # A step's checkpoint may have been under way.
    job = site.submit([*RL, *settings])
    site.reach("killed", job, done + 1)


def is_rank(pid: int, command: list[str], rank: int) -> bool:
    if not any(part.endswith("ee-megatron") for part in command):
        return False
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return f"SLURM_PROCID={rank}" in environment and "SLURM_STEP_NUM_TASKS=2" in environment

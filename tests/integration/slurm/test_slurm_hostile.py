"""Hostile names through sbatch on a real Slurm, and arrays that it would refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load

ROOT = Path(__file__).parents[3]
TOUCH = "touch CANARY"
SUBMIT = ["sbatch", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "slurm/rl_7b.sh"]


def no_canary(site) -> bool:
    return not (ROOT / "CANARY").exists() and not list(site.folder.rglob("CANARY"))


@pytest.mark.timeout(300)
def test_what_a_shell_would_run_is_a_directory_here(site):
    """A stage that has finished, in a directory with such a name: the job says where, and nothing else happens."""
    runs = site.folder / f"a b;{TOUCH};$({TOUCH})`{TOUCH}`'a[$({TOUCH})]"
    settings = ["experiment=rl_7b", *site.rl("hostile"), f'runs="{runs}"']
    directory = stage_dir(load(settings), "rl")
    directory.mkdir(parents=True)
    (directory / "DONE").touch()
    job = site.submit([*SUBMIT, *settings[1:]])
    assert site.end(job, 200)["JobState"] == "COMPLETED", site.everything(job)
    assert f"finished before, in {directory}" in site.log(job) and no_canary(site)


@pytest.mark.timeout(300)
def test_a_forged_name_is_refused_on_the_node_and_where_it_is_submitted(site):
    name = f"name='x;{TOUCH};$({TOUCH})'"
    job = site.submit([*SUBMIT, *site.rl("x"), name])  # fmt: skip
    ended = site.end(job, 200)
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "2:0", site.everything(job)
    errors = [line for line in site.log(job).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "expected a plain name" in errors[0] and no_canary(site)
    assert not (site.folder / "runs" / "x").exists()


def sweep(site, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EE_SITE_ENV": "no site file"}
    command = [sys.executable, "-m", "ee_megatron.cli", "sweep", "experiment=rl_7b", *arguments]
    return site.cluster.run(*command, cwd=ROOT, environment=environment, timeout=200, check=False)


@pytest.mark.timeout(400)
def test_more_points_than_an_array_may_have_go_out_as_several(site):
    alone = ["cluster.nodes=1", "cluster.rollout_nodes=0", "cluster.gpus_per_node=0", "parallel.recompute=false",
             "rollout=local", "parallel.pipeline=1"]  # fmt: skip
    count = site.cluster.largest_array + 2
    grid = [f"rl.seed=range({count})", "--last", "rl", "--name", "large", "--executor", "slurm", "--max-parallel", "4"]
    # They are only to wait.
    done = sweep(site, *site.rl("large", *alone), *grid, "--slurm", "begin=now+1hour", "--slurm", "time=10")
    assert done.returncode == 0, done.stderr
    assert f"{site.cluster.largest_array} tasks in an array" in done.stdout and "2 tasks in an array" in done.stdout
    waiting = site.cluster.run("squeue", "--noheader", "--array", "--format=%F %K").stdout.split("\n")
    assert len([line for line in waiting if line.strip()]) == count
    # Nobody waits for the other: both shares of what may run at a time are theirs.
    jobs = {line.split()[0] for line in waiting if line.strip()}
    throttles = [site.cluster.job(job)["ArrayTaskThrottle"] for job in jobs]
    assert throttles == ["2", "2"]


def test_a_line_end_in_an_option_of_sbatch_submits_nothing(site):
    done = sweep(site, *site.rl("line"), "rl.seed=1,2", "--executor", "slurm", "--slurm", f"comment=x\n{TOUCH}")
    assert done.returncode == 2 and "expected an option of sbatch" in done.stderr and not site.queue()
    assert no_canary(site) and not (site.folder / "runs" / "line").exists()

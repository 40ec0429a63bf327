"""Slurm jobs as a process sees its own and asks after others: whether one that holds something is still at work."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

ASK_S = 20.0
"""How long Slurm's controller may take to answer."""
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class Job:
    """One start of a job: its number, how often it had been requeued, its cluster's name. Number "": no job."""

    number: str = ""
    restart: int = 0
    cluster: str = ""


def own_job() -> Job:
    """This process's."""
    e = os.environ
    restart = int(e.get("SLURM_RESTART_COUNT") or 0)
    return Job(e.get("SLURM_JOB_ID", ""), restart, e.get("SLURM_CLUSTER_NAME", ""))


def has_ended(job: Job) -> bool:
    """Whether that start of the job is over, by what Slurm says. False where nobody can say: no job or cluster known,
    no Slurm here or another cluster's, no answer."""
    if not (job.number and job.cluster) or job.cluster != (own_job().cluster or _cluster_here()):
        return False
    code, said = _scontrol("show", "job", "--oneliner", job.number)
    if code:
        return "Invalid job id" in said
    state, restarts = re.search(r"\bJobState=(\w+)", said), re.search(r"\bRestarts=(\d+)", said)
    if state is None or restarts is None:
        return False
    return state[1] not in AT_WORK or int(restarts[1]) > job.restart


def _cluster_here() -> str:
    found = re.search(r"^ClusterName\s*=\s*(\S+)", _scontrol("show", "config")[1], re.MULTILINE)
    return found[1] if found else ""


def _scontrol(*arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=ASK_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return 1, ""
    return done.returncode, done.stdout + done.stderr

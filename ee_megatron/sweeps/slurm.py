"""A sweep's tasks as Slurm jobs, through submitit: submit one job array per level of tasks, and query their state."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.cluster import DEFAULTS, merged, site_options
from .sweep import FINISHED, STOPPED, StageTask, Sweep, open_sweep, spelt
from .task import run_task

SLURM_S = 60.0
WARNING_S = 300
"""How long before a time limit submitit gets the signal."""
SLURMS_ARRAY = 1001
"""Slurm's default MaxArraySize."""
PARTING_S = 30
"""Seconds before the time limit when a stage that ignores the warning is killed: time for the record and requeueing."""


class SlurmTask:
    """A task as submitit runs it on a node; after a requeue submitit calls the one that `checkpoint` returned."""

    def __init__(self, directory: Path, key: str, warning_s: float):
        self.directory, self.key, self.warning_s = directory, key, warning_s

    def __call__(self) -> str:
        from submitit.core.job_environment import JobEnvironment

        signals: list[int] = []
        number = JobEnvironment._usr_sig()
        # submitit's handler would requeue at once: it is called when the stage has written its checkpoint.
        requeue: Any = signal.signal(number, lambda given, _: signals.append(given))
        sweep, grace_s = open_sweep(self.directory), max(1.0, self.warning_s - PARTING_S)
        task = sweep.tasks[self.key]
        record = run_task(sweep, task, lambda: bool(signals), grace_s=grace_s)
        if record.state == STOPPED:
            if not signals:
                # A preemption without a warning: TERM to every process, then Slurm ends the job and requeues it itself.
                time.sleep(float(os.environ.get("EE_KILL_WAIT_S", "45")))
            try:
                requeue(number, None)
            except (RuntimeError, subprocess.SubprocessError) as error:
                # No requeues are left, or Slurm refuses it.
                record.error = str(error)
                sweep.write_record(self.key, record)
        if record.state != FINISHED:
            raise RuntimeError(f"{self.key}: {record.state} in {record.stage or 'its beginning'}: {record.error}")
        return self.key

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(SlurmTask(self.directory, self.key, self.warning_s))


def submit(
    sweep: Sweep, tasks: Sequence[StageTask], options: Mapping[str, str], parallel: int, requeues: int,
    queue: Mapping[str, str],
) -> None:  # fmt: skip
    """Submit tasks as one job array per level (a plain job for a single task; several arrays above Slurm's maximal
    size) and return at once.

    options: of sbatch; parallel: tasks at a time; requeues: after time limits, at most. A level starts when all jobs
    that it needs, submitted now or in the `queue`, have ended, even with errors: each task then checks its own needs.
    Raises RuntimeError with sbatch's words if it refuses.
    """
    earlier = {key: job for key, job in sweep.submitted().items() if key in queue}
    jobs: dict[str, str] = {}
    directory, warning = sweep.directory.resolve(), float(options.get("warning", WARNING_S))
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    largest = max(1, int(match[1])) if match else SLURMS_ARRAY
    for _, level in itertools.groupby(tasks, key=lambda task: task.level):
        every = list(level)
        pieces = [every[start : start + largest] for start in range(0, len(every), largest)]
        for piece in pieces:
            needed = {each.key for task in piece for each in sweep.chain(task)[:-1]}
            waits = sorted({job.split("_")[0] for key, job in {**earlier, **jobs}.items() if key in needed})
            dependency = ":".join(["afterany", *waits]) if waits else ""
            job_options = sbatch_options(piece, options)
            executor = make_executor(sweep, job_options, max(1, parallel // len(pieces)), requeues, dependency)
            try:
                with executor.batch():
                    submitted = [executor.submit(SlurmTask(directory, task.key, warning)) for task in piece]
            except Exception as error:
                raise RuntimeError(f"sbatch refused the sweep's job: {' '.join(str(error).split())}") from None
            jobs |= {task.key: job.job_id for task, job in zip(piece, submitted, strict=True)}
            sweep.note_submitted(jobs)
            what = f"{len(piece)} tasks in an array" if len(piece) > 1 else sweep.describe(piece[0])
            print(f"submitted job {submitted[0].job_id.split('_')[0]}: {what} ({spelt(job_options)})", flush=True)


def make_executor(sweep: Sweep, options: Mapping[str, str], parallel: int, requeues: int, after: str) -> Any:
    """submitit's executor for one array, with `sbatch_options`. The task is the batch script's own process, so that the
    warning before a time limit (USR2) reaches it and a stage of several ranks may start steps."""
    from submitit.slurm.slurm import SlurmExecutor, SlurmJobEnvironment

    # `exec`: signals to the batch script's process then reach Python, not a shell that waits for it.
    python = f"exec {shlex.quote(sys.executable)}"
    executor = SlurmExecutor(sweep.directory / "slurm", max_num_timeout=requeues, python=python)
    others = {key: value or True for key, value in options.items() if key not in ("time", "warning")}
    executor.update_parameters(
        job_name=f"sweep-{sweep.directory.parent.name}",
        time=minutes_of(options["time"]),
        array_parallelism=parallel,
        use_srun=False,
        stderr_to_stdout=True,
        dependency=after or None,
        # submitit's own would be refused where wckeys are enforced.
        wckey=None,
        additional_parameters={
            "requeue": True, "signal": f"B:{SlurmJobEnvironment.USR_SIG}@{options['warning']}", **others,
        },
    )  # fmt: skip
    return executor


def sbatch_options(tasks: Sequence[StageTask], options: Mapping[str, str]) -> dict[str, str]:
    """Options of sbatch for one array of tasks: from the settings and the job scripts, then the site (EE_SBATCH), then
    `options`. Raises ValueError for a wrong EE_SBATCH."""
    steps = [step for task in tasks for step in task.steps]
    gpus = max(step.gpus for step in steps)
    settings = {
        "time": "1440",
        "warning": str(WARNING_S),
        "nodes": str(max(step.nodes for step in steps)),
        "ntasks-per-node": str(max(step.slots for step in steps)),
    }
    return merged(settings, {"gpus-per-node": str(gpus)} if gpus else {}, DEFAULTS, site_options(os.environ), options)


def minutes_of(text: str) -> int:
    """Minutes of a time limit as Slurm writes it: "90", "2:00:00", "1-12". Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"--slurm time={text}: expected minutes, hours:minutes:seconds or days-hours")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return days * 1440 + first * 60 + second
    return first + (second > 0) if match[4] is None else first * 60 + second + (third > 0)


def queued(sweep: Sweep) -> dict[str, str]:
    """Tasks in Slurm's queue: key -> PENDING, RUNNING, ... Empty without Slurm or submitted tasks. Raises RuntimeError
    if Slurm does not answer."""
    jobs = sweep.submitted()
    if not jobs:
        return {}
    # Slurm refuses a list of which every job is gone, so all of the user's jobs are listed and filtered here.
    said = _ask("squeue", "--noheader", "--array", "--format=%F|%K|%T", "--me")
    states: dict[str, str] = {}
    for line in said.splitlines():
        number, index, state = line.strip().split("|")
        states[number if index == "N/A" else f"{number}_{index}"] = state
    return {key: states[job] for key, job in jobs.items() if job in states}


def _ask(*command: str) -> str:
    """The output of a Slurm program; "" if it is not installed. Raises RuntimeError if it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=True)
    except FileNotFoundError:
        return ""
    except subprocess.SubprocessError as error:
        said = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise RuntimeError(f"{command[0]}: {said}; try again when Slurm answers") from None
    return done.stdout

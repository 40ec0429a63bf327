"""A sweep's tasks as Slurm jobs, through submitit: one array per level of tasks; what Slurm has of them now."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.cluster import DEFAULTS, merged, site_options
from . import records
from .sweep import StageTask, Sweep
from .task import TaskRunner

SLURM_S = 60.0
WARNING_S = 300
"""How long before a time limit submitit is told."""
SLURMS_ARRAY = 1001
"""Slurm's own MaxArraySize where nobody has set another."""
PARTING_S = 30
"""Of the warning, what is left when a stage that has not heeded it is killed: for the record and the way back."""


class SlurmTask:
    """What submitit runs on a node, by its protocol: called with nothing, asked for a checkpoint before a time limit or
    a preemption, and started again from what that returned."""

    def __init__(self, directory: Path, key: str, warning_s: float):
        self.directory, self.key, self.warning_s = directory, key, warning_s
        self._runner: TaskRunner | None = None

    def __call__(self) -> str:
        # A step's learning may need all of the warning, a minute is no use there.
        self._runner = TaskRunner(self.directory, self.key, grace_s=max(1.0, self.warning_s - PARTING_S))
        code = self._runner.run()
        if code == 0:
            return self.key
        record = self._runner.record
        if record.state == records.STOPPED and not self._runner.told:
            self._go_back()
        raise RuntimeError(f"{self.key}: {record.state} in {record.stage or 'its beginning'}: {record.error}")

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        if self._runner is not None:
            self._runner.stop_and_wait()
        return DelayedSubmission(SlurmTask(self.directory, self.key, self.warning_s))

    def _go_back(self) -> None:
        """The stage was told to stop, and not by submitit. A preemption without a warning does that: TERM to every
        process, then Slurm ends the job and requeues it itself. If nothing comes, submitit's own way back is taken."""
        from submitit.core.job_environment import JobEnvironment

        time.sleep(float(os.environ.get("EE_KILL_WAIT_S", "45")))
        os.kill(os.getpid(), JobEnvironment._usr_sig())
        time.sleep(5.0)


def submit(
    sweep: Sweep,
    tasks: Sequence[StageTask],
    options: Mapping[str, str],
    parallel: int,
    requeues: int,
    queue: Mapping[str, str],
) -> dict[str, str]:
    """Submit tasks as one job array per level (a plain job for a single task; several arrays where Slurm takes none of
    that size) and return at once: task -> job.

    options: of sbatch; parallel: an array's tasks at a time; requeues: after time limits, at most. A level starts after
    all that it needs, submitted now or in the `queue`, has ended, however: a run whose shared stages failed says so
    itself. The task is the batch script's own process, so that the warning before a time limit (USR2) reaches it and a
    stage of several ranks may start steps. Raises RuntimeError with sbatch's words if it refuses.
    """
    jobs: dict[str, str] = {}
    largest = largest_array()
    earlier = {
        key: job for key, job in records.submitted(sweep).items() if queue.get(key, records.GONE) != records.GONE
    }
    directory, warning = sweep.directory.resolve(), float(options.get("warning", WARNING_S))
    for level in sweep.levels():
        chosen = [task for task in level if task in tasks]
        if not chosen:
            continue
        needed = {before.key for task in chosen for before in sweep.chain(task)[:-1]}
        waits = records.job_numbers({key: job for key, job in {**earlier, **jobs}.items() if key in needed})
        pieces = [chosen[start : start + largest] for start in range(0, len(chosen), largest)]
        # Together at most `parallel`; where that is less than one each, one array after another.
        share, before = max(1, parallel // len(pieces)), list[str]()
        for piece in pieces:
            held = [*waits, *(before if parallel < len(pieces) else [])]
            after = ":".join(["afterany", *held]) if held else ""
            executor = _executor(sweep, piece, options, share, requeues, after)
            try:
                with executor.batch():
                    submitted = [executor.submit(SlurmTask(directory, task.key, warning)) for task in piece]
            except Exception as error:
                said = " ".join(str(error).split())
                raise RuntimeError(f"sbatch refused the sweep's job: {said}") from None
            jobs |= {task.key: job.job_id for task, job in zip(piece, submitted, strict=True)}
            before = records.job_numbers({task.key: jobs[task.key] for task in piece})
            records.note_submitted(sweep, jobs)
    return jobs


def largest_array() -> int:
    """How many tasks a job array may have here (MaxArraySize). Raises RuntimeError if Slurm does not answer."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _asked(["scontrol", "show", "config"]), re.MULTILINE)
    return max(1, int(found[1])) if found else SLURMS_ARRAY


def _executor(
    sweep: Sweep, tasks: Sequence[StageTask], options: Mapping[str, str], parallel: int, requeues: int, after: str
) -> Any:
    from submitit.slurm.slurm import SlurmExecutor, SlurmJobEnvironment

    given: dict[str, Any] = {"requeue": "", **asked_for(tasks, options)}
    minutes, warning = minutes_of(given.pop("time")), int(given.pop("warning"))
    nodes, slots = int(given.pop("nodes")), int(given.pop("ntasks-per-node"))
    given = {key: value or True for key, value in given.items()}

    # `exec`: signals to the batch script's process then reach Python, not a shell that waits for it.
    python = f"exec {shlex.quote(sys.executable)}"
    executor = SlurmExecutor(sweep.directory / "slurm", max_num_timeout=requeues, python=python)
    executor.update_parameters(
        job_name=f"sweep-{sweep.directory.parent.name}",
        time=minutes,
        nodes=nodes,
        ntasks_per_node=slots,
        array_parallelism=parallel,
        use_srun=False,
        stderr_to_stdout=True,
        dependency=after or None,
        # submitit's own would be refused where wckeys are enforced.
        wckey=None,
        additional_parameters={"signal": f"B:{SlurmJobEnvironment.USR_SIG}@{warning}", **given},
    )
    return executor


def asked_for(tasks: Sequence[StageTask], options: Mapping[str, str]) -> dict[str, str]:
    """sbatch's options for one array of tasks: what the settings and the job scripts say, then the site (EE_SBATCH),
    then `options`. Raises ValueError for a wrong EE_SBATCH."""
    gpus = max(task.gpus for task in tasks)
    settings = {
        "time": "1440",
        "warning": str(WARNING_S),
        "nodes": str(max(task.nodes for task in tasks)),
        "ntasks-per-node": str(max(task.slots for task in tasks)),
    }
    return merged(settings, {"gpus-per-node": str(gpus)} if gpus else {}, DEFAULTS, site_options(os.environ), options)


def minutes_of(text: str) -> int:
    """Slurm's ways to write a time limit -> minutes: "90", "2:00:00", "1-12". Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"--slurm time={text}: expected minutes, hours:minutes:seconds or days-hours")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return days * 1440 + first * 60 + second
    return first + (second > 0) if match[4] is None else first * 60 + second + (third > 0)


def queued(sweep: Sweep) -> dict[str, str]:
    """Tasks that Slurm still has: key -> PENDING, RUNNING, ...; GONE for one that says it runs in a job that Slurm has
    no longer. Empty where there is no Slurm or nothing was submitted.

    Raises RuntimeError if Slurm does not answer.
    """
    jobs = records.submitted(sweep)
    numbers = records.job_numbers(jobs)
    if not numbers:
        return {}
    # Slurm refuses a list of which every job is gone, so all of them are asked for and sorted out here.
    states: dict[str, str] = {}
    for line in _asked(["squeue", "--noheader", "--array", "--format=%F|%K|%T", "--me"]).splitlines():
        number, index, state = line.strip().split("|")
        states[number if index == "N/A" else f"{number}_{index}"] = state
    found = {key: states[job] for key, job in jobs.items() if job in states}
    for key, job in jobs.items():
        record = None if key in found else records.read_record(sweep, key)
        if record is not None and record.state == records.RUNNING and record.job == job:
            found[key] = records.GONE
    return found


def _asked(command: list[str]) -> str:
    """What a program of Slurm's says; nothing where there is none. Raises RuntimeError if it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} did not answer within {SLURM_S:g} s; try again") from None
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {' '.join(done.stderr.split())}; try again")
    return done.stdout

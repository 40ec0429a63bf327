"""Who starts a sweep's tasks: processes of this machine, or one Slurm job array per level of tasks.

Neither knows what a task does: it is a command, or an object that submitit can call.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import manifest as disk
from .manifest import FAILED, KILLED, RUNNING, STOPPED
from .sweep import Sweep, Task

GRACE_S = 90.0
"""From the word to stop to the end of tasks that do not heed it; more than they give their stages."""
SLURM_S = 60.0
WARNING_S = 300
"""How long before a time limit submitit is told."""


def describe_task(sweep: Sweep, task: Task) -> str:
    """Its stages, and the settings that all of its runs have in common."""
    stages = "+".join(stage for stage, _ in task.stages)
    first, *others = (sweep.run(ident).settings for ident in task.runs)
    common = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    settings = " ".join(f"{key}={value}" for key, value in common.items())
    if others:
        return f"{stages} for {len(task.runs)} runs{': ' if settings else ''}{settings}"
    return f"{stages} {settings}".rstrip()


class LocalExecutor:
    """Tasks as processes of this machine, at most `parallel` at a time, each after the one that it needs.

    command: task key -> what to start. INT or TERM ends all of them, with a checkpoint where the stage keeps one; if
    this process dies, they are told so (training/stopping.py) and end the same way.
    """

    def __init__(
        self,
        sweep: Sweep,
        command: Callable[[str], list[str]],
        environment: Mapping[str, str],
        parallel: int,
        say: Callable[[str], None],
    ):
        self.sweep, self._command, self._environment, self._say = sweep, command, dict(environment), say
        self.codes: dict[str, int] = {}
        """Exit codes of the tasks that were started, by key."""
        self._running: dict[str, tuple[subprocess.Popen, int]] = {}
        self._slots = list(range(parallel))
        self._devices = split_devices(visible_devices(self._environment), parallel)
        self._told = 0

    def run(self, tasks: Sequence[Task]) -> int:
        """Start `tasks`, parents first, and wait. 0; 1 if one failed; 130 if told to stop."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        waiting = list(tasks)
        try:
            while (waiting or self._running) and not self._told:
                self._collect()
                self._start_ready(waiting)
                time.sleep(0.1)
            if self._told:
                self._say("told to stop: running tasks end at their next step")
                return 130
        finally:
            self._end_all()
            for number, old in before.items():
                signal.signal(number, old)
        return 1 if any(self.codes.values()) else 0

    def _hear(self, number: int, _: Any) -> None:
        self._told = number

    def _start_ready(self, waiting: list[Task]) -> None:
        pending = {task.key for task in waiting} | set(self._running)
        for task in list(waiting):
            if not self._slots:
                return
            if task.needs in pending:
                continue
            waiting.remove(task)
            if task.needs and disk.task_state(self.sweep, self.sweep.task(task.needs)) in (STOPPED, KILLED):
                # It goes on with the next start, and so does what needs it.
                continue
            slot = self._slots.pop(0)
            environment = {**self._environment}
            if self._devices:
                environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot]
            # A group of its own: the terminal's INT is for this process, which passes it on as the word to stop.
            child = subprocess.Popen(
                self._command(task.key), stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            self._running[task.key] = (child, slot)
            self._say(f"started {describe_task(self.sweep, task)}")

    def _collect(self) -> None:
        for key, (child, slot) in list(self._running.items()):
            code = child.poll()
            if code is None:
                continue
            del self._running[key]
            self._slots.append(slot)
            self.codes[key] = code
            task, record = self.sweep.task(key), disk.read_record(self.sweep, key)
            state = disk.task_state(self.sweep, task)
            reason = f" (exit code {code}): {record.error}" if record and state == FAILED else ""
            self._say(f"{state} {describe_task(self.sweep, task)}{reason}; {disk.counts(self.sweep)}")

    def _end_all(self) -> None:
        deadline = time.monotonic() + GRACE_S
        for child, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        while self._running:
            if time.monotonic() > deadline:
                for child, _ in self._running.values():
                    with contextlib.suppress(ProcessLookupError):
                        child.kill()
                deadline = time.monotonic() + GRACE_S
            self._collect()
            time.sleep(0.1)


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """The machine's GPUs, as CUDA_VISIBLE_DEVICES names them; none where there are none."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [part for part in environment["CUDA_VISIBLE_DEVICES"].split(",") if part]
    files = Path("/dev").glob("nvidia[0-9]*") if Path("/dev").is_dir() else []
    return sorted((file.name.removeprefix("nvidia") for file in files), key=int)


def split_devices(devices: Sequence[str], parallel: int) -> list[str]:
    """Each slot's devices: an even share, or one that slots take turns at where there are fewer devices than slots. []
    if there is nothing to share out."""
    if not devices or parallel == 1:
        return []
    share = max(1, len(devices) // parallel)
    return [",".join(devices[slot * share % len(devices) :][:share]) for slot in range(parallel)]


# ---- Slurm ----


def submit(
    sweep: Sweep,
    tasks: Sequence[Task],
    callable_of: Callable[[str], Any],
    options: Mapping[str, str],
    parallel: int,
    requeues: int,
    queue: Mapping[str, str],
) -> dict[str, str]:
    """Submit tasks as one job array per level (a plain job for a single task) and return at once: task -> job.

    A level starts after all that it needs, submitted now or in the `queue`, has ended, however: a run whose shared
    stages failed says so itself. The task is the batch script's own process, so that the warning before a time limit
    (USR2) reaches it and a stage of several ranks may start steps. Raises RuntimeError with sbatch's words if it
    refuses.
    """
    jobs: dict[str, str] = {}
    earlier = {key: job for key, job in disk.submitted(sweep).items() if key in queue}
    for level in sweep.levels():
        chosen = [task for task in level if task in tasks]
        if not chosen:
            continue
        needed = {before.key for task in chosen for before in sweep.chain(task)[:-1]}
        waits = disk.job_numbers({key: job for key, job in {**earlier, **jobs}.items() if key in needed})
        executor = _executor(
            sweep, chosen, options, parallel, requeues, ":".join(["afterany", *waits] if waits else [])
        )
        try:
            with executor.batch():
                found = [executor.submit(callable_of(task.key)) for task in chosen]
        except Exception as error:
            said = " ".join(str(error).split())
            raise RuntimeError(f"sbatch refused the sweep's job: {said}") from None
        for task, job in zip(chosen, found, strict=True):
            jobs[task.key] = job.job_id
        disk.note_submitted(sweep, jobs)
    return jobs


def _executor(
    sweep: Sweep, tasks: Sequence[Task], options: Mapping[str, str], parallel: int, requeues: int, after: str
) -> Any:
    from submitit.slurm.slurm import SlurmExecutor, SlurmJobEnvironment

    # `exec`: signals to the batch script's process then reach Python, not a shell that waits for it.
    python = f"exec {shlex.quote(sys.executable)}"
    executor = SlurmExecutor(sweep.directory / "slurm", max_num_timeout=requeues, python=python)
    given = dict(options)
    minutes = minutes_of(given.pop("time", "1440"))
    warning = int(given.pop("warning", str(WARNING_S)))
    extra: dict[str, Any] = {"requeue": True, "signal": f"B:{SlurmJobEnvironment.USR_SIG}@{warning}", **given}
    gpus = max(task.gpus for task in tasks)
    executor.update_parameters(
        job_name=f"sweep-{sweep.directory.parent.name}",
        time=minutes,
        nodes=max(task.nodes for task in tasks),
        ntasks_per_node=max(task.slots for task in tasks),
        array_parallelism=parallel,
        use_srun=False,
        stderr_to_stdout=True,
        additional_parameters=extra,
        **({"gpus_per_node": gpus} if gpus else {}),
        **({"dependency": after} if after else {}),
    )
    return executor


def minutes_of(text: str) -> int:
    """Slurm's ways to write a time limit -> minutes: "90", "2:00:00", "1-12". Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"--slurm time={text}: expected minutes, hours:minutes:seconds or days-hours")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] is not None:
        return days * 1440 + first * 60 + second
    if match[4] is not None:
        return first * 60 + second + (third > 0)
    return first + (second > 0)


def queued(sweep: Sweep) -> dict[str, str]:
    """Tasks that Slurm still has: key -> PENDING, RUNNING, ... Empty where there is no Slurm or nothing was submitted.

    Raises RuntimeError if Slurm does not answer.
    """
    jobs = disk.submitted(sweep)
    numbers = disk.job_numbers(jobs)
    if not numbers:
        return {}
    # Slurm refuses a list of which every job is gone, so all of them are asked for and sorted out here.
    command = ["squeue", "--noheader", "--array", "--format=%F|%K|%T", "--me"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"squeue did not answer within {SLURM_S:g} s; try again") from None
    if done.returncode:
        raise RuntimeError(f"squeue: {' '.join(done.stderr.split())}; try again")
    states: dict[str, str] = {}
    for line in done.stdout.splitlines():
        number, index, state = line.strip().split("|")
        states[number if index == "N/A" else f"{number}_{index}"] = state
    return {key: states[job] for key, job in jobs.items() if job in states}


def state_now(sweep: Sweep, task: Task, queue: Mapping[str, str]) -> str:
    """`manifest.task_state`, and what Slurm knows: a task that waits there (again) is queued."""
    state = disk.task_state(sweep, task)
    waits = queue.get(task.key) in ("PENDING", "CONFIGURING", "REQUEUED", "COMPLETING")
    return disk.QUEUED if waits and state not in (disk.FINISHED, RUNNING) else state
